// Attention of one query token per row over its keys and values: those it shares with other rows, then its own.
#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/row.h"

namespace pmc::PMC_ISA {
namespace {

// Heads that share keys and values are taken a few at a time, so that what they sum stays in registers.
constexpr int kHeadsAtOnce = 4;
// Enough dot products at a time to keep the multipliers busy.
constexpr int kPositionsAtOnce = 8;
constexpr int64_t kLineBytes = 64;

// Consecutive positions of one key/value head.
template <class T>
struct Segment {
    const T *key, *value;
    int64_t key_stride, value_stride, positions;
};

template <class T>
void to_floats(const T* from, int64_t size, float scale, float* to) {
    for (int64_t i = 0; i < size; ++i) to[i] = widen(from[i]) * scale;
}

// scores[t] = query . key[t]. Values that `fetches` asks for come from memory meanwhile.
template <class T>
void dot_products(const float* query, int64_t dim, const Segment<T>& segment, bool fetches, float* scores) {
    const auto [key, value, key_stride, value_stride, positions] = segment;
    int64_t t = 0;
    for (; t + kPositionsAtOnce <= positions; t += kPositionsAtOnce) {
        for (int p = 0; fetches && p < kPositionsAtOnce; ++p)
            for (int64_t i = 0; i < dim; i += kLineBytes / sizeof(T))
                __builtin_prefetch(value + (t + p) * value_stride + i);
        Floats sums[kPositionsAtOnce / 4][4] = {};
        const T* keys = key + t * key_stride;
        int64_t i = 0;
        for (; i + kLanes <= dim; i += kLanes) {
            const Floats q = load(query + i);
            for (int p = 0; p < kPositionsAtOnce; ++p) sums[p / 4][p % 4] += q * load(keys + p * key_stride + i);
        }
        for (int p = 0; p < kPositionsAtOnce; p += 4) horizontal_sums(sums[p / 4], scores + t + p);
        for (; i < dim; ++i)
            for (int p = 0; p < kPositionsAtOnce; ++p) scores[t + p] += query[i] * widen(keys[p * key_stride + i]);
    }
    for (; t < positions; ++t) {
        Floats sums{};
        const T* k = key + t * key_stride;
        int64_t i = 0;
        for (; i + kLanes <= dim; i += kLanes) sums += load(query + i) * load(k + i);
        float sum = horizontal_sum_float(sums);
        for (; i < dim; ++i) sum += query[i] * widen(k[i]);
        scores[t] = sum;
    }
}

// The scores become probabilities; returns false if one of them is no number.
bool softmax(float* scores, int64_t positions, float softcap) {
    if (softcap > 0) {
        int64_t t = 0;
        for (; t + kLanes <= positions; t += kLanes) store(scores + t, softcap * tanh(load(scores + t) / softcap));
        for (; t < positions; ++t) scores[t] = softcap * std::tanh(scores[t] / softcap);
    }
    float top;
    if (!finite_max(scores, positions, &top)) return false;
    float sum = 0;
    Floats sums{};
    int64_t t = 0;
    for (; t + kLanes <= positions; t += kLanes) {
        const Floats e = exp_nonpositive(load(scores + t) - top);
        sums += e;
        store(scores + t, e);
    }
    for (; t < positions; ++t) sum += scores[t] = std::exp(scores[t] - top);
    const float inverse = 1 / (sum + horizontal_sum_float(sums));
    for (t = 0; t < positions; ++t) scores[t] *= inverse;
    return true;
}

// out[h * dim + i] = sum over t of probability[h * stride + t] * value[t][i], h < Heads, for Vectors vectors from i on.
template <int Heads, int Vectors, class T>
void weighted_sum_part(const float* probability, int64_t stride, const Segment<T> (&segments)[2], int64_t dim,
                       int64_t i, T* out) {
    Floats sums[Heads][Vectors] = {};
    const float* p = probability;
    for (const Segment<T>& segment : segments) {
        const T* v = segment.value + i;
        for (int64_t t = 0; t < segment.positions; ++t, ++p, v += segment.value_stride) {
            Floats values[Vectors];
            for (int n = 0; n < Vectors; ++n) values[n] = load(v + n * kLanes);
            for (int h = 0; h < Heads; ++h)
                for (int n = 0; n < Vectors; ++n) sums[h][n] += p[h * stride] * values[n];
        }
    }
    for (int h = 0; h < Heads; ++h)
        for (int n = 0; n < Vectors; ++n) store(out + h * dim + i + n * kLanes, sums[h][n]);
}

template <int Heads, class T>
void weighted_sum(const float* probability, int64_t stride, const Segment<T> (&segments)[2], int64_t dim, T* out) {
    constexpr int kVectors = Heads == kHeadsAtOnce ? 2 : 4;  // as many as the registers hold sums for
    int64_t i = 0;
    for (; i + kVectors * kLanes <= dim; i += kVectors * kLanes)
        weighted_sum_part<Heads, kVectors>(probability, stride, segments, dim, i, out);
    for (; i + kLanes <= dim; i += kLanes) weighted_sum_part<Heads, 1>(probability, stride, segments, dim, i, out);
    for (; i < dim; ++i) {
        for (int h = 0; h < Heads; ++h) {
            float sum = 0;
            const float* p = probability + h * stride;
            for (const Segment<T>& segment : segments)
                for (int64_t t = 0; t < segment.positions; ++t)
                    sum += *p++ * widen(segment.value[t * segment.value_stride + i]);
            from_float(out + h * dim + i, sum);
        }
    }
}

template <int Heads, class T>
bool attend(const DecodeAttentionArgs& args, const T* query, const Segment<T> (&segments)[2], T* out, float* scratch) {
    const int64_t stride = args.prefix.length + args.own.length;
    float* const q = scratch + Heads * stride;
    to_floats(query, Heads * args.dim, args.scale, q);
    int64_t positions = 0;
    for (const Segment<T>& segment : segments) {
        for (int h = 0; h < Heads; ++h)
            dot_products(q + h * args.dim, args.dim, segment, h == 0, scratch + h * stride + positions);
        positions += segment.positions;
    }
    for (int h = 0; h < Heads; ++h)
        if (!softmax(scratch + h * stride, positions, args.softcap)) return false;
    weighted_sum<Heads>(scratch, stride, segments, args.dim, out);
    return true;
}

// Positions [skipped, length) of one row and head.
template <class T>
Segment<T> segment(const CachedPositions& from, int64_t row, int64_t kv_head, int64_t skipped, int64_t length) {
    const auto at = [&](const void* base, const CacheStrides& stride) {
        return static_cast<const T*>(base) + row * stride.row + kv_head * stride.head + skipped * stride.position;
    };
    if (skipped >= length) return {nullptr, nullptr, 0, 0, 0};
    return {at(from.key, from.key_stride), at(from.value, from.value_stride), from.key_stride.position,
            from.value_stride.position, length - skipped};
}

template <class T>
bool decode_attention_heads(const DecodeAttentionArgs& args, int64_t row, int64_t kv_head, float* scratch) {
    const int64_t group = args.heads / args.kv_heads, first = args.first[row];
    const Segment<T> segments[2] = {
        segment<T>(args.prefix, args.prefix_row ? args.prefix_row[row] : 0, kv_head, first, args.prefix.length),
        segment<T>(args.own, row, kv_head, std::max<int64_t>(0, first - args.prefix.length),
                   args.length ? args.length[row] : args.own.length)};
    const int64_t begin = (row * args.heads + kv_head * group) * args.dim;
    const T* query = static_cast<const T*>(args.query) + begin;
    T* out = static_cast<T*>(args.out) + begin;
    bool finite = true;
    for (int64_t done = 0; done < group && finite;) {
        const int64_t left = group - done;
        const T* q = query + done * args.dim;
        T* o = out + done * args.dim;
        if (left >= kHeadsAtOnce) {
            finite = attend<kHeadsAtOnce>(args, q, segments, o, scratch);
            done += kHeadsAtOnce;
        } else if (left == 3) {
            finite = attend<3>(args, q, segments, o, scratch);
            done += 3;
        } else if (left == 2) {
            finite = attend<2>(args, q, segments, o, scratch);
            done += 2;
        } else {
            finite = attend<1>(args, q, segments, o, scratch);
            done += 1;
        }
    }
    return finite;
}

}  // namespace

int64_t decode_attention(const DecodeAttentionArgs& args) {
    int64_t bad_row = kAllRowsFinite;
    const int64_t slice = decode_attention_workspace_floats(args.prefix.length + args.own.length, args.dim);
    parallel_for(args.rows * args.kv_heads, args.threads, [&](int64_t task, int thread) {
        const int64_t row = task / args.kv_heads, kv_head = task % args.kv_heads;
        float* const scratch = static_cast<float*>(args.workspace) + thread * slice;
        const bool ok = args.dtype == Dtype::kFloat32 ? decode_attention_heads<float>(args, row, kv_head, scratch)
                                                      : decode_attention_heads<uint16_t>(args, row, kv_head, scratch);
        if (!ok) {
#pragma omp critical
            if (bad_row == kAllRowsFinite || row < bad_row) bad_row = row;
        }
    });
    return bad_row;
}

}  // namespace pmc::PMC_ISA
