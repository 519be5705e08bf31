// One row of logits: loading it as floats, its maximum, its sum of exponentials.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pmc::PMC_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Sums are taken in float over this many elements and in double beyond.
constexpr int64_t kSumBlock = 2048;

inline Floats transform(Floats z, const HeadTransform& head) {
    z = z * head.logit_scale;
    if (head.softcap == 0) return z;
    return head.softcap * tanh(z / head.softcap);
}

inline float transform(float z, const HeadTransform& head) {
    z *= head.logit_scale;
    return head.softcap > 0 ? head.softcap * std::tanh(z / head.softcap) : z;
}

// The row as float logits after the head's transform: in place where nothing changes, else in `scratch`.
inline const float* as_logits(const float* row, int64_t size, const HeadTransform& head, float* scratch) {
    if (head.logit_scale == 1 && head.softcap == 0) return row;
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(scratch + i, transform(load(row + i), head));
    for (; i < size; ++i) scratch[i] = transform(row[i], head);
    return scratch;
}

inline const float* as_logits(const uint16_t* row, int64_t size, const HeadTransform& head, float* scratch) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(scratch + i, transform(load(row + i), head));
    for (; i < size; ++i) scratch[i] = transform(widen(row[i]), head);
    return scratch;
}

// The row's maximum; false if it holds NaN.
inline bool ordered_max(const float* row, int64_t size, float* maximum) {
    float best = -kInfinity;
    bool ordered = true;  // NaN compares unequal to itself
    int64_t i = 0;
    if (size >= 4 * kLanes) {
        Floats m0 = broadcast(-kInfinity), m1 = m0, m2 = m0, m3 = m0;
        Ints same = Ints{} == Ints{};
        for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
            const Floats a = load(row + i), b = load(row + i + kLanes), c = load(row + i + 2 * kLanes),
                         d = load(row + i + 3 * kLanes);
            same &= (a == a) & (b == b) & (c == c) & (d == d);
            m0 = max(a, m0);
            m1 = max(b, m1);
            m2 = max(c, m2);
            m3 = max(d, m3);
        }
        best = horizontal_max(max(max(m0, m1), max(m2, m3)));
        ordered = lanes_true(~same) == 0;
    }
    for (; i < size; ++i) {
        ordered = ordered && row[i] == row[i];
        best = row[i] > best ? row[i] : best;
    }
    *maximum = best;
    return ordered;
}

// The row's maximum; false if it holds NaN or +inf, or nothing but -inf.
inline bool finite_max(const float* row, int64_t size, float* maximum) {
    return ordered_max(row, size, maximum) && *maximum < kInfinity && *maximum > -kInfinity;
}

// sum over i of exp(row[i] / temperature - shift), shift being no less than the largest row[i] / temperature. Each term
// is also given to visit(i, term), Floats of them or a float, and what is visited may be written over.
template <class Visit>
inline double sum_exp(const float* row, int64_t size, float temperature, float shift, const Visit& visit) {
    const auto visited = [&visit](int64_t i, Floats terms) {
        visit(i, terms);
        return terms;
    };
    double total = 0;
    for (int64_t begin = 0; begin < size; begin += kSumBlock) {
        const int64_t end = begin + kSumBlock < size ? begin + kSumBlock : size;
        Floats s0{}, s1{};
        int64_t i = begin;
        if (temperature == 1) {
            for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
                s0 += visited(i, exp_nonpositive(load(row + i) - shift));
                s1 += visited(i + kLanes, exp_nonpositive(load(row + i + kLanes) - shift));
            }
        } else {
            for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
                s0 += visited(i, exp_nonpositive(load(row + i) / temperature - shift));
                s1 += visited(i + kLanes, exp_nonpositive(load(row + i + kLanes) / temperature - shift));
            }
        }
        for (; i < end; ++i) {
            const float term = std::exp(row[i] / temperature - shift);
            visit(i, term);
            total += term;
        }
        total += horizontal_sum(s0 + s1);
    }
    return total;
}

inline double sum_exp(const float* row, int64_t size, float temperature, float shift) {
    return sum_exp(row, size, temperature, shift, [](int64_t, auto) {});
}

}  // namespace
}  // namespace pmc::PMC_ISA
