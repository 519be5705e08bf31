// Steps of a whole decoder against the same in double, on caches whose other elements are NaN.
#include "cpu/decoder.h"

#include <algorithm>
#include <cmath>

#include "fuzz/decoder_reference.h"

namespace pmc::fuzz {
namespace {

// What a step must make of all rows.
struct Expected {
    std::vector<Outcome> rows;
    std::vector<Doubles> tolerance;  // of each row's parts
    std::vector<Usable> usable;      // in the first layer that has a row whose scores are not finite

    bool finite() const { return std::count(usable.begin(), usable.end(), Usable::kNo) == 0; }
};

double largest(const Doubles& x) {
    double most = 0;
    for (double v : x) most = std::max(most, std::abs(v));
    return most;
}

// Where roundings are magnified beyond this share of the largest number, by a norm of nearly equal numbers say, a few
// noisy steps do not tell how far they reach, nor what comes of them later: any numbers of that size will do.
constexpr double kMagnified = 0.1;

std::vector<Expected> expected_steps(const Model& m, Random& random) {
    constexpr int kNoisy = 8;
    Reference exact(m, 0);
    std::vector<Reference> noisy;
    for (int n = 0; n < kNoisy; ++n) noisy.emplace_back(m, random.bits() | 1);
    std::vector<Expected> steps;
    std::vector<bool> magnified(m.first.size());  // by row, from some step on
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
            Doubles& tolerance = e.tolerance.back();
            for (size_t p = 0; p < parts.size(); ++p)
                magnified[r] = magnified[r] || tolerance[p] > kMagnified * largest(parts[p]);
            for (size_t p = 0; p < parts.size() && magnified[r]; ++p)
                tolerance[p] = std::max(tolerance[p], 2 * largest(parts[p]));
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
