// normalize, activate, rotate and their gradients against the same in double, on rows that lie apart and whose gaps are
// NaN.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "fuzz/fuzz.h"

namespace pmc::fuzz {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

int64_t elements(int64_t rows, int64_t stride, int64_t size) { return rows ? (rows - 1) * stride + size : 0; }

// Rows of random numbers, now and then with an extreme one among them.
Numbers random_rows(Random& random, int64_t rows, int64_t stride, int64_t size, float spread) {
    Numbers x(Dtype::kFloat32, elements(rows, stride, size), kNaN);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < size; ++i) x.set(r * stride + i, random.normal() * spread);
    if (rows && random.one_in(4))
        x.set(random.between(0, rows - 1) * stride + random.between(0, size - 1),
              random.pick({INFINITY, -INFINITY, random.nan(), random.extreme()}));
    return x;
}

std::vector<float> random_floats(Random& random, int64_t size) {
    std::vector<float> x(size);
    for (float& v : x) v = random.normal();
    return x;
}

// Of x, rows so far apart.
void check_gaps(const Case& c, const Numbers& x, const Numbers& before, int64_t rows, int64_t stride, int64_t size) {
    for (int64_t r = 0; r + 1 < rows; ++r)
        for (int64_t at = r * stride + size; at < (r + 1) * stride; ++at)
            if (!x.same_bits(before, at)) c.fail("wrote past row %lld", static_cast<long long>(r));
}

const float* floats(Numbers& x) { return static_cast<const float*>(x.data()); }

void fuzz_normalize(Case& c) {
    Random& random = c.random;
    const int64_t rows = random.between(0, 20), size = random.size(), stride = size + random.between(0, 5);
    const bool centered = random.one_in(2), in_place = random.one_in(2), accumulate = random.one_in(2);
    const bool asked = random.one_in(2);
    const int64_t y_stride = in_place ? stride : size + random.between(0, 5);
    const float epsilon = random.pick({1e-5f, 1e-3f, 1.0f});
    Numbers x = random_rows(random, rows, stride, size, random.pick({1e-3f, 1.0f, 100.0f}));
    const std::vector<float> weight = random_floats(random, size), bias = random_floats(random, size),
                             held = random_floats(random, elements(rows, y_stride, size));
    c.for_each_isa([&] {
        Numbers y = in_place ? x : Numbers(Dtype::kFloat32, elements(rows, y_stride, size), kNaN);
        if (accumulate && !in_place)
            for (int64_t at = 0; at < y.size(); ++at) y.set(at, held[at]);
        const Numbers before = y;
        std::vector<float> stats(asked ? 2 * rows : 0);
        kernels().normalize({in_place ? floats(y) : floats(x), rows, size, stride, weight.data(),
                             centered ? bias.data() : nullptr, epsilon, centered, static_cast<float*>(y.data()),
                             y_stride, accumulate, static_cast<int>(random.between(1, 2)),
                             asked ? stats.data() : nullptr});
        for (int64_t r = 0; r < rows; ++r) {
            double mean = 0, square = 0, largest = 0;
            for (int64_t i = 0; i < size; ++i) mean += static_cast<double>(x.get(r * stride + i)) / size;
            if (!centered) mean = 0;
            for (int64_t i = 0; i < size; ++i) {
                const double d = x.get(r * stride + i) - mean;
                square += d * d / size;
                largest = std::max(largest, std::abs(static_cast<double>(x.get(r * stride + i))));
            }
            const double factor = 1 / std::sqrt(square + epsilon),
                         error = largest * factor * 1e-6 * std::sqrt(size) + 1e-6;
            if (!(largest < 1e15)) continue;  // its square is no float
            if (asked) {
                c.check_near("stats", r, 0, stats[2 * r], mean, largest * 1e-6 * std::sqrt(size));
                c.check_near("stats", r, 1, stats[2 * r + 1], factor, factor * (error + 1e-6));
            }
            for (int64_t i = 0; i < size; ++i) {
                const double added = accumulate ? before.get(r * y_stride + i) : 0;
                const double want = (x.get(r * stride + i) - mean) * factor * weight[i] + (centered ? bias[i] : 0.0);
                c.check_near("y", r, i, y.get(r * y_stride + i), added + want,
                             error * (1 + std::abs(weight[i])) + 1e-6 * std::abs(added));
            }
        }
        check_gaps(c, y, before, rows, y_stride, size);
    });
}

void fuzz_normalize_gradient(Case& c) {
    Random& random = c.random;
    const int64_t rows = random.between(0, 80), size = random.size();
    const int64_t stride = size + random.between(0, 5), x_stride = size + random.between(0, 5);
    const int64_t to_stride = size + random.between(0, 5);
    const bool centered = random.one_in(2), accumulate = random.one_in(2);
    const bool of_weight = random.one_in(2), of_bias = random.one_in(2);
    Numbers grad = random_rows(random, rows, stride, size, random.pick({1e-3f, 1.0f, 100.0f}));
    Numbers x = random_rows(random, rows, x_stride, size, random.pick({1e-3f, 1.0f, 100.0f}));
    const std::vector<float> weight = random_floats(random, size),
                             held = random_floats(random, elements(rows, to_stride, size));
    std::vector<float> stats(2 * rows);
    for (int64_t r = 0; r < rows; ++r)
        stats[2 * r] = centered ? random.normal() : 0, stats[2 * r + 1] = std::abs(random.normal()) + 0.01f;
    c.for_each_isa([&] {
        Numbers to(Dtype::kFloat32, elements(rows, to_stride, size), kNaN);
        if (accumulate)
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t i = 0; i < size; ++i) to.set(r * to_stride + i, held[r * to_stride + i]);
        const Numbers before = to;
        std::vector<float> grad_weight(of_weight ? size : 0, kNaN), grad_bias(of_bias ? size : 0, kNaN),
            workspace((of_weight + of_bias) * normalize_gradient_workspace_floats(rows, size), kNaN);
        kernels().normalize_gradient({floats(grad), floats(x), rows, size, stride, x_stride, stats.data(),
                                      weight.data(), centered, static_cast<float*>(to.data()), to_stride, accumulate,
                                      of_weight ? grad_weight.data() : nullptr, of_bias ? grad_bias.data() : nullptr,
                                      workspace.data(), static_cast<int>(random.between(1, 3))});
        std::vector<double> weight_sum(size), weight_terms(size), bias_sum(size), bias_terms(size);
        for (int64_t r = 0; r < rows; ++r) {
            const double mean = stats[2 * r], factor = stats[2 * r + 1];
            double level = 0, slope = 0, largest_n = 0, largest_g = 0;
            const auto d = [&](int64_t i) { return static_cast<double>(grad.get(r * stride + i)); };
            const auto n = [&](int64_t i) { return (x.get(r * x_stride + i) - mean) * factor; };
            for (int64_t i = 0; i < size; ++i) {
                level += centered ? d(i) * weight[i] / size : 0;
                slope += d(i) * weight[i] * n(i) / size;
                const double terms = (std::abs(x.get(r * x_stride + i)) + std::abs(mean)) * factor;
                largest_n = std::max(largest_n, terms), largest_g = std::max(largest_g, std::abs(d(i) * weight[i]));
                if (!std::isfinite(terms)) largest_n = INFINITY;
                if (!std::isfinite(d(i))) largest_g = INFINITY;
                weight_sum[i] += d(i) * n(i), weight_terms[i] += std::abs(d(i)) * terms;
                bias_sum[i] += d(i), bias_terms[i] += std::abs(d(i));
            }
            const double terms = factor * largest_g * (2 + largest_n * largest_n);
            if (!(terms < 1e30) || !(largest_n < 1e15)) continue;  // no float may hold what is on the way
            for (int64_t i = 0; i < size; ++i) {
                const double added = accumulate ? before.get(r * to_stride + i) : 0;
                c.check_near("grad_x", r, i, to.get(r * to_stride + i),
                             added + factor * (d(i) * weight[i] - level - n(i) * slope),
                             4e-6 * (terms + std::abs(added)) + 1e-30);
            }
        }
        for (int64_t i = 0; i < size; ++i) {
            if (of_weight && weight_terms[i] < 1e30)
                c.check_near("grad_weight", 0, i, grad_weight[i], weight_sum[i], 4e-6 * weight_terms[i] + 1e-30);
            if (of_bias && bias_terms[i] < 1e30)
                c.check_near("grad_bias", 0, i, grad_bias[i], bias_sum[i], 4e-6 * bias_terms[i] + 1e-30);
        }
        check_gaps(c, to, before, rows, to_stride, size);
    });
}

// Far below 0 the limit is 0, or NaN as in torch; or no float holds the result.
bool is_unsure(float x, double want) { return x == -INFINITY || std::abs(want) > std::numeric_limits<float>::max(); }

constexpr Activation kActivations[] = {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu};

// What an activation multiplies x by, and the derivative of that.
std::pair<double, double> gate_of(Activation activation, double x) {
    if (activation == Activation::kRelu) return {x <= 0 ? 0 : x == x ? 1 : x, 0};
    if (activation == Activation::kGelu)
        return {0.5 * std::erfc(-x / std::sqrt(2.0)), 0.3989422804014327 * std::exp(-0.5 * x * x)};
    const bool silu = activation == Activation::kSilu;
    const double scale = 1.5957691216057308, cubic = 0.044715;
    const double gate = 1 / (1 + std::exp(silu ? -x : -scale * (x + cubic * x * x * x)));
    return {gate, gate * (1 - gate) * (silu ? 1 : scale * (1 + 3 * cubic * x * x))};
}

void fuzz_activate(Case& c) {
    Random& random = c.random;
    const int64_t rows = random.between(0, 20), size = random.size(), stride = size + random.between(0, 20);
    const int64_t up_stride = size + random.between(0, 20);
    const bool gated = random.one_in(2), in_place = random.one_in(2);
    const int64_t y_stride = in_place ? stride : size + random.between(0, 20);
    const Activation activation = kActivations[random.between(0, 3)];
    Numbers x = random_rows(random, rows, stride, size, random.pick({0.1f, 3.0f, 50.0f}));
    const std::vector<float> up = random_floats(random, elements(rows, up_stride, size));
    c.for_each_isa([&] {
        const Numbers before = in_place ? x : Numbers(Dtype::kFloat32, elements(rows, y_stride, size), kNaN);
        Numbers y = before;
        kernels().activate({in_place ? floats(y) : floats(x), gated ? up.data() : nullptr, rows, size, stride,
                            up_stride, activation, static_cast<float*>(y.data()), y_stride,
                            static_cast<int>(random.between(1, 2))});
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < size; ++i) {
                const float v = x.get(r * stride + i), factor = gated ? up[r * up_stride + i] : 1;
                const double want = v * gate_of(activation, v).first * factor;
                if (is_unsure(v, want)) continue;
                // The tails come from exponents that float rounds.
                const double error = std::isfinite(v) ? std::abs(v) * 4e-6 + 1e-30 : 0;
                c.check_near("y", r, i, y.get(r * y_stride + i), want, error * std::abs(factor));
            }
        check_gaps(c, y, before, rows, y_stride, size);
    });
}

void fuzz_activate_gradient(Case& c) {
    Random& random = c.random;
    const int64_t rows = random.between(0, 20), size = random.size(), stride = size + random.between(0, 20);
    const int64_t up_stride = size + random.between(0, 20), grad_stride = size + random.between(0, 20);
    const bool gated = random.one_in(2);
    const Activation activation = kActivations[random.between(0, 3)];
    Numbers x = random_rows(random, rows, stride, size, random.pick({0.1f, 3.0f, 50.0f}));
    const std::vector<float> up = random_floats(random, elements(rows, up_stride, size)),
                             grad = random_floats(random, elements(rows, grad_stride, size));
    c.for_each_isa([&] {
        std::vector<float> grad_gate(rows * size, kNaN), grad_up(gated ? rows * size : 0, kNaN);
        kernels().activate_gradient({grad.data(), floats(x), gated ? up.data() : nullptr, rows, size, grad_stride,
                                     stride, up_stride, activation, grad_gate.data(), gated ? grad_up.data() : nullptr,
                                     static_cast<int>(random.between(1, 2))});
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < size; ++i) {
                const float v = x.get(r * stride + i), factor = gated ? up[r * up_stride + i] : 1;
                const double d = grad[r * grad_stride + i];
                const auto [gate, slope] = gate_of(activation, v);
                if (std::isinf(v)) continue;  // NaN, as in torch
                const double size_of = std::min(std::abs(static_cast<double>(v)), 100.0);
                c.check_near("grad_gate", r, i, grad_gate[r * size + i], d * factor * (gate + v * slope),
                             std::abs(d * factor) * (1 + size_of) * 4e-6 + 1e-30);
                if (gated && !is_unsure(v, d * v * gate))
                    c.check_near("grad_up", r, i, grad_up[r * size + i], d * v * gate, std::abs(d * v) * 4e-6 + 1e-30);
            }
    });
}

void fuzz_rotate(Case& c) {
    Random& random = c.random;
    const int64_t rows = random.between(0, 20), heads = random.between(1, 4), dim = random.between(1, 70);
    const int64_t rotated = random.between(0, dim / 2) * 2;
    const int64_t apart = dim + (random.one_in(2) ? random.between(0, 2 * dim) : 0), x_size = (heads - 1) * apart + dim;
    const int64_t x_stride = x_size + random.between(0, 5), head_stride = dim + random.between(0, 5);
    const int64_t y_stride = heads * head_stride + random.between(0, 5);
    const bool transposed = random.one_in(2);
    const Dtype dtype = transposed ? Dtype::kFloat32 : random.pick({Dtype::kFloat32, Dtype::kBFloat16});
    Numbers x(Dtype::kFloat32, elements(rows, x_stride, x_size), kNaN);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < heads * dim; ++i) x.set(r * x_stride + i / dim * apart + i % dim, random.normal());
    if (rows && random.one_in(2))
        x.set(
            random.between(0, rows - 1) * x_stride + random.between(0, heads - 1) * apart + random.between(0, dim - 1),
            random.pick({INFINITY, random.nan(), random.nan()}));
    const std::vector<float> cosine = random_floats(random, rows * rotated),
                             sine = random_floats(random, rows * rotated);
    c.for_each_isa([&] {
        const Numbers before(dtype, elements(rows, y_stride, (heads - 1) * head_stride + dim), kNaN);
        Numbers y = before;
        kernels().rotate({floats(x), rows, heads, dim, x_stride, apart, cosine.data(), sine.data(), rotated, y.data(),
                          y_stride, head_stride, dtype, static_cast<int>(random.between(1, 2)), transposed});
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t h = 0; h < heads; ++h) {
                const auto in = [&](int64_t i) { return static_cast<double>(x.get(r * x_stride + h * apart + i)); };
                for (int64_t i = 0; i < dim; ++i) {
                    const bool low = i < rotated / 2;
                    double want = in(i);
                    if (i < rotated) {
                        const int64_t other = low ? i + rotated / 2 : i - rotated / 2;
                        const double turned = in(other) * sine[r * rotated + (transposed ? other : i)];
                        want = want * cosine[r * rotated + i] + (low == transposed ? turned : -turned);
                    }
                    c.check_near("y", r, h * dim + i, y.get(r * y_stride + h * head_stride + i), want,
                                 2e-6 * (1 + std::abs(want)) * 4 + rounding(dtype) * std::abs(want) * 1.01);
                }
                for (int64_t at = dim; at < head_stride && h + 1 < heads; ++at)
                    if (const int64_t place = r * y_stride + h * head_stride + at; !y.same_bits(before, place))
                        c.fail("wrote past head %lld of row %lld", static_cast<long long>(h),
                               static_cast<long long>(r));
            }
    });
}

}  // namespace

void fuzz_elementwise(Case& c) {
    switch (c.random.between(0, 4)) {
        case 0:
            return fuzz_normalize(c);
        case 1:
            return fuzz_normalize_gradient(c);
        case 2:
            return fuzz_activate(c);
        case 3:
            return fuzz_activate_gradient(c);
        default:
            return fuzz_rotate(c);
    }
}

}  // namespace pmc::fuzz
