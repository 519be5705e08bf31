// A decoder's steps in double, a row at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "fuzz/decoder_model.h"

namespace pmc::fuzz {

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
            const Doubles x = layer.norm ? normalized(*layer.norm, h) : h;
            Doubles states = product(layer.query, x), keys, values;
            if (layer.key)
                keys = product(*layer.key, x), values = product(*layer.value, x);
            else
                std::tie(states, keys, values) = dealt(states);
            for (Doubles* made : {&states, &keys, &values})
                for (double& v : *made) v = std::clamp<double>(v, -layer.clip, layer.clip);
            const Doubles key = rotated(runs_normalized(layer.key_norm, keys), layer, step, row);
            const Doubles value = stored(values);
            const Doubles query = rotated(runs_normalized(layer.query_norm, states), layer, step, row);
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
            const Doubles before = layer.mlp_norm ? h : x;
            add(runs_normalized(layer.output_norm, product(layer.output, stored(attended))), &h);
            const Doubles& in = layer.parallel ? before : h;
            const Doubles y = layer.mlp_norm ? normalized(*layer.mlp_norm, in) : in;
            Doubles inner = product(layer.up, y);
            const Doubles gate = layer.gate ? product(*layer.gate, y) : inner;
            for (size_t i = 0; i < inner.size(); ++i) {
                const double activation = activated(layer.activation, gate[i]) + off(8 * std::abs(gate[i]));
                inner[i] = layer.gate ? inner[i] * activation : activation;
            }
            add(runs_normalized(layer.down_norm, product(layer.down, inner)), &h);
        }
        outcome.parts[0] = normalized(m_.final_norm, h);
        return outcome;
    }

  private:
    struct Exact {  // of one layer
        Doubles key, value;
    };

    static double activated(Activation activation, double x) {
        if (activation == Activation::kSilu) return x / (1 + std::exp(-x));
        if (activation == Activation::kRelu) return std::max(x, 0.0);
        if (activation == Activation::kGelu) return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
        return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    }

    static Doubles exact(const Positions& p) {
        Doubles x(static_cast<size_t>(p.x.size()));
        for (int64_t i = 0; i < p.x.size(); ++i) x[i] = p.x.get(i);
        return x;
    }

    // Up or down by some roundings of a float of this magnitude, no two alike, or two of them would often cancel;
    // nothing without noise.
    double off(double magnitude) {
        if (!noisy_) return 0;
        const double share = random_.uniform() - 0.5;
        return (share < 0 ? share - 0.5 : share + 0.5) * 0x1p-22 * magnitude;
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

    // Each run of as many numbers as the norm has.
    Doubles runs_normalized(const std::optional<Norm>& norm, Doubles x) {
        if (!norm) return x;
        const auto size = static_cast<std::ptrdiff_t>(norm->weight.size());
        for (auto run = x.begin(); run != x.end(); run += size)
            std::copy_n(normalized(*norm, Doubles(run, run + size)).begin(), size, run);
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

    // Of each head its query, its key, its value.
    std::tuple<Doubles, Doubles, Doubles> dealt(const Doubles& x) const {
        Doubles parts[3];
        for (size_t i = 0; i < x.size(); ++i) parts[i / m_.dim % 3].push_back(x[i]);
        return {parts[0], parts[1], parts[2]};
    }

    Doubles rotated(const Doubles& x, const Layer& layer, const Step& step, int64_t row) {
        Doubles y = x;
        const int64_t half = m_.rotated / 2, angles = (layer.rotary * step.rows + row) * m_.rotated;
        for (size_t head = 0; head < x.size(); head += m_.dim)
            for (int64_t i = 0; i < m_.rotated; ++i) {
                const double partner = i < half ? -x[head + i + half] : x[head + i - half];
                const double a = x[head + i] * step.cosine[angles + i];
                const double b = partner * step.sine[angles + i];
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

}  // namespace pmc::fuzz
