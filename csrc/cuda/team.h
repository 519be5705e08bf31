// The threads that share a row, those of a cluster of blocks: what they wait for, reduce and scan together.
#pragma once

#include "common/host_device.h"
#include "cuda/device.h"

namespace pmc::cuda {

// In every block's shared memory.
struct Exchange {
    uint64_t warp[2][kMostThreads / kWarp];
    uint64_t scanned[kMostThreads / kWarp];
};

struct Larger {
    __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};
struct Sum {
    __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};

class Team {
  public:
    explicit __device__ Team(Exchange* exchange) : exchange_(exchange) {}

    __device__ int thread() const { return static_cast<int>(threadIdx.x); }
    __device__ int threads() const { return static_cast<int>(blockDim.x); }
    __device__ int warps() const { return threads() / kWarp; }
    __device__ int warp() const { return thread() / kWarp; }
    __device__ int lane() const { return thread() % kWarp; }
    __device__ int block() const { return cluster_rank(); }
    __device__ int blocks() const { return cluster_size(); }
    __device__ bool leads() const { return block() == 0 && thread() == 0; }

    // The largest of all threads' values, or their sum; every thread gets it. What they wrote before is then seen by
    // all.
    __device__ uint64_t largest(uint64_t value) { return reduced(value, Larger{}); }
    __device__ uint64_t sum(uint64_t value) { return reduced(value, Sum{}); }

    // The sum of the values of a block's threads before this one; the block waits before the next call.
    __device__ uint64_t sum_before(uint64_t value) {
        uint64_t through = value;
        for (int distance = 1; distance < kWarp; distance *= 2) {
            const uint64_t lower = __shfl_up_sync(kAllLanes, through, static_cast<unsigned>(distance));
            if (lane() >= distance) through += lower;
        }
        if (lane() == kWarp - 1) exchange_->scanned[warp()] = through;
        __syncthreads();
        uint64_t before = through - value;
        for (int earlier = 0; earlier < warp(); ++earlier) before += exchange_->scanned[earlier];
        return before;
    }

  private:
    template <class Reduce>
    __device__ uint64_t in_warp(uint64_t value, const Reduce& reduce) {
        for (int distance = kWarp / 2; distance > 0; distance /= 2)
            value = reduce(value, __shfl_xor_sync(kAllLanes, value, distance));
        return value;
    }

    template <class Reduce>
    __device__ uint64_t reduced(uint64_t value, const Reduce& reduce) {
        value = in_warp(value, reduce);
        // Nobody reads these places any more: whoever is here has passed the barrier after their last use but one.
        uint64_t* const places = exchange_->warp[turn_ ^= 1];
        if (lane() == 0) places[warp()] = value;
        sync_cluster();
        uint64_t all = 0;  // neutral for both
        for (int i = lane(); i < blocks() * warps(); i += kWarp)
            all = reduce(all, peer(places, i / warps())[i % warps()]);
        return in_warp(all, reduce);
    }

    Exchange* exchange_;
    int turn_ = 0;
};

}  // namespace pmc::cuda
