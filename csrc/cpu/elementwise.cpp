// What a decoder layer does to its rows between the products: normalise, rotate, gate.
#include <algorithm>
#include <cmath>
#include <limits>

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
void normalize_row(const NormalizeArgs& args, const float* x, float* y) {
    const float count = static_cast<float>(args.size);
    const float mean = args.centered ? sum<1>(x, args.size, 0) / count : 0;
    const float factor = 1 / std::sqrt(sum<2>(x, args.size, mean) / count + args.epsilon);
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

inline Floats sigmoid(Floats x) {
    const Floats e = exp_nonpositive(x < 0 ? x : -x);  // of -|x|, which does not overflow
    const Floats result = (x < 0 ? e : broadcast(1)) / (1.0f + e);
    return x == x ? result : x;
}

inline Floats activated(Activation activation, Floats x) {
    if (activation == Activation::kSilu) return x * sigmoid(x);
    return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));  // 2 sqrt(2 / pi): half of 1 + tanh is a sigmoid
}

void activate_row(const ActivateArgs& args, float* x, const float* up) {
    int64_t i = 0;
    for (; i + kLanes <= args.size; i += kLanes) {
        const Floats y = activated(args.activation, load(x + i));
        store(x + i, up ? y * load(up + i) : y);
    }
    for (; i < args.size; ++i) {
        const float y = activated(args.activation, broadcast(x[i]))[0];
        x[i] = up ? y * up[i] : y;
    }
}

// A NaN becomes one that survives rounding to bfloat16.
inline Floats roundable(Floats x) { return x == x ? x : broadcast(std::numeric_limits<float>::quiet_NaN()); }
inline float roundable(float x) { return x == x ? x : std::numeric_limits<float>::quiet_NaN(); }

// The first `rotated` elements as pairs half of that apart, turned by the row's angles; the rest as it is.
template <class T>
void rotate_head(const float* x, const float* cosine, const float* sine, int64_t rotated, int64_t dim, T* y) {
    const int64_t half = rotated / 2;
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const Floats a = load(x + i), b = load(x + half + i);
        store(y + i, roundable(a * load(cosine + i) - b * load(sine + i)));
        store(y + half + i, roundable(b * load(cosine + half + i) + a * load(sine + half + i)));
    }
    for (; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        from_float(y + i, roundable(a * cosine[i] - b * sine[i]));
        from_float(y + half + i, roundable(b * cosine[half + i] + a * sine[half + i]));
    }
    for (i = rotated; i < dim; ++i) from_float(y + i, roundable(x[i]));
}

template <class T>
void rotate_row(const RotateArgs& args, int64_t row) {
    const float* x = args.x + row * args.x_stride;
    const float *cosine = args.cosine + row * args.rotated, *sine = args.sine + row * args.rotated;
    T* y = static_cast<T*>(args.y) + row * args.y_row_stride;
    for (int64_t head = 0; head < args.heads; ++head)
        rotate_head(x + head * args.dim, cosine, sine, args.rotated, args.dim, y + head * args.y_head_stride);
}

}  // namespace

void normalize(const NormalizeArgs& args) {
    for_rows(args.rows, args.threads,
             [&](int64_t row) { normalize_row(args, args.x + row * args.x_stride, args.y + row * args.y_stride); });
}

void activate(const ActivateArgs& args) {
    for_rows(args.rows, args.threads, [&](int64_t row) {
        activate_row(args, args.x + row * args.stride, args.up ? args.up + row * args.stride : nullptr);
    });
}

void rotate(const RotateArgs& args) {
    for_rows(args.rows, args.threads, [&](int64_t row) {
        args.dtype == Dtype::kFloat32 ? rotate_row<float>(args, row) : rotate_row<uint16_t>(args, row);
    });
}

}  // namespace pmc::PMC_ISA
