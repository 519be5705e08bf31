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

// Beyond this square the sigmoid in GELU's approximation is 0 or 1: the slope of its argument no longer counts, and may
// overflow.
constexpr float kGeluLargestSquare = 128;

constexpr float kDensity = 0.398942280f;  // of the normal distribution, at 0

struct Activated {
    Floats y, slope;  // an activation and its derivative
};

// x * s, where s is a sigmoid whose argument has the given slope.
inline Activated gated(Floats x, Floats s, Floats slope) { return {x * s, s + x * s * (1.0f - s) * slope}; }

template <Activation Kind>
inline Activated activated(Floats x) {
    if constexpr (Kind == Activation::kSilu) {
        return gated(x, sigmoid(x), broadcast(1));
    } else if constexpr (Kind == Activation::kGeluTanh) {
        const Floats square = x * x, largest = broadcast(kGeluLargestSquare);
        return gated(x, gelu_tanh_gate(x),
                     kGeluSlope * (1.0f + 3 * kGeluCubic * (square > largest ? largest : square)));
    } else if constexpr (Kind == Activation::kGelu) {
        const Floats density = bell(x), gate = gelu_gate(x, density);
        return {x * gate, gate + x * density * kDensity};
    } else {
        const Floats slope = x <= 0 ? Floats{} : broadcast(1);
        return {x < 0 ? Floats{} : x, x == x ? slope : x};
    }
}

// Calls body with the kind as a constant.
template <class Body>
void for_activation(Activation kind, const Body& body) {
    switch (kind) {
        case Activation::kSilu:
            return body(std::integral_constant<Activation, Activation::kSilu>{});
        case Activation::kGelu:
            return body(std::integral_constant<Activation, Activation::kGelu>{});
        case Activation::kGeluTanh:
            return body(std::integral_constant<Activation, Activation::kGeluTanh>{});
        case Activation::kRelu:
            return body(std::integral_constant<Activation, Activation::kRelu>{});
    }
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
