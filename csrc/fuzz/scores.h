// What the fuzzers of scores and their gradients share: targets, and what rows of logits must give for them, in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "fuzz/fuzz.h"

namespace pmc::fuzz {

// What a row must give, in double.
struct ExpectedScore {
    Usable usable;
    double nll = 0, nll_tolerance = 0;
    std::vector<double> share;  // softmax times the soft cap's derivative
    double share_tolerance = 0;
    std::vector<double> gradient;
    double gradient_tolerance = 0;
    bool gradient_in_range = false;

    ExpectedScore(const Logits& logits, int64_t row, float temperature, int64_t target, float weight) {
        const std::vector<double> y = logits.transformed(row);
        const double error = logits.error(), scaled_error = error / temperature;
        usable = fuzz::usable(y, error, temperature);
        if (usable == Usable::kNo) return;

        std::vector<double> scaled(y.size());
        for (size_t i = 0; i < y.size(); ++i)
            scaled[i] = error > 0 ? y[i] / temperature : static_cast<float>(y[i]) / temperature;  // as kernels round
        const double top = *std::max_element(scaled.begin(), scaled.end());
        double mass = 0;
        for (double s : scaled) mass += std::exp(s - top);
        nll = top - scaled[target] + std::log(mass);
        nll_tolerance = 3e-5 + 1e-6 * std::abs(nll) + 3 * scaled_error;

        const double scale = static_cast<double>(weight) / temperature * logits.head.logit_scale;
        gradient_in_range = weight == 0 || (std::isnormal(weight / temperature) && std::abs(scale) < 1e37);
        share_tolerance = 5e-5 + 3 * scaled_error;
        gradient_tolerance = std::abs(scale) * share_tolerance + 1e-37;
        for (size_t i = 0; i < y.size(); ++i) {
            const double capped = logits.head.softcap > 0 ? y[i] / logits.head.softcap : 0;
            const double p = std::exp(scaled[i] - top) / mass, slope = 1 - capped * capped;
            share.push_back(p * slope);
            gradient.push_back((p - (static_cast<int64_t>(i) == target)) * scale * slope);
        }
    }
};

// Targets and weights of random rows, and what these must give.
struct Targets {
    std::vector<int64_t> target;
    std::vector<float> weight;
    std::vector<ExpectedScore> expected;
    std::vector<Usable> usable;

    Targets(Random& random, const Logits& logits, float temperature) {
        for (int64_t r = 0; r < logits.rows; ++r) {
            target.push_back(random.pick<int64_t>({0, logits.vocab - 1, random.between(0, logits.vocab - 1)}));
            weight.push_back(random.pick({0.0f, 1.0f, -0.5f, 1e-30f, random.normal()}));
            expected.emplace_back(logits, r, temperature, target.back(), weight.back());
            usable.push_back(expected.back().usable);
        }
    }
};

// Checks the gradient that was written over `logits`, and that nothing was between the rows.
inline void check_gradient(const Case& c, const Logits& logits, const std::vector<ExpectedScore>& expected,
                           const Numbers& z) {
    for (int64_t r = 0; r < logits.rows; ++r) {
        const ExpectedScore& e = expected[r];
        for (int64_t i = 0; i < logits.stride && (r + 1 < logits.rows || i < logits.vocab); ++i) {
            const int64_t at = r * logits.stride + i;
            if (i >= logits.vocab) {
                if (!z.same_bits(logits.z, at))
                    c.fail("wrote to [%lld, %lld]", static_cast<long long>(r), static_cast<long long>(i));
            } else if (e.usable == Usable::kYes && e.gradient_in_range) {
                c.check_near("gradient", r, i, z.get(at), e.gradient[i],
                             e.gradient_tolerance + rounding(z.dtype()) * std::abs(e.gradient[i]));
            }
        }
    }
}

}  // namespace pmc::fuzz
