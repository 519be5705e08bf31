// normalize, activate and rotate against the same in double, on rows that lie apart and whose gaps are NaN.
#include <algorithm>
#include <cmath>
#include <limits>

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
        kernels().normalize({in_place ? floats(y) : floats(x), rows, size, stride, weight.data(),
                             centered ? bias.data() : nullptr, epsilon, centered, static_cast<float*>(y.data()),
                             y_stride, accumulate, static_cast<int>(random.between(1, 2))});
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

void fuzz_activate(Case& c) {
    Random& random = c.random;
    const int64_t rows = random.between(0, 20), size = random.size(), stride = size + random.between(0, 20);
    const bool gated = random.one_in(2);
    const Activation activation = random.pick({Activation::kSilu, Activation::kGeluTanh});
    Numbers x = random_rows(random, rows, stride, size, random.pick({0.1f, 3.0f, 50.0f}));
    const std::vector<float> up = random_floats(random, elements(rows, stride, size));
    c.for_each_isa([&] {
        Numbers y = x;
        kernels().activate({static_cast<float*>(y.data()), gated ? up.data() : nullptr, rows, size, stride, activation,
                            static_cast<int>(random.between(1, 2))});
        for (int64_t at = 0; at < rows * size; ++at) {
            const int64_t i = at / size * stride + at % size;
            const double v = x.get(i), cubic = 0.7978845608028654 * (v + 0.044715 * v * v * v);
            double want = activation == Activation::kSilu ? v / (1 + std::exp(-v)) : 0.5 * v * (1 + std::tanh(cubic));
            // Far below 0 the limit is 0; the tails come from exponents that float rounds.
            const double error = std::isfinite(v) ? std::abs(v) * 4e-6 + 1e-30 : 0;
            if (gated) want *= up[i];
            // 0 or NaN, as in torch; no float holds the result.
            if (v == -INFINITY || std::abs(want) > std::numeric_limits<float>::max()) continue;
            c.check_near("x", at / size, at % size, y.get(i), want, error * (gated ? std::abs(up[i]) : 1));
        }
        check_gaps(c, y, x, rows, stride, size);
    });
}

void fuzz_rotate(Case& c) {
    Random& random = c.random;
    const int64_t rows = random.between(0, 20), heads = random.between(1, 4), dim = random.between(1, 70);
    const int64_t rotated = random.between(0, dim / 2) * 2;
    const int64_t x_stride = heads * dim + random.between(0, 5), head_stride = dim + random.between(0, 5);
    const int64_t y_stride = heads * head_stride + random.between(0, 5);
    const Dtype dtype = random.pick({Dtype::kFloat32, Dtype::kBFloat16});
    Numbers x(Dtype::kFloat32, elements(rows, x_stride, heads * dim), kNaN);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < heads * dim; ++i) x.set(r * x_stride + i, random.normal());
    const std::vector<float> cosine = random_floats(random, rows * rotated),
                             sine = random_floats(random, rows * rotated);
    c.for_each_isa([&] {
        const Numbers before(dtype, elements(rows, y_stride, (heads - 1) * head_stride + dim), kNaN);
        Numbers y = before;
        kernels().rotate({floats(x), rows, heads, dim, x_stride, cosine.data(), sine.data(), rotated, y.data(),
                          y_stride, head_stride, dtype, static_cast<int>(random.between(1, 2))});
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t h = 0; h < heads; ++h) {
                const auto in = [&](int64_t i) { return static_cast<double>(x.get(r * x_stride + h * dim + i)); };
                for (int64_t i = 0; i < dim; ++i) {
                    const bool low = i < rotated / 2;
                    double want = in(i);
                    if (i < rotated)
                        want = want * cosine[r * rotated + i] +
                               (low ? -in(i + rotated / 2) : in(i - rotated / 2)) * sine[r * rotated + i];
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
    switch (c.random.between(0, 2)) {
        case 0:
            return fuzz_normalize(c);
        case 1:
            return fuzz_activate(c);
        default:
            return fuzz_rotate(c);
    }
}

}  // namespace pmc::fuzz
