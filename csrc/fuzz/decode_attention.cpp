// decode_attention against the same in double, on caches of any layout whose other elements are NaN.
#include <algorithm>
#include <cmath>
#include <limits>

#include "fuzz/fuzz.h"

namespace pmc::fuzz {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Shape {
    int64_t rows, heads, kv_heads, length, dim;
};

// Keys or values.
struct Cache {
    CacheStrides stride;
    Numbers x;

    static Cache random(Random& random, const Shape& s, Dtype dtype, float spread, const std::vector<int64_t>& first) {
        CacheStrides stride;
        const int64_t gap = random.one_in(2) ? 0 : random.between(1, 5);
        if (random.one_in(2)) {  // heads outside, positions inside
            stride.position = s.dim + gap;
            stride.head = stride.position * (s.length + gap);
            stride.row = stride.head * s.kv_heads + gap;
        } else {
            stride.head = s.dim + gap;
            stride.position = stride.head * s.kv_heads + gap;
            stride.row = stride.position * (s.length + gap);
        }
        const int64_t last =
            (s.rows - 1) * stride.row + (s.kv_heads - 1) * stride.head + (s.length - 1) * stride.position;
        Cache cache{stride, Numbers(dtype, s.rows ? last + s.dim : 0, kNaN)};
        for (int64_t r = 0; r < s.rows; ++r)
            for (int64_t h = 0; h < s.kv_heads; ++h)
                for (int64_t t = first[r]; t < s.length; ++t)
                    for (int64_t i = 0; i < s.dim; ++i) cache.x.set(cache.at(r, h, t) + i, random.normal() * spread);
        return cache;
    }

    int64_t at(int64_t row, int64_t head, int64_t position) const {
        return row * stride.row + head * stride.head + position * stride.position;
    }
};

// One head's output, and how far a kernel's may be from it. Returns false if the scores cannot be used.
bool attend(const Shape& s, int64_t row, int64_t head, int64_t first, const Numbers& query, const Cache& key,
            const Cache& value, float scale, float softcap, double* out, double* tolerance) {
    const int64_t kv_head = head * s.kv_heads / s.heads, q = (row * s.heads + head) * s.dim;
    std::vector<double> scores;
    double error = 0, largest = 0, mass = 0;
    for (int64_t t = first; t < s.length; ++t) {
        double score = 0, magnitude = 0;
        for (int64_t i = 0; i < s.dim; ++i) {
            const double product =
                static_cast<double>(query.get(q + i)) * scale * key.x.get(key.at(row, kv_head, t) + i);
            score += product;
            magnitude += std::abs(product);
        }
        if (softcap > 0) score = softcap * std::tanh(score / softcap);
        if (std::isfinite(magnitude)) error = std::max(error, 0x1p-23 * static_cast<double>(s.dim + 4) * magnitude);
        scores.push_back(score);
    }
    const double top = *std::max_element(scores.begin(), scores.end());
    for (double score : scores)
        if (std::isnan(score)) return false;
    if (!std::isfinite(top)) return false;
    error += softcap * 1e-6 + 1e-6 + 0x1p-23 * static_cast<double>(scores.size());
    for (double& score : scores) mass += score = std::exp(score - top);
    std::fill_n(out, s.dim, 0.0);
    for (int64_t t = first; t < s.length; ++t)
        for (int64_t i = 0; i < s.dim; ++i) {
            const double v = value.x.get(value.at(row, kv_head, t) + i);
            out[i] += scores[t - first] / mass * v;
            largest = std::max(largest, std::abs(v));
        }
    *tolerance = 4 * error * largest;
    return true;
}

}  // namespace

void fuzz_decode_attention(Case& c) {
    Random& random = c.random;
    Shape s{};
    s.rows = random.one_in(20) ? 0 : random.between(1, 3);
    s.kv_heads = random.between(1, 3);
    s.heads = s.kv_heads * random.between(1, 9);
    s.length = random.one_in(20) ? random.between(1, 500) : random.between(1, 40);
    s.dim = random.one_in(2) ? random.between(1, 70) : random.pick<int64_t>({8, 16, 32, 64, 128});
    const Dtype dtype = random.one_in(2) ? Dtype::kFloat32 : Dtype::kBFloat16;
    std::vector<int64_t> first(s.rows);
    for (int64_t& f : first) f = random.pick<int64_t>({0, s.length - 1, random.between(0, s.length - 1)});
    const float scale = random.pick({1.0f, 0.1f, -2.0f, 1 / std::sqrt(static_cast<float>(s.dim))});
    const float softcap = random.pick({0.0f, 0.0f, 1.5f, 50.0f});
    const int threads = static_cast<int>(random.between(1, 2));

    Numbers query(dtype, s.rows * s.heads * s.dim, 0);
    const float spread = random.pick({0.0f, 1e-39f, 0.3f, 1.0f, 5.0f});
    for (int64_t i = 0; i < s.rows * s.heads * s.dim; ++i) query.set(i, random.normal() * spread);
    Cache key = Cache::random(random, s, dtype, random.pick({0.0f, 1.0f, 4.0f}), first);
    Cache value = Cache::random(random, s, dtype, random.pick({1.0f, 1e-30f, 1e30f}), first);
    if (s.rows && random.one_in(5)) {
        const int64_t row = random.between(0, s.rows - 1);
        const int64_t at = key.at(row, random.between(0, s.kv_heads - 1), random.between(first[row], s.length - 1));
        key.x.set(at + random.between(0, s.dim - 1), random.pick({INFINITY, -INFINITY, random.nan(), random.nan()}));
    }

    std::vector<double> expected(s.rows * s.heads * s.dim), tolerance(s.rows * s.heads);
    std::vector<Usable> usable(s.rows, Usable::kYes);
    for (int64_t r = 0; r < s.rows; ++r)
        for (int64_t h = 0; h < s.heads; ++h) {
            const int64_t head = r * s.heads + h;
            if (!attend(s, r, h, first[r], query, key, value, scale, softcap, &expected[head * s.dim],
                        &tolerance[head]))
                usable[r] = Usable::kNo;
        }
    c.for_each_isa([&] {
        Numbers out(dtype, s.rows * s.heads * s.dim, kNaN);
        std::vector<float> workspace(threads * decode_attention_workspace_floats(s.length, s.dim), kNaN);
        const int64_t bad = kernels().decode_attention(
            {query.data(), key.x.data(), value.x.data(), dtype, s.rows, s.heads, s.kv_heads, s.length, s.dim,
             key.stride, value.stride, first.data(), scale, softcap, out.data(), workspace.data(), threads});
        check_first_bad(c, usable, bad);
        for (int64_t i = 0; i < s.rows * s.heads * s.dim; ++i) {
            const int64_t head = i / s.dim;
            if (usable[head / s.heads] == Usable::kYes)
                c.check_near("out", head, i % s.dim, out.get(i), expected[i],
                             tolerance[head] + rounding(dtype) * std::abs(expected[i]));
        }
    });
}

}  // namespace pmc::fuzz
