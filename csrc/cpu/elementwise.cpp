// What a decoder layer does to its rows between the products: normalise, rotate, gate.
#include "cpu/elementwise.h"

#include <cmath>
#include <limits>

namespace pmc::PMC_ISA {
namespace {

// sum over i of (x[i] - shift)^power, power 1 or 2.
template <int Power>
float sum(const float* x, int64_t size, float shift) {
    Floats sums{};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        const Floats v = load(x + i) - shift;
        sums += Power == 2 ? v * v : v;
    }
    float total = horizontal_sum_float(sums);
    for (; i < size; ++i) total += Power == 2 ? (x[i] - shift) * (x[i] - shift) : x[i] - shift;
    return total;
}

// y (+)= (x - mean) / sqrt(variance + epsilon) * weight + bias, mean 0 for an RMS norm; x and y may be the same.
void normalize_row(const NormalizeArgs& args, int64_t row) {
    const float* x = args.x + row * args.x_stride;
    float* y = args.y + row * args.y_stride;
    const float count = static_cast<float>(args.size);
    const float mean = args.centered ? sum<1>(x, args.size, 0) / count : 0;
    const float factor = 1 / std::sqrt(sum<2>(x, args.size, mean) / count + args.epsilon);
    if (args.stats) args.stats[2 * row] = mean, args.stats[2 * row + 1] = factor;
    int64_t i = 0;
    for (; i + kLanes <= args.size; i += kLanes) {
        Floats result = (load(x + i) - mean) * factor * load(args.weight + i);
        if (args.bias) result += load(args.bias + i);
        store(y + i, args.accumulate ? load(y + i) + result : result);
    }
    for (; i < args.size; ++i) {
        const float result = (x[i] - mean) * factor * args.weight[i] + (args.bias ? args.bias[i] : 0);
        y[i] = args.accumulate ? y[i] + result : result;
    }
}

template <Activation Kind>
void activate_row(const ActivateArgs& args, int64_t row) {
    const float *x = args.x + row * args.x_stride, *up = args.up ? args.up + row * args.up_stride : nullptr;
    float* to = args.y + row * args.y_stride;
    for_lanes(args.size, [&](int64_t i, auto count) {
        const Floats y = activated<Kind>(load(x + i, count)).y;
        store(to + i, up ? y * load(up + i, count) : y, count);
    });
}

// A NaN becomes one that survives rounding to bfloat16.
inline Floats roundable(Floats x) { return x == x ? x : broadcast(std::numeric_limits<float>::quiet_NaN()); }
inline float roundable(float x) { return x == x ? x : std::numeric_limits<float>::quiet_NaN(); }

// The pair (a, b) turned, whose elements have cosines and sines of their own; or by the transpose of that matrix.
template <bool Transposed, class F>
inline F turned_low(F a, F b, F low_cosine, F low_sine, F high_sine) {
    return roundable(Transposed ? a * low_cosine + b * high_sine : a * low_cosine - b * low_sine);
}
template <bool Transposed, class F>
inline F turned_high(F a, F b, F high_cosine, F low_sine, F high_sine) {
    return roundable(Transposed ? b * high_cosine - a * low_sine : b * high_cosine + a * high_sine);
}

// The first `rotated` elements as pairs half of that apart, turned by the row's angles; the rest as it is.
template <class T, bool Transposed>
void rotate_head(const float* x, const float* cosine, const float* sine, int64_t rotated, int64_t dim, T* y) {
    const int64_t half = rotated / 2;
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const Floats a = load(x + i), b = load(x + half + i);
        const Floats low_sine = load(sine + i), high_sine = load(sine + half + i);
        store(y + i, turned_low<Transposed>(a, b, load(cosine + i), low_sine, high_sine));
        store(y + half + i, turned_high<Transposed>(a, b, load(cosine + half + i), low_sine, high_sine));
    }
    for (; i < half; ++i) {
        const float a = x[i], b = x[half + i], low_sine = sine[i], high_sine = sine[half + i];
        from_float(y + i, turned_low<Transposed>(a, b, cosine[i], low_sine, high_sine));
        from_float(y + half + i, turned_high<Transposed>(a, b, cosine[half + i], low_sine, high_sine));
    }
    for (i = rotated; i < dim; ++i) from_float(y + i, roundable(x[i]));
}

template <class T, bool Transposed>
void rotate_rows(const RotateArgs& args) {
    for_rows(args.rows, args.threads, [&](int64_t row) {
        const float* x = args.x + row * args.x_row_stride;
        const float *cosine = args.cosine + row * args.rotated, *sine = args.sine + row * args.rotated;
        T* y = static_cast<T*>(args.y) + row * args.y_row_stride;
        for (int64_t head = 0; head < args.heads; ++head)
            rotate_head<T, Transposed>(x + head * args.x_head_stride, cosine, sine, args.rotated, args.dim,
                                       y + head * args.y_head_stride);
    });
}

}  // namespace

void normalize(const NormalizeArgs& args) {
    for_rows(args.rows, args.threads, [&](int64_t row) { normalize_row(args, row); });
}

void activate(const ActivateArgs& args) {
    for_activation(args.activation, [&](auto kind) {
        for_rows(args.rows, args.threads, [&](int64_t row) { activate_row<decltype(kind)::value>(args, row); });
    });
}

void rotate(const RotateArgs& args) {
    if (args.transposed) return rotate_rows<float, true>(args);
    args.dtype == Dtype::kFloat32 ? rotate_rows<float, false>(args) : rotate_rows<uint16_t, false>(args);
}

}  // namespace pmc::PMC_ISA
