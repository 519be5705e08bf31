// Steps of a whole decoder against the same in double, a row at a time, on caches whose other elements are NaN.
#include "cpu/decoder.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "fuzz/positions.h"

namespace pmc::fuzz {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

using Doubles = std::vector<double>;

std::vector<float> random_floats(Random& random, int64_t size, float spread = 1) {
    std::vector<float> x(static_cast<size_t>(size));
    for (float& v : x) v = random.normal() * spread;
    return x;
}

const float* or_null(const std::vector<float>& x) { return x.empty() ? nullptr : x.data(); }

struct Norm {
    std::vector<float> weight, bias;
    float epsilon;
    bool centered;

    static Norm random(Random& random, int64_t size) {
        return {random_floats(random, size), random_floats(random, random.one_in(2) ? size : 0),
                random.pick({1e-5f, 1e-3f, 1.0f}), random.one_in(2)};
    }

    NormWeights weights() const { return {weight.data(), or_null(bias), epsilon, centered}; }
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
        held->emplace_back(stored.dtype(), kernels().packed_weight_elements(rows, columns), kNaN);
        kernels().pack_weight({stored.data(), stored.dtype(), rows, columns, columns, held->back().data(), 1});
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
        LinearWeights made{weight.pack(held), weight.stored.dtype(), or_null(bias), weight.rows, weight.columns, {}};
        for (Adapter& a : adapters)
            made.adapters.push_back({static_cast<const float*>(a.down.pack(held)),
                                     static_cast<const float*>(a.up.pack(held)), a.down.rows});
        return made;
    }
};

struct Layer {
    int64_t heads, kv_heads;
    Norm norm;
    Linear query, key, value;
    std::optional<Norm> query_norm, key_norm;
    Linear output;
    std::optional<Norm> mlp_norm;
    std::optional<Linear> gate;
    Linear up, down;
    int64_t window;
    float scale, softcap;

    static Layer random(Random& random, int64_t size, int64_t dim) {
        const int64_t kv_heads = random.between(1, 3), heads = kv_heads * random.between(1, random.one_in(4) ? 6 : 2);
        const int64_t inner = random.between(1, 60);
        const bool gated = random.one_in(2);
        const auto norm = [&](bool there, int64_t of) {
            return there ? std::optional<Norm>(Norm::random(random, of)) : std::nullopt;
        };
        return {heads,
                kv_heads,
                Norm::random(random, size),
                Linear::random(random, heads * dim, size),
                Linear::random(random, kv_heads * dim, size),
                Linear::random(random, kv_heads * dim, size),
                norm(random.one_in(2), dim),
                norm(random.one_in(2), dim),
                Linear::random(random, size, heads * dim),
                norm(gated, size),
                gated ? std::optional<Linear>(Linear::random(random, inner, size)) : std::nullopt,
                Linear::random(random, inner, size),
                Linear::random(random, size, inner),
                random.one_in(2) ? 0 : random.between(1, 20),
                random.pick({0.1f, 1 / std::sqrt(static_cast<float>(dim))}),
                random.pick({0.0f, 0.0f, 1.5f, 50.0f})};
    }

    int64_t first_seen(int64_t first, int64_t seen) const { return window ? std::max(first, seen - window) : first; }

    DecoderLayer pack(std::vector<Numbers>* held) {
        const auto weights = [](const std::optional<Norm>& n) {
            return n ? std::optional<NormWeights>(n->weights()) : std::nullopt;
        };
        return {norm.weights(),
                query.pack(held),
                key.pack(held),
                value.pack(held),
                weights(query_norm),
                weights(key_norm),
                output.pack(held),
                weights(mlp_norm),
                gate ? std::optional<LinearWeights>(gate->pack(held)) : std::nullopt,
                up.pack(held),
                down.pack(held),
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
    int64_t size, dim, rotated;
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
                random.pick({Dtype::kFloat32, Dtype::kBFloat16}),
                {},
                Norm::random(random, size),
                random.one_in(2) ? 0 : random.between(1, 12),
                {},
                {},
                {},
                {},
                {}};
        const int64_t length = random.between(1, 12), seen = m.prefix_length + length;
        for (int64_t s = 0, count = random.between(1, 2); s < count; ++s) {
            const int64_t rows = random.between(1, random.one_in(2) ? 9 : 3);
            m.steps.push_back({rows, length + s, random_floats(random, rows * size),
                               random_floats(random, rows * m.rotated), random_floats(random, rows * m.rotated)});
        }
        const int64_t rows = std::max(m.steps.front().rows, m.steps.back().rows);
        const int64_t prefixes = m.prefix_length ? random.between(1, 3) : 0;
        for (int64_t r = 0; r < rows; ++r) {
            m.prefix_row.push_back(random.between(0, std::max<int64_t>(0, prefixes - 1)));
            m.first.push_back(random.pick<int64_t>({0, seen - 1, random.between(0, seen - 1)}));
        }
        m.prefix_row.shrink_to_fit(), m.first.shrink_to_fit();
        const int64_t room = m.steps.back().length + random.between(0, 3);
        for (int64_t l = 0, count = random.between(1, 3); l < count; ++l) {
            m.layers.push_back(Layer::random(random, size, dim));
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

// What a step makes of one row.
struct Outcome {
    std::vector<Doubles> parts;  // its hidden state, then the new key and value of each layer
    size_t bad_layer;            // the first whose scores are not finite, or how many there are
};

// The steps in double. With a seed they are as far off, everywhere, as kernels may be that round in any order: what
// comes of that is how far apart results may be.
class Reference {
  public:
    Reference(const Model& model, uint64_t seed) : m_(model), noisy_(seed != 0), random_(seed) {
        for (size_t l = 0; l < m_.layers.size(); ++l) {
            own_.push_back({exact(m_.own[l].key), exact(m_.own[l].value)});
            prefix_.push_back({exact(m_.prefix[l].key), exact(m_.prefix[l].value)});
        }
    }

    Outcome run(const Step& step, int64_t row) {
        Doubles h(step.hidden.begin() + row * m_.size, step.hidden.begin() + (row + 1) * m_.size);
        Outcome outcome{{Doubles()}, m_.layers.size()};
        for (size_t l = 0; l < m_.layers.size(); ++l) {
            const Layer& layer = m_.layers[l];
            const Doubles x = normalized(layer.norm, h);
            const Doubles key = rotated(heads_normalized(layer.key_norm, product(layer.key, x)), step, row);
            const Doubles value = stored(product(layer.value, x));
            const Doubles query = rotated(heads_normalized(layer.query_norm, product(layer.query, x)), step, row);
            outcome.parts.push_back(key), outcome.parts.push_back(value);
            for (int64_t head = 0; head < layer.kv_heads; ++head) {
                const int64_t position = step.length - 1;
                std::copy_n(&key[head * m_.dim], m_.dim, &own_[l].key[m_.own[l].key.at(row, head, position)]);
                std::copy_n(&value[head * m_.dim], m_.dim, &own_[l].value[m_.own[l].value.at(row, head, position)]);
            }
            Doubles attended;
            if (!attend(l, row, step.length, query, &attended)) {
                outcome.bad_layer = l;
                return outcome;
            }
            add(product(layer.output, stored(attended)), &h);
            const Doubles y = layer.mlp_norm ? normalized(*layer.mlp_norm, h) : x;
            Doubles inner = product(layer.up, y);
            if (layer.gate) {
                const Doubles gate = product(*layer.gate, y);
                for (size_t i = 0; i < inner.size(); ++i)
                    inner[i] *= gate[i] / (1 + std::exp(-gate[i])) + off(8 * std::abs(gate[i]));
            } else {
                for (double& v : inner) {
                    const double cubic = 0.7978845608028654 * (v + 0.044715 * v * v * v);
                    v = 0.5 * v * (1 + std::tanh(cubic)) + off(8 * std::abs(v));
                }
            }
            add(product(layer.down, inner), &h);
        }
        outcome.parts[0] = normalized(m_.final_norm, h);
        return outcome;
    }

  private:
    struct Exact {  // of one layer
        Doubles key, value;
    };

    static Doubles exact(const Positions& p) {
        Doubles x(static_cast<size_t>(p.x.size()));
        for (int64_t i = 0; i < p.x.size(); ++i) x[i] = p.x.get(i);
        return x;
    }

    // Up or down by a few roundings of a float of this magnitude; nothing without noise.
    double off(double magnitude) {
        if (!noisy_) return 0;
        return random_.one_in(2) ? 0x1p-22 * magnitude : -0x1p-22 * magnitude;
    }

    // As numbers of the cache's dtype.
    Doubles stored(Doubles x) {
        if (m_.dtype == Dtype::kBFloat16)
            for (double& v : x) v += off(0x1p14 * std::abs(v));  // 2^-8 of it
        return x;
    }

    void add(const Doubles& x, Doubles* to) {
        for (size_t i = 0; i < x.size(); ++i) (*to)[i] += x[i] + off(std::abs((*to)[i]));
    }

    Doubles normalized(const Norm& norm, const Doubles& x) {
        const auto size = static_cast<double>(x.size());
        double mean = 0, magnitude = 0, square = 0;
        for (double v : x) mean += v / size, magnitude += std::abs(v) / size;
        mean = norm.centered ? mean + off(magnitude) : 0;
        for (double v : x) square += (v - mean) * (v - mean) / size;
        const double factor = 1 / std::sqrt(square + off(2 * square) + norm.epsilon);
        Doubles y(x.size());
        for (size_t i = 0; i < x.size(); ++i) {
            const double scaled = (x[i] - mean + off(std::abs(x[i]) + std::abs(mean))) * factor * norm.weight[i];
            y[i] = scaled + (norm.bias.empty() ? 0 : norm.bias[i]);
        }
        return y;
    }

    Doubles heads_normalized(const std::optional<Norm>& norm, Doubles x) {
        if (!norm) return x;
        for (auto head = x.begin(); head != x.end(); head += m_.dim)
            std::copy_n(normalized(*norm, Doubles(head, head + m_.dim)).begin(), m_.dim, head);
        return x;
    }

    Doubles product(const Matrix& weight, const Doubles& x) {
        Doubles y(static_cast<size_t>(weight.rows));
        for (int64_t o = 0; o < weight.rows; ++o) {
            const double* const w = &weight.exact[o * weight.columns];
            double sum = 0, magnitude = 0;
            for (int64_t k = 0; k < weight.columns; ++k) {
                const double term = x[k] * w[k];
                sum += term, magnitude += std::abs(term);
            }
            y[o] = sum + off(magnitude);
        }
        return y;
    }

    Doubles product(const Linear& linear, const Doubles& x) {
        Doubles y = product(linear.weight, x);
        for (size_t o = 0; o < linear.bias.size(); ++o) y[o] += linear.bias[o];
        for (const Linear::Adapter& a : linear.adapters) add(product(a.up, product(a.down, x)), &y);
        return y;
    }

    Doubles rotated(const Doubles& x, const Step& step, int64_t row) {
        Doubles y = x;
        const int64_t half = m_.rotated / 2;
        for (size_t head = 0; head < x.size(); head += m_.dim)
            for (int64_t i = 0; i < m_.rotated; ++i) {
                const double partner = i < half ? -x[head + i + half] : x[head + i - half];
                const double a = x[head + i] * step.cosine[row * m_.rotated + i];
                const double b = partner * step.sine[row * m_.rotated + i];
                y[head + i] = a + b + off(std::abs(a) + std::abs(b));
            }
        return stored(std::move(y));
    }

    // Returns false if the scores cannot be used.
    bool attend(size_t l, int64_t row, int64_t length, const Doubles& query, Doubles* out) {
        const Layer& layer = m_.layers[l];
        const int64_t seen = m_.prefix_length + length, first = layer.first_seen(m_.first[row], seen);
        const auto at = [&](Positions Cache::* which, Doubles Exact::* numbers, int64_t head, int64_t t) {
            return t < m_.prefix_length ? &(prefix_[l].*numbers)[(m_.prefix[l].*which).at(m_.prefix_row[row], head, t)]
                                        : &(own_[l].*numbers)[(m_.own[l].*which).at(row, head, t - m_.prefix_length)];
        };
        for (int64_t head = 0; head < layer.heads; ++head) {
            const int64_t kv_head = head * layer.kv_heads / layer.heads;
            Doubles p;
            for (int64_t t = first; t < seen; ++t) {
                const double *const q = &query[head * m_.dim], *const k = at(&Cache::key, &Exact::key, kv_head, t);
                double score = 0, magnitude = 0;
                for (int64_t i = 0; i < m_.dim; ++i) {
                    const double term = q[i] * layer.scale * k[i];
                    score += term, magnitude += std::abs(term);
                }
                score += off(magnitude);
                if (layer.softcap > 0)
                    score = layer.softcap * std::tanh(score / layer.softcap) + off(4 * layer.softcap);
                if (!std::isfinite(score)) return false;
                p.push_back(score + off(4));
            }
            const double top = *std::max_element(p.begin(), p.end());
            double mass = 0;
            for (double& score : p) mass += score = std::exp(score - top);
            Doubles sum(static_cast<size_t>(m_.dim)), magnitude(sum);
            for (int64_t t = first; t < seen; ++t) {
                const double* const v = at(&Cache::value, &Exact::value, kv_head, t);
                for (int64_t i = 0; i < m_.dim; ++i) {
                    const double term = p[t - first] / mass * v[i];
                    sum[i] += term, magnitude[i] += std::abs(term);
                }
            }
            for (int64_t i = 0; i < m_.dim; ++i) out->push_back(sum[i] + off(magnitude[i]));
        }
        return true;
    }

    const Model& m_;
    bool noisy_;
    Random random_;
    std::vector<Exact> own_, prefix_;  // of each layer
};

// What a step must make of all rows.
struct Expected {
    std::vector<Outcome> rows;
    std::vector<Doubles> tolerance;  // of each row's parts
    std::vector<Usable> usable;      // in the first layer that has a row whose scores are not finite

    bool finite() const { return std::count(usable.begin(), usable.end(), Usable::kNo) == 0; }
};

std::vector<Expected> expected_steps(const Model& m, Random& random) {
    constexpr int kNoisy = 4;
    Reference exact(m, 0);
    std::vector<Reference> noisy;
    for (int n = 0; n < kNoisy; ++n) noisy.emplace_back(m, random.bits() | 1);
    std::vector<Expected> steps;
    for (const Step& step : m.steps) {
        Expected e;
        size_t bad_layer = m.layers.size();
        for (int64_t r = 0; r < step.rows; ++r) {
            e.rows.push_back(exact.run(step, r));
            const std::vector<Doubles>& parts = e.rows.back().parts;
            bad_layer = std::min(bad_layer, e.rows.back().bad_layer);
            e.tolerance.emplace_back(parts.size());
            for (Reference& reference : noisy) {
                const Outcome other = reference.run(step, r);
                for (size_t p = 0; p < parts.size(); ++p)
                    for (size_t i = 0; i < parts[p].size(); ++i)
                        e.tolerance.back()[p] =
                            std::max(e.tolerance.back()[p],
                                     8 * std::abs(other.parts[p][i] - parts[p][i]) + 1e-6 * std::abs(parts[p][i]));
            }
        }
        for (const Outcome& row : e.rows)
            e.usable.push_back(bad_layer < m.layers.size() && row.bad_layer == bad_layer ? Usable::kNo : Usable::kYes);
        steps.push_back(std::move(e));
        if (!steps.back().finite()) break;  // what such a row leaves in the cache is nobody's
    }
    return steps;
}

void check_same(const Case& c, const Positions& now, const Positions& before) {
    if (now.x.same_bits(before.x)) return;
    for (int64_t i = 0; i < now.x.size(); ++i)
        if (!now.x.same_bits(before.x, i)) c.fail("wrote to element %lld of a cache", static_cast<long long>(i));
}

// Checks what a step has written of keys or values, that it has written nothing else, and notes it in `before`.
void check_written(const Case& c, const Model& m, const Step& step, const Expected& e, size_t part, int64_t kv_heads,
                   const Positions& now, Positions* before) {
    for (int64_t r = 0; r < step.rows; ++r)
        for (int64_t i = 0; i < kv_heads * m.dim; ++i) {
            const int64_t at = now.at(r, i / m.dim, step.length - 1) + i % m.dim;
            if (part < e.rows[r].parts.size())  // layers after one of unusable scores may write anything
                c.check_near(part % 2 ? "key" : "value", r, i, now.x.get(at), e.rows[r].parts[part][i],
                             e.tolerance[r][part]);
            before->x.set(at, now.x.get(at));
        }
    check_same(c, now, *before);
}

}  // namespace

void fuzz_decoder(Case& c) {
    Model m = Model::random(c.random);
    const std::vector<Expected> expected = expected_steps(m, c.random);
    const int threads = static_cast<int>(c.random.between(1, 2));
    c.for_each_isa([&] {
        std::vector<Numbers> held;
        std::vector<DecoderLayer> layers;
        for (Layer& layer : m.layers) layers.push_back(layer.pack(&held));
        Decoder decoder(layers, m.final_norm.weights(), m.dim);
        std::vector<Cache> own = m.own, before = m.own, prefix = m.prefix;
        for (size_t s = 0; s < expected.size(); ++s) {
            const Step& step = m.steps[s];
            const Expected& e = expected[s];
            std::vector<float> hidden = step.hidden;
            DecoderStep arguments{hidden.data(),
                                  step.rows,
                                  step.cosine.data(),
                                  step.sine.data(),
                                  m.rotated,
                                  m.dtype,
                                  {},
                                  {},
                                  m.prefix_row.data(),
                                  m.first.data(),
                                  threads};
            for (size_t l = 0; l < layers.size(); ++l) {
                arguments.own.push_back(cached(own[l].key, own[l].value, step.length));
                arguments.prefix.push_back(cached(prefix[l].key, prefix[l].value, m.prefix_length));
            }
            check_first_bad(c, e.usable, decoder.step(arguments));
            for (size_t l = 0; l < layers.size(); ++l) {
                const int64_t kv_heads = m.layers[l].kv_heads;
                check_written(c, m, step, e, 2 * l + 1, kv_heads, own[l].key, &before[l].key);
                check_written(c, m, step, e, 2 * l + 2, kv_heads, own[l].value, &before[l].value);
                check_same(c, prefix[l].key, m.prefix[l].key);
                check_same(c, prefix[l].value, m.prefix[l].value);
            }
            for (int64_t r = 0; r < step.rows; ++r)
                for (int64_t i = 0; i < m.size && e.rows[r].bad_layer == layers.size(); ++i)
                    c.check_near("hidden", r, i, hidden[r * m.size + i], e.rows[r].parts[0][i], e.tolerance[r][0]);
        }
    });
}

}  // namespace pmc::fuzz
