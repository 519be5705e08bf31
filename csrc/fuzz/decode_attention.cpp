// decode_attention against the same in double, on caches of any layout whose other elements are NaN.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/prefix_sharers.h"
#include "fuzz/positions.h"

namespace pmc::fuzz {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Shape {
    int64_t rows, heads, kv_heads, length, dim;
    int64_t prefixes, prefix_length;
};

// Keys or values of all positions: those of the prefixes, then each row's own.
struct Cache {
    const std::vector<int64_t>& prefix_row;
    int64_t prefix_length;
    Positions prefix, own;

    static Cache random(Random& random, const Shape& s, Dtype dtype, float spread, const std::vector<int64_t>& first,
                        const std::vector<int64_t>& length, const std::vector<int64_t>& prefix_row) {
        std::vector<int64_t> in_prefix(s.prefixes, s.prefix_length), in_own(s.rows);  // what no row looks at is NaN
        for (int64_t r = 0; r < s.rows; ++r) {
            in_own[r] = std::max<int64_t>(0, first[r] - s.prefix_length);
            if (s.prefixes) in_prefix[prefix_row[r]] = std::min(in_prefix[prefix_row[r]], first[r]);
        }
        return {prefix_row, s.prefix_length,
                Positions::random(random, s.prefixes, s.kv_heads, s.prefix_length, s.dim, dtype, spread, in_prefix,
                                  std::vector<int64_t>(s.prefixes, s.prefix_length)),
                Positions::random(random, s.rows, s.kv_heads, s.length, s.dim, dtype, spread, in_own, length)};
    }

    float get(int64_t row, int64_t head, int64_t position, int64_t i) const {
        if (position >= prefix_length) return own.x.get(own.at(row, head, position - prefix_length) + i);
        return prefix.x.get(prefix.at(prefix_row[row], head, position) + i);
    }
};

// One head's output, and how far a kernel's may be from it. Returns false if the scores cannot be used.
bool attend(const Shape& s, int64_t row, int64_t head, int64_t first, int64_t end, const Numbers& query,
            const Cache& key, const Cache& value, float scale, float softcap, double* out, double* tolerance) {
    const int64_t kv_head = head * s.kv_heads / s.heads, q = (row * s.heads + head) * s.dim;
    std::vector<double> scores;
    double error = 0, largest = 0, mass = 0;
    for (int64_t t = first; t < end; ++t) {
        double score = 0, magnitude = 0;
        for (int64_t i = 0; i < s.dim; ++i) {
            const double product = static_cast<double>(query.get(q + i)) * scale * key.get(row, kv_head, t, i);
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
    for (int64_t t = first; t < end; ++t)
        for (int64_t i = 0; i < s.dim; ++i) {
            const double v = value.get(row, kv_head, t, i);
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
    s.prefixes = s.rows && random.one_in(2) ? random.between(1, 2) : 0;
    s.prefix_length = s.prefixes ? random.between(1, 40) : 0;
    const bool crowded = s.prefixes && random.one_in(2);
    if (crowded) {  // rows that read a prefix together
        s.rows = random.between(3, random.one_in(4) ? 130 : 20);
        s.kv_heads = random.between(1, 2);
        s.heads = s.kv_heads * random.between(1, random.one_in(4) ? 9 : 3);
        s.length = random.between(1, 9);
        s.dim = random.between(1, 40);
        s.prefix_length = random.between(60, random.one_in(3) ? 300 : 130);
    }
    const bool full = crowded && random.one_in(3);  // a row more in a set would leave no room for its queries
    if (full) {
        s.rows = random.between(2, 3) * (kSharingRows + 1);
        s.kv_heads = 2, s.heads = s.kv_heads * random.between(kHeadsAtOnce, 5);
        s.dim = random.between(1, 20);
        s.prefixes = 1;
        s.prefix_length = random.between(64, 130);
    }
    const int64_t positions = s.prefix_length + s.length;
    const Dtype dtype = random.one_in(2) ? Dtype::kFloat32 : Dtype::kBFloat16;
    std::vector<int64_t> first(s.rows), length(s.rows, s.length), prefix_row(s.rows);
    const bool filled = random.one_in(2);
    for (int64_t& l : length)
        if (!filled) l = random.between(1, s.length);
    for (int64_t r = 0; r < s.rows; ++r) {
        const int64_t last = s.prefix_length + length[r] - 1;
        first[r] = random.pick<int64_t>({0, last, random.between(0, last)});
    }
    const int64_t common = random.one_in(2) ? 0 : random.between(0, s.prefix_length);
    for (int64_t& f : first)
        if (full)
            f = 0;
        else if (crowded && !random.one_in(8))
            f = common;
    for (int64_t& p : prefix_row) p = random.between(0, std::max<int64_t>(0, s.prefixes - 1));
    const float scale = random.pick({1.0f, 0.1f, -2.0f, 1 / std::sqrt(static_cast<float>(s.dim))});
    const float softcap = random.pick({0.0f, 0.0f, 0.7f, 50.0f});
    const int threads = full ? 1 : static_cast<int>(random.between(1, 2));

    Numbers query(dtype, s.rows * s.heads * s.dim, 0);
    const float spread = random.pick({0.0f, 1e-39f, 0.3f, 1.0f, 5.0f});
    for (int64_t i = 0; i < s.rows * s.heads * s.dim; ++i) query.set(i, random.normal() * spread);
    Cache key = Cache::random(random, s, dtype, random.pick({0.0f, 1.0f, 4.0f}), first, length, prefix_row);
    Cache value = Cache::random(random, s, dtype, random.pick({1.0f, 1e-30f, 1e30f}), first, length, prefix_row);
    if (s.rows && random.one_in(5)) {
        const int64_t row = random.between(0, s.rows - 1), head = random.between(0, s.kv_heads - 1);
        const int64_t t = random.between(first[row], s.prefix_length + length[row] - 1) - s.prefix_length;
        const int64_t i = random.between(0, s.dim - 1);
        const float odd = random.pick({INFINITY, -INFINITY, random.nan(), random.nan()});
        if (t >= 0)
            key.own.x.set(key.own.at(row, head, t) + i, odd);
        else
            key.prefix.x.set(key.prefix.at(prefix_row[row], head, t + s.prefix_length) + i, odd);
    }

    std::vector<double> expected(s.rows * s.heads * s.dim), tolerance(s.rows * s.heads);
    std::vector<Usable> usable(s.rows, Usable::kYes);
    for (int64_t r = 0; r < s.rows; ++r)
        for (int64_t h = 0; h < s.heads; ++h) {
            const int64_t head = r * s.heads + h;
            if (!attend(s, r, h, first[r], s.prefix_length + length[r], query, key, value, scale, softcap,
                        &expected[head * s.dim], &tolerance[head]))
                usable[r] = Usable::kNo;
        }
    PrefixSharers sharers;
    if (full || !random.one_in(4))
        sharers.find(prefix_row.data(), first.data(), s.rows, s.prefix_length, s.heads, s.kv_heads, threads);
    c.for_each_isa([&] {
        Numbers out(dtype, s.rows * s.heads * s.dim, kNaN);
        std::vector<float> workspace(threads * decode_attention_workspace_floats(positions, s.dim), kNaN);
        const int64_t bad = kernels().decode_attention(
            {query.data(), dtype, s.rows, s.heads, s.kv_heads, s.dim, cached(key.own, value.own, s.length),
             cached(key.prefix, value.prefix, s.prefix_length), s.prefixes ? prefix_row.data() : nullptr, first.data(),
             filled ? nullptr : length.data(), scale, softcap, out.data(), workspace.data(), threads, sharers.found()});
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
