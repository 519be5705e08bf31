// The part of decode_attention that rows have in common: a prefix is read once for the queries of all rows that share
// it.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/panel.h"

namespace pmc::PMC_ISA {
namespace {

// Consecutive positions of one key/value head.
template <class T>
struct Segment {
    const T *key, *value;
    int64_t key_stride, value_stride, positions;
};

// What attention makes of some positions, for each query: it can be joined with others as one position more.
struct Summary {
    const float* score;  // log(sum(exp(scores))), NaN if one of them is NaN or +inf; null: there is no summary
    const float* value;  // the mean of the values, `stride` apart
    int64_t stride;

    Summary after(int64_t queries) const {
        return score ? Summary{score + queries, value + queries * stride, stride} : Summary{};
    }
};

// A panel of queries all of which see every key.
struct Seeing {
    int64_t queries;
    int64_t columns() const { return (queries + kLanes - 1) / kLanes * kLanes; }
    bool all_see(int64_t) const { return true; }
    Ints see(int64_t, int64_t) const { return Ints{}; }
};

// `query(q)` is where query q lies; there are at most kSharedQueries.
template <class T, class Query>
Summary attend_together(const DecodeAttentionArgs& args, const Segment<T>& segment, int64_t queries, const Query& query,
                        Scratch& scratch) {
    const int64_t padded = packed_attention_padded(args.dim);
    float* const natural = scratch.take(kPanel * padded);
    float* const columns = scratch.take(kSharedQueries * padded);
    float* const out = scratch.take(kSharedQueries * padded);
    float* const key = scratch.take(kKeys * padded);
    float* const value = scratch.take(kKeys * padded);
    float* const scores = scratch.take(kKeys * kPanel);
    float* const top = scratch.take(kSharedQueries);
    float* const mass = scratch.take(kSharedQueries);
    float* const faded = scratch.take(kPanel);
    std::fill_n(out, queries * padded, 0.0f);
    std::fill_n(top, kSharedQueries, -kInfinity);
    std::fill_n(mass, kSharedQueries, 0.0f);
    for (int64_t q = 0; q < queries; q += kPanel) {
        const int64_t count = std::min(kPanel, queries - q);
        for (int64_t i = 0; i < count; ++i) copy_in(query(q + i), args.dim, args.scale, natural + i * padded, padded);
        std::fill_n(natural + count * padded, (kPanel - count) * padded, 0.0f);
        transpose_panel(natural, padded, columns + q * padded);
    }
    for (int64_t begin = 0; begin < segment.positions; begin += kKeys) {
        const int64_t keys = std::min(kKeys, segment.positions - begin);
        for (int64_t j = 0; j < keys; ++j) {
            copy_in(segment.key + (begin + j) * segment.key_stride, args.dim, 1, key + j * padded, padded);
            copy_in(segment.value + (begin + j) * segment.value_stride, args.dim, 1, value + j * padded, padded);
        }
        for (int64_t q = 0; q < queries; q += kPanel) {
            const Seeing panel{std::min(kPanel, queries - q)};
            for_each_tile(keys, [&](int64_t a, int64_t b) {
                multiply_rows({key + a * padded, padded, 1, columns + q * padded, kPanel, scores + a * kPanel, kPanel,
                               args.dim, false},
                              b - a, 0, panel.columns());
            });
            softmax(panel, 0, keys, begin, args.softcap, scores, top + q, mass + q, faded);
            float* const to = out + q * padded;
            for (int64_t i = 0; begin > 0 && i < panel.queries; ++i)
                copy_in(to + i * padded, padded, faded[i], to + i * padded, padded);
            for_each_tile(panel.queries, [&](int64_t a, int64_t b) {
                multiply_rows({scores + a, 1, kPanel, value, padded, to + a * padded, padded, keys, true}, b - a, 0,
                              padded);
            });
        }
    }
    for (int64_t q = 0; q < queries; ++q) {
        const float inverse = mass[q] == 0 ? 0 : 1 / mass[q];  // 0: all scores were -inf
        copy_in(out + q * padded, padded, inverse, out + q * padded, padded);
        top[q] += std::log(mass[q]);
    }
    return {top, out, padded};
}

}  // namespace
}  // namespace pmc::PMC_ISA
