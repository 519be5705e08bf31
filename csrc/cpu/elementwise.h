// What the elementwise kernels and their gradients share: rows over threads, vectors with what is left of one,
// activations.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pmc::PMC_ISA {
namespace {

// Rows that one thread takes at a time, so that handing them out costs little.
constexpr int64_t kRowsAtOnce = 8;

template <class Body>
void for_rows(int64_t rows, int threads, const Body& body) {
    parallel_for((rows + kRowsAtOnce - 1) / kRowsAtOnce, threads, [&](int64_t part, int) {
        for (int64_t row = part * kRowsAtOnce; row < std::min(rows, (part + 1) * kRowsAtOnce); ++row) body(row);
    });
}

inline Floats sigmoid(Floats x) {
    const Floats e = exp_nonpositive(x < 0 ? x : -x);  // of -|x|, which does not overflow
    const Floats result = (x < 0 ? e : broadcast(1)) / (1.0f + e);
    return x == x ? result : x;
}

constexpr float kGeluSlope = 1.59576912f;  // 2 sqrt(2 / pi): half of 1 + tanh is a sigmoid
constexpr float kGeluCubic = 0.044715f;

inline Floats gelu_tanh_gate(Floats x) { return sigmoid(kGeluSlope * (x + kGeluCubic * x * x * x)); }

inline Floats bell(Floats x) { return exp_nonpositive(x * x * -0.5f); }

// The mass of the normal distribution below x. Below -|x| it is bell(x) t P(t) with t = 1 / (1 + kMassScale |x|); P was
// fitted for |x| up to 13, with a relative error of 8e-8.
constexpr float kMassScale = 0.304055916f;
inline Floats gelu_gate(Floats x, Floats bell_of_x) {
    const Floats t = 1.0f / (1.0f + kMassScale * (x < 0 ? -x : x));
    Floats p = broadcast(3.68539567e-2f);
    p = p * t - 1.55186675e-1f;
    p = p * t + 1.91852838e-1f;
    p = p * t - 4.28628756e-2f;
    p = p * t + 1.23422225e-1f;
    p = p * t + 1.02475547e-1f;
    p = p * t + 1.22187722e-1f;
    p = p * t + 1.21257304e-1f;
    const Floats below = bell_of_x * t * p, result = x < 0 ? below : 1.0f - below;
    return x == x ? result : x;
}

// Calls body(i, count) for each vector of [0, size); count is known to the compiler but for what is left at the end.
template <class Body>
void for_lanes(int64_t size, const Body& body) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) body(i, std::integral_constant<int64_t, kLanes>{});
    if (i < size) body(i, size - i);
}

// The first `count` lanes; the others are 0.
__attribute__((always_inline)) inline Floats load(const float* from, int64_t count) {
    Floats v{};
    std::memcpy(&v, from, static_cast<size_t>(count) * sizeof(float));
    return v;
}
__attribute__((always_inline)) inline void store(float* to, Floats v, int64_t count) {
    std::memcpy(to, &v, static_cast<size_t>(count) * sizeof(float));
}

}  // namespace
}  // namespace pmc::PMC_ISA
