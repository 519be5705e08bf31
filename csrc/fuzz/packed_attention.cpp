// packed_attention and its gradients against the same in double, on tokens of any layout whose other elements are NaN.
#include <algorithm>
#include <cmath>
#include <limits>

#include "fuzz/fuzz.h"

namespace pmc::fuzz {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Shape {
    std::vector<int64_t> lengths;
    int64_t heads, kv_heads, dim, window;
    float scale, softcap;

    int64_t tokens() const {
        int64_t sum = 0;
        for (int64_t length : lengths) sum += length;
        return sum;
    }
};

// [tokens, heads, dim] in some layout.
struct Tokens {
    int64_t token_stride, head_stride;
    Numbers x;

    static Tokens random(Random& random, int64_t tokens, int64_t heads, int64_t dim, Dtype dtype, float spread) {
        const int64_t gap = random.one_in(2) ? 0 : random.between(1, 5);
        int64_t head_stride = dim + gap, token_stride = head_stride * heads + gap;
        if (random.one_in(2)) {
            token_stride = dim + gap;
            head_stride = token_stride * tokens + gap;
        }
        const int64_t last = (tokens - 1) * token_stride + (heads - 1) * head_stride;
        Tokens made{token_stride, head_stride, Numbers(dtype, tokens ? last + dim : 0, kNaN)};
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t h = 0; h < heads; ++h)
                for (int64_t i = 0; i < dim; ++i) made.x.set(made.at(t, h) + i, random.normal() * spread);
        return made;
    }

    int64_t at(int64_t token, int64_t head) const { return token * token_stride + head * head_stride; }
    double get(int64_t token, int64_t head, int64_t i) const { return x.get(at(token, head) + i); }
    TokenHeads view() { return {x.data(), token_stride, head_stride}; }
};

// What a kernel should find, [tokens, heads, dim], and the sizes of what it sums there.
struct Sums {
    std::vector<double> value, size;
    explicit Sums(int64_t count) : value(count), size(count) {}
    void add(int64_t i, double x, double of) { value[i] += x, size[i] += std::abs(of); }
};

struct Expected {
    Sums out, d_query, d_key, d_value;
    std::vector<double> log_mass;
    double steepest = 0;  // a bound of the errors of scores
};

// One query: its output, and what its upstream gradient adds to the gradients.
void attend(const Shape& s, int64_t token, int64_t head, const std::vector<int64_t>& seen, const Tokens& query,
            const Tokens& key, const Tokens& value, const Tokens& upstream, Expected* to) {
    const int64_t kv_head = head * s.kv_heads / s.heads, at = (token * s.heads + head) * s.dim;
    std::vector<double> score, slope, weight;
    double top = -INFINITY, mass = 0, along = 0, along_size = 0, error = 0;
    for (int64_t j : seen) {
        double sum = 0, size = 0;
        for (int64_t i = 0; i < s.dim; ++i) {
            const double product = s.scale * query.get(token, head, i) * key.get(j, kv_head, i);
            sum += product, size += std::abs(product);
        }
        error = std::max(error, size);
        const double t = s.softcap > 0 ? std::tanh(sum / s.softcap) : 0;
        score.push_back(s.softcap > 0 ? s.softcap * t : sum);
        slope.push_back(1 - t * t);
        top = std::max(top, score.back());
    }
    to->steepest = std::max(to->steepest, error);
    for (double x : score) mass += std::exp(x - top);
    to->log_mass[token * s.heads + head] = top + std::log(mass);
    std::vector<double> above(seen.size()), above_size(seen.size());
    for (size_t n = 0; n < seen.size(); ++n) {
        weight.push_back(std::exp(score[n] - top) / mass);
        for (int64_t i = 0; i < s.dim; ++i) {
            const double v = value.get(seen[n], kv_head, i), g = upstream.get(token, head, i);
            to->out.add(at + i, weight[n] * v, weight[n] * v);
            above[n] += g * v, above_size[n] += std::abs(g * v);
        }
        along += weight[n] * above[n], along_size += weight[n] * above_size[n];
    }
    for (size_t n = 0; n < seen.size(); ++n) {
        const int64_t k = (seen[n] * s.kv_heads + kv_head) * s.dim;
        const double d = weight[n] * (above[n] - along) * slope[n] * s.scale;
        const double size = weight[n] * (above_size[n] + along_size) * s.scale;
        for (int64_t i = 0; i < s.dim; ++i) {
            const double q = query.get(token, head, i), x = key.get(seen[n], kv_head, i);
            to->d_query.add(at + i, d * x, size * x);
            to->d_key.add(k + i, d * q, size * q);
            const double g = weight[n] * upstream.get(token, head, i);
            to->d_value.add(k + i, g, g);
        }
    }
}

}  // namespace

void fuzz_packed_attention(Case& c) {
    Random& random = c.random;
    Shape s{};
    s.lengths = {random.one_in(3) ? 0 : random.between(1, random.one_in(4) ? 150 : 20)};
    const bool many = random.one_in(6);  // more than the backward pass has tasks
    for (int64_t sequences = random.between(0, many ? 80 : 4); sequences > 0; --sequences)
        s.lengths.push_back(random.one_in(8)    ? 0
                            : many              ? random.between(1, 3)
                            : random.one_in(12) ? random.between(100, random.one_in(8) ? 540 : 200)
                                                : random.between(1, 40));
    const int64_t tokens = s.tokens();
    s.kv_heads = random.between(1, 3);
    s.heads = s.kv_heads * random.between(1, tokens <= 100 ? 9 : random.one_in(4) ? 5 : 2);
    s.dim = tokens > 100       ? random.between(1, 20)
            : random.one_in(2) ? random.between(1, 70)
                               : random.pick<int64_t>({16, 32, 64});
    s.window = random.one_in(2) ? std::max<int64_t>(1, tokens) : random.between(1, std::max<int64_t>(1, tokens));
    s.scale = random.pick({1.0f, 0.1f, -2.0f, 1 / std::sqrt(static_cast<float>(s.dim))});
    s.softcap = random.pick({0.0f, 0.0f, 0.7f, 50.0f});
    const int threads = static_cast<int>(random.between(1, 2));
    const Dtype dtype = random.one_in(2) ? Dtype::kFloat32 : Dtype::kBFloat16;
    const auto make = [&](int64_t heads, float spread) {
        return Tokens::random(random, tokens, heads, s.dim, dtype, spread);
    };
    // With the largest, a score that a token does not see may tower over all that it sees.
    Tokens query = make(s.heads, random.pick({0.0f, 0.3f, 1.0f, 2.0f, 50.0f})), key = make(s.kv_heads, 1);
    const float size_of_values = random.pick({1.0f, 1e-10f, 1e10f});
    Tokens value = make(s.kv_heads, size_of_values);
    Tokens upstream = make(s.heads, random.pick({0.0f, 1.0f, 1e-10f}));

    const int64_t rows = tokens * s.heads, size = rows * s.dim, kv_size = tokens * s.kv_heads * s.dim;
    Expected want{Sums(size), Sums(size), Sums(kv_size), Sums(kv_size), std::vector<double>(rows)};
    for (int64_t n = 0, start = 0; n < static_cast<int64_t>(s.lengths.size()); start += s.lengths[n++]) {
        std::vector<int64_t> positions;
        for (int64_t t = 0; n > 0 && t < s.lengths[0]; ++t) positions.push_back(t);
        for (int64_t t = start; t < start + s.lengths[n]; ++t) {
            positions.push_back(t);
            const int64_t held = static_cast<int64_t>(positions.size());
            const std::vector<int64_t> seen(positions.begin() + std::max<int64_t>(0, held - s.window), positions.end());
            for (int64_t h = 0; h < s.heads; ++h) attend(s, t, h, seen, query, key, value, upstream, &want);
        }
    }
    // Sums of float32, and the outputs' rounding within the gradients.
    const double of_scores = 0x1p-22 * (static_cast<double>(s.dim) + 8) * (want.steepest + 1) + s.softcap * 2e-6;
    const double error = of_scores + 0x1p-22 * static_cast<double>(tokens * s.heads + s.dim) + rounding(dtype);

    const double vanishes = 1e-33 * std::max(1.0f, size_of_values);  // what weights below e^-87, taken as 0, add up to

    c.for_each_isa([&] {
        Numbers out(dtype, size, kNaN), d_query(dtype, size, kNaN), d_key(dtype, kv_size, kNaN),
            d_value(dtype, kv_size, kNaN);
        std::vector<float> log_mass(rows, kNaN);
        const int64_t sequences = static_cast<int64_t>(s.lengths.size());
        std::vector<float> workspace(packed_attention_workspace_floats(sequences, s.dim, threads), kNaN);
        PackedAttentionArgs args{query.view(), key.view(),       value.view(),     dtype,    s.heads, s.kv_heads,
                                 s.dim,        s.lengths.data(), sequences,        s.window, s.scale, s.softcap,
                                 out.data(),   log_mass.data(),  workspace.data(), threads};
        kernels().packed_attention(args);
        const PackedAttentionTasks tasks = packed_attention_tasks(s.lengths.data(), sequences, s.heads, s.kv_heads);
        std::vector<float> more(
            packed_attention_backward_workspace_floats(tasks, sequences, s.kv_heads, s.dim, threads), kNaN);
        args.workspace = more.data();
        kernels().packed_attention_backward(
            {args, upstream.view(), d_query.data(), d_key.data(), d_value.data(), tasks});
        for (int64_t r = 0; r < rows; ++r)
            c.check_near("log_mass", r, 0, log_mass[r], want.log_mass[r],
                         4 * (of_scores + 0x1p-22 * std::abs(want.log_mass[r])));
        const auto check = [&](const char* what, const Numbers& got, const Sums& wanted) {
            for (int64_t i = 0; i < got.size(); ++i)
                c.check_near(what, i / s.dim, i % s.dim, got.get(i), wanted.value[i],
                             4 * error * wanted.size[i] + rounding(dtype) * std::abs(wanted.value[i]) + vanishes);
        };
        check("out", out, want.out);
        check("d_query", d_query, want.d_query);
        check("d_key", d_key, want.d_key);
        check("d_value", d_value, want.d_value);
    });
}

}  // namespace pmc::fuzz
