// Attention of one query token per row over its keys and values: those it shares with other rows, then its own.
#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/prefix_attention.h"

namespace pmc::PMC_ISA {
namespace {

// Enough dot products at a time to keep the multipliers busy.
constexpr int kPositionsAtOnce = 8;
constexpr int64_t kLineBytes = 64;

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

void soften(float* scores, int64_t positions, float softcap) {
    int64_t t = 0;
    for (; t + kLanes <= positions; t += kLanes) store(scores + t, softcap * tanh(load(scores + t) / softcap));
    for (; t < positions; ++t) scores[t] = softcap * std::tanh(scores[t] / softcap);
}

// The scores become probabilities; returns false if one of them is no number.
bool softmax(float* scores, int64_t positions) {
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

// out[h * dim + i] = sum over t of probability[h * stride + t] * value[t][i], h < Heads, for Vectors vectors from i on;
// the first of them is the summary's, if there is one.
template <int Heads, int Vectors, class T>
void weighted_sum_part(const float* probability, int64_t stride, const Summary& summary,
                       const Segment<T> (&segments)[2], int64_t dim, int64_t i, T* out) {
    Floats sums[Heads][Vectors] = {};
    const float* p = probability;
    if (summary.score) {
        for (int h = 0; h < Heads; ++h)
            for (int n = 0; n < Vectors; ++n)
                sums[h][n] = p[h * stride] * load(summary.value + h * summary.stride + i + n * kLanes);
        ++p;
    }
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
void weighted_sum(const float* probability, int64_t stride, const Summary& summary, const Segment<T> (&segments)[2],
                  int64_t dim, T* out) {
    constexpr int kVectors = Heads == kHeadsAtOnce ? 2 : 4;  // as many as the registers hold sums for
    int64_t i = 0;
    for (; i + kVectors * kLanes <= dim; i += kVectors * kLanes)
        weighted_sum_part<Heads, kVectors>(probability, stride, summary, segments, dim, i, out);
    for (; i + kLanes <= dim; i += kLanes)
        weighted_sum_part<Heads, 1>(probability, stride, summary, segments, dim, i, out);
    for (; i < dim; ++i) {
        for (int h = 0; h < Heads; ++h) {
            const float* p = probability + h * stride;
            float sum = summary.score ? *p++ * summary.value[h * summary.stride + i] : 0;
            for (const Segment<T>& segment : segments)
                for (int64_t t = 0; t < segment.positions; ++t)
                    sum += *p++ * widen(segment.value[t * segment.value_stride + i]);
            from_float(out + h * dim + i, sum);
        }
    }
}

template <int Heads, class T>
bool attend(const DecodeAttentionArgs& args, const T* query, const Segment<T> (&segments)[2], const Summary& summary,
            T* out, float* scratch) {
    const int64_t stride = args.prefix.length + args.own.length;
    float* const q = scratch + Heads * stride;
    to_floats(query, Heads * args.dim, args.scale, q);
    const int64_t summaries = summary.score ? 1 : 0;
    int64_t positions = summaries;
    for (const Segment<T>& segment : segments) {
        for (int h = 0; h < Heads; ++h)
            dot_products(q + h * args.dim, args.dim, segment, h == 0, scratch + h * stride + positions);
        positions += segment.positions;
    }
    for (int h = 0; h < Heads; ++h) {
        float* const scores = scratch + h * stride;
        if (summaries) scores[0] = summary.score[h];
        if (args.softcap > 0) soften(scores + summaries, positions - summaries, args.softcap);
        if (!softmax(scores, positions)) return false;
    }
    weighted_sum<Heads>(scratch, stride, summary, segments, args.dim, out);
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

// The rows of a set, or one row.
struct RowSet {
    const int64_t* row;
    int64_t count;
};

// `Heads` heads from `head` on, all of which have the keys of kv_head.
template <int Heads, class T, class OnBadRow>
void attend_rows(const DecodeAttentionArgs& args, const RowSet& set, int64_t kv_head, int64_t head, Scratch scratch,
                 const OnBadRow& on_bad_row) {
    const auto at = [&](int64_t i, int64_t h) { return (set.row[i] * args.heads + head + h) * args.dim; };
    const T* const query = static_cast<const T*>(args.query);
    const int64_t first = args.first[set.row[0]];
    Segment<T> prefix =
        segment<T>(args.prefix, args.prefix_row ? args.prefix_row[set.row[0]] : 0, kv_head, first, args.prefix.length);
    Summary summary{};
    if (worth_sharing(set.count * Heads, prefix.positions)) {
        const auto query_at = [&](int64_t q) { return query + at(q / Heads, q % Heads); };
        summary = attend_together(args, prefix, set.count * Heads, query_at, scratch);
        prefix = {};
    }
    for (int64_t i = 0; i < set.count; ++i) {
        const int64_t row = set.row[i];
        const Segment<T> segments[2] = {
            prefix, segment<T>(args.own, row, kv_head, std::max<int64_t>(0, first - args.prefix.length),
                               args.length ? args.length[row] : args.own.length)};
        T* const out = static_cast<T*>(args.out) + at(i, 0);
        if (!attend<Heads>(args, query + at(i, 0), segments, summary.after(i * Heads), out, scratch.at))
            on_bad_row(row);
    }
}

template <int Heads, class T, class OnBadRow>
void attend_rows(int64_t heads, const DecodeAttentionArgs& args, const RowSet& set, int64_t kv_head, int64_t head,
                 const Scratch& scratch, const OnBadRow& on_bad_row) {
    if (heads == Heads) return attend_rows<Heads, T>(args, set, kv_head, head, scratch, on_bad_row);
    if constexpr (Heads > 1) attend_rows<Heads - 1, T>(heads, args, set, kv_head, head, scratch, on_bad_row);
}

}  // namespace

int64_t decode_attention(const DecodeAttentionArgs& args) {
    int64_t bad_row = kAllRowsFinite;
    const auto on_bad_row = [&](int64_t row) {
#pragma omp critical
        if (bad_row == kAllRowsFinite || row < bad_row) bad_row = row;
    };
    const Sharers& sharers = args.sharers;
    const int64_t slice = decode_attention_workspace_floats(args.prefix.length + args.own.length, args.dim);
    const int64_t sets = sharers.sets ? sharers.sets : args.rows, group = args.heads / args.kv_heads;
    parallel_for(sets * args.kv_heads, args.threads, [&](int64_t task, int thread) {
        const int64_t index = task / args.kv_heads, kv_head = task % args.kv_heads;
        const RowSet set =
            sharers.sets ? RowSet{sharers.order + sharers.begin[index], sharers.begin[index + 1] - sharers.begin[index]}
                         : RowSet{&index, 1};
        const Scratch scratch = Scratch::from_a_line(static_cast<float*>(args.workspace) + thread * slice);
        for (int64_t done = 0; done < group; done += kHeadsAtOnce) {
            const int64_t head = kv_head * group + done, heads = std::min(kHeadsAtOnce, group - done);
            args.dtype == Dtype::kFloat32
                ? attend_rows<kHeadsAtOnce, float>(heads, args, set, kv_head, head, scratch, on_bad_row)
                : attend_rows<kHeadsAtOnce, uint16_t>(heads, args, set, kv_head, head, scratch, on_bad_row);
        }
    });
    return bad_row;
}

}  // namespace pmc::PMC_ISA
