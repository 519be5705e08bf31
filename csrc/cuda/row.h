// A block's part of a row of logits, read from memory once as far as it fits into shared memory.
#pragma once

#include "common/host_device.h"
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace pmc::cuda {

// logits from products with the head; any NaN stays NaN.
inline __device__ float transformed(float z, const HeadTransform& head) {
    z *= head.logit_scale;
    return head.softcap > 0 ? head.softcap * tanhf(z / head.softcap) : z;
}

template <class Logit>
class RowPart {
  public:
    static constexpr int kWidth = 16 / static_cast<int>(sizeof(Logit));  // of a vector

    struct Vector {
        float value[kWidth];
    };

    // `kept` has room for `room` vectors; each thread finds there what it has read itself.
    __device__ RowPart(const Logit* row, int size, int part, int parts, uint4* kept, int room)
        : row_(row),
          size_(size),
          aligned_(reinterpret_cast<uintptr_t>(row) % 16 == 0),
          begin_(boundary(size, part, parts)),
          end_(boundary(size, part + 1, parts)),
          kept_(kept),
          room_(room) {}

    // Calls visit(vector, token of its first value) for this thread's vectors; values past the row's end are the last
    // one.
    template <class Visit>
    __device__ void first_visit(const Visit& visit) {
        const int stride = static_cast<int>(blockDim.x);
        int v = begin_ + static_cast<int>(threadIdx.x);
        uint4 next = v < end_ ? loaded(v) : uint4{};
#pragma unroll 1
        for (; v < end_; v += stride) {
            const uint4 raw = next;
            if (v + stride < end_) next = loaded(v + stride);  // under way while this one is worked on
            if (v - begin_ < room_) kept_[v - begin_] = raw;
            visit(unpacked(raw), v * kWidth);
        }
    }

    template <class Visit>
    __device__ void visit_again(const Visit& visit) const {
#pragma unroll 1
        for (int v = begin_ + static_cast<int>(threadIdx.x); v < end_; v += static_cast<int>(blockDim.x))
            visit(unpacked(v - begin_ < room_ ? kept_[v - begin_] : loaded(v)), v * kWidth);
    }

    __device__ bool holds(int token) const { return token < size_; }

  private:
    static __device__ int boundary(int size, int part, int parts) {
        return static_cast<int>(static_cast<int64_t>((size + kWidth - 1) / kWidth) * part / parts);
    }

    static __device__ uint32_t bits(float value) { return float_bits(value); }
    static __device__ uint32_t bits(uint16_t value) { return value; }

    // A word holds one float or two bfloat16 numbers, the first one in its lower half.
    __device__ uint4 loaded(int v) const {
        const int token = v * kWidth;
        if (aligned_ && token + kWidth <= size_) return *reinterpret_cast<const uint4*>(row_ + token);
        return {word(token, 0), word(token, 1), word(token, 2), word(token, 3)};
    }
    __device__ uint32_t word(int token, int i) const {
        constexpr int kPerWord = kWidth / 4;
        const uint32_t first = element(token + kPerWord * i);
        return kPerWord == 1 ? first : first | element(token + 2 * i + 1) << 16;
    }
    __device__ uint32_t element(int token) const { return bits(row_[token < size_ ? token : size_ - 1]); }

    static __device__ Vector unpacked(const uint4& raw) {
        if constexpr (kWidth == 4)
            return {{bits_float(raw.x), bits_float(raw.y), bits_float(raw.z), bits_float(raw.w)}};
        else
            return {
                {low(raw.x), high(raw.x), low(raw.y), high(raw.y), low(raw.z), high(raw.z), low(raw.w), high(raw.w)}};
    }
    static __device__ float low(uint32_t pair) { return bits_float(pair << 16); }
    static __device__ float high(uint32_t pair) { return bits_float(pair & 0xFFFF0000u); }

    const Logit* row_;
    int size_;
    bool aligned_;
    int begin_, end_;  // in vectors
    uint4* kept_;
    int room_;
};

// How a row is laid out over a cluster: the fewest blocks of which an SM holds two; if there are none, all that the GPU
// has, and what does not fit is read again.
struct RowPlan {
    int threads, cluster;
    int room;  // vectors of 16 bytes
};

inline RowPlan plan_rows(const Device& device, int64_t row_bytes, int64_t fixed_bytes) {
    const int64_t vectors = (row_bytes + 15) / 16;
    const int most = device.has_clusters ? kMostCluster : 1;
    const int64_t half = device.shared / 2 - 1024;  // the driver takes 1 KB of each block's
    int cluster = 1;
    const auto needed = [&] { return fixed_bytes + 16 * ((vectors + cluster - 1) / cluster); };
    while (cluster < most && needed() > half) cluster *= 2;
    const int64_t room = (device.block_shared - fixed_bytes) / 16, part = (vectors + cluster - 1) / cluster;
    return {device.threads, cluster, static_cast<int>(part < room ? part : room)};
}

}  // namespace pmc::cuda
