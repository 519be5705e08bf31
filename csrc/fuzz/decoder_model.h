// Random decoders: their layers, caches whose other elements are NaN, and the tokens of a few steps.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/decoder.h"
#include "fuzz/positions.h"

namespace pmc::fuzz {

using Doubles = std::vector<double>;

inline std::vector<float> random_floats(Random& random, int64_t size) {
    std::vector<float> x(static_cast<size_t>(size));
    for (float& v : x) v = random.normal();
    return x;
}

inline const float* or_null(const std::vector<float>& x) { return x.empty() ? nullptr : x.data(); }

struct Norm {
    std::vector<float> weight, bias;
    float epsilon;
    bool centered;

    static Norm random(Random& random, int64_t size) {
        return {random_floats(random, size), random_floats(random, random.one_in(2) ? size : 0),
                random.pick({1e-5f, 1e-3f, 1.0f}), random.one_in(2)};
    }

    NormWeights weights() const {
        return {weight.data(), or_null(bias), static_cast<int64_t>(weight.size()), epsilon, centered};
    }
};

struct Matrix {
    int64_t rows, columns;
    Numbers stored;
    Doubles exact;

    static Matrix random(Random& random, Dtype dtype, int64_t rows, int64_t columns) {
        Matrix m{rows, columns, Numbers(dtype, rows * columns, 0), Doubles(static_cast<size_t>(rows * columns))};
        const double spread = std::sqrt(12.0 / static_cast<double>(columns));
        for (int64_t i = 0; i < rows * columns; ++i) {
            m.stored.set(i, static_cast<float>((random.uniform() - 0.5) * spread));
            m.exact[i] = m.stored.get(i);
        }
        return m;
    }

    // Packed for the instruction set in use; `held` keeps it.
    const void* pack(std::vector<Numbers>* held) {
        held->emplace_back(stored.dtype(), kernels().packed_weight_elements(rows, columns, false),
                           std::numeric_limits<float>::quiet_NaN());
        kernels().pack_weight({stored.data(), stored.dtype(), rows, columns, columns, held->back().data(), false, 1});
        return held->back().data();
    }
};

struct Linear {
    struct Adapter {
        Matrix down, up;
    };
    Matrix weight;
    std::vector<float> bias;
    std::vector<Adapter> adapters;

    static Linear random(Random& random, int64_t outputs, int64_t inputs) {
        const Dtype dtype = random.pick({Dtype::kFloat32, Dtype::kBFloat16});
        Linear made{
            Matrix::random(random, dtype, outputs, inputs), random_floats(random, random.one_in(2) ? outputs : 0), {}};
        for (int64_t left = random.one_in(3) ? random.between(1, 2) : 0; left > 0; --left) {
            const int64_t rank = random.between(1, 20);
            made.adapters.push_back({Matrix::random(random, Dtype::kFloat32, rank, inputs),
                                     Matrix::random(random, Dtype::kFloat32, outputs, rank)});
        }
        return made;
    }

    LinearWeights pack(std::vector<Numbers>* held) {
        LinearWeights made{weight.pack(held), weight.stored.dtype(), kPacked,        false,
                           or_null(bias),     weight.rows,           weight.columns, {}};
        for (Adapter& a : adapters)
            made.adapters.push_back({static_cast<const float*>(a.down.pack(held)),
                                     static_cast<const float*>(a.up.pack(held)), a.down.rows});
        return made;
    }
};

struct Layer {
    int64_t heads, kv_heads;
    std::optional<Norm> norm;
    Linear query;
    std::optional<Linear> key, value;
    float clip;
    std::optional<Norm> query_norm, key_norm;
    Linear output;
    std::optional<Norm> output_norm;
    bool parallel;
    std::optional<Norm> mlp_norm;
    std::optional<Linear> gate;
    Linear up;
    Activation activation;
    Linear down;
    std::optional<Norm> down_norm;
    int64_t rotary, window;
    float scale, softcap;

    static Layer random(Random& random, int64_t size, int64_t dim, int64_t rotaries, int64_t seen) {
        const bool fused = random.one_in(3);
        const int64_t kv_heads = random.between(1, 3);
        const int64_t heads = fused ? kv_heads : kv_heads * random.between(1, random.one_in(4) ? 6 : 2);
        const int64_t inner = random.between(1, 60);
        const auto norm = [&](int64_t of) {
            return random.one_in(2) ? std::optional<Norm>(Norm::random(random, of)) : std::nullopt;
        };
        const auto heads_norm = [&](int64_t of) {
            return fused ? std::nullopt : norm(random.one_in(2) ? of * dim : dim);
        };
        const auto keys = [&] {
            return fused ? std::nullopt : std::optional<Linear>(Linear::random(random, kv_heads * dim, size));
        };
        return {heads,
                kv_heads,
                norm(size),
                Linear::random(random, (fused ? 3 : 1) * heads * dim, size),
                keys(),
                keys(),
                random.one_in(3) ? random.pick({0.5f, 2.0f}) : std::numeric_limits<float>::infinity(),
                heads_norm(heads),
                heads_norm(kv_heads),
                Linear::random(random, size, heads * dim),
                norm(size),
                random.one_in(2),
                norm(size),
                random.one_in(2) ? std::optional<Linear>(Linear::random(random, inner, size)) : std::nullopt,
                Linear::random(random, inner, size),
                random.pick({Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu}),
                Linear::random(random, size, inner),
                norm(size),
                random.between(0, rotaries - 1),
                random.one_in(2) ? 0 : random.between(1, std::max<int64_t>(20, seen)),
                random.pick({0.1f, 1 / std::sqrt(static_cast<float>(dim))}),
                random.pick({0.0f, 0.0f, 0.7f, 50.0f})};
    }

    int64_t first_seen(int64_t first, int64_t seen) const { return window ? std::max(first, seen - window) : first; }

    DecoderLayer pack(std::vector<Numbers>* held) {
        const auto weights = [](const std::optional<Norm>& n) {
            return n ? std::optional<NormWeights>(n->weights()) : std::nullopt;
        };
        const auto packed = [&](std::optional<Linear>& linear) {
            return linear ? std::optional<LinearWeights>(linear->pack(held)) : std::nullopt;
        };
        return {weights(norm),
                query.pack(held),
                packed(key),
                packed(value),
                clip,
                weights(query_norm),
                weights(key_norm),
                output.pack(held),
                weights(output_norm),
                parallel,
                weights(mlp_norm),
                packed(gate),
                up.pack(held),
                activation,
                down.pack(held),
                weights(down_norm),
                rotary,
                window,
                scale,
                softcap};
    }
};

struct Cache {  // of one layer
    Positions key, value;
};

struct Step {
    int64_t rows, length;  // of each row's own positions, with the one that is written
    std::vector<float> hidden, cosine, sine;
};

struct Model {
    int64_t size, dim, rotated, rotaries;
    Dtype dtype;  // of the caches
    std::vector<Layer> layers;
    Norm final_norm;
    int64_t prefix_length;
    std::vector<int64_t> prefix_row, first;
    std::vector<Cache> own, prefix;
    std::vector<Step> steps;

    static Model random(Random& random) {
        const int64_t size = random.one_in(8) ? random.size() : random.between(1, 30);
        const int64_t dim = random.one_in(2) ? random.between(1, 35) : random.pick<int64_t>({8, 16, 32});
        Model m{size,
                dim,
                2 * random.between(0, dim / 2),
                random.between(1, 2),
                random.pick({Dtype::kFloat32, Dtype::kBFloat16}),
                {},
                Norm::random(random, size),
                random.one_in(2) ? 0 : random.between(1, 12),
                {},
                {},
                {},
                {},
                {}};
        const bool crowded = m.prefix_length && random.one_in(4);  // rows that read a prefix together
        if (crowded) m.prefix_length = random.between(60, 150);
        const int64_t length = random.between(1, 12), seen = m.prefix_length + length;
        for (int64_t s = 0, count = random.between(1, 2); s < count; ++s) {
            const int64_t rows = random.between(1, crowded            ? 24
                                                   : random.one_in(2) ? 9
                                                                      : 3),
                          angles = m.rotaries * rows * m.rotated;
            m.steps.push_back({rows, length + s, random_floats(random, rows * size), random_floats(random, angles),
                               random_floats(random, angles)});
        }
        const int64_t rows = std::max(m.steps.front().rows, m.steps.back().rows);
        const int64_t prefixes = m.prefix_length ? random.between(1, 3) : 0;
        const int64_t common = random.one_in(2) ? 0 : random.between(0, m.prefix_length);
        for (int64_t r = 0; r < rows; ++r) {
            m.prefix_row.push_back(random.between(0, std::max<int64_t>(0, prefixes - 1)));
            const int64_t other = random.pick<int64_t>({0, seen - 1, random.between(0, seen - 1)});
            m.first.push_back(crowded && !random.one_in(8) ? common : other);
        }
        m.prefix_row.shrink_to_fit(), m.first.shrink_to_fit();
        const int64_t room = m.steps.back().length + random.between(0, 3);
        for (int64_t l = 0, count = random.between(1, 3); l < count; ++l) {
            m.layers.push_back(Layer::random(random, size, dim, m.rotaries, seen));
            const Layer& layer = m.layers.back();
            // What no row looks at is NaN, as is what the steps write.
            std::vector<int64_t> first(m.first), end(static_cast<size_t>(rows), length - 1);
            std::vector<int64_t> prefix_first(static_cast<size_t>(prefixes), m.prefix_length);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t from = layer.first_seen(m.first[r], seen);
                first[r] = std::max<int64_t>(0, from - m.prefix_length);
                if (r >= m.steps.front().rows) end[r] = length;
                if (prefixes) prefix_first[m.prefix_row[r]] = std::min(prefix_first[m.prefix_row[r]], from);
            }
            const auto own = [&] {
                return Positions::random(random, rows, layer.kv_heads, room, dim, m.dtype, 1, first, end);
            };
            const auto prefix = [&] {
                return Positions::random(random, prefixes, layer.kv_heads, m.prefix_length, dim, m.dtype, 1,
                                         prefix_first,
                                         std::vector<int64_t>(static_cast<size_t>(prefixes), m.prefix_length));
            };
            m.own.push_back({own(), own()});
            m.prefix.push_back({prefix(), prefix()});
        }
        // NaN: in a row's hidden state, or in a key that may or may not be looked at.
        for (int64_t left = random.one_in(4) ? random.between(1, 3) : 0; left > 0; --left) {
            const auto some = [&](int64_t count) { return random.between(0, count - 1); };
            Step& step = m.steps[some(static_cast<int64_t>(m.steps.size()))];
            const int64_t l = some(static_cast<int64_t>(m.layers.size()));
            switch (random.between(0, 2)) {
                case 0:
                    step.hidden[some(step.rows * size)] = random.nan();
                    break;
                case 1:
                    m.own[l].key.x.set(some(m.own[l].key.x.size()), random.nan());
                    break;
                default:
                    if (prefixes) m.prefix[l].key.x.set(some(m.prefix[l].key.x.size()), random.nan());
            }
        }
        return m;
    }
};

}  // namespace pmc::fuzz
