// cross_entropy and its gradient on the CPU.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "fuzz/fuzz.h"

namespace pmc::fuzz {
namespace {

// What a row must give, in double.
struct ExpectedScore {
    Usable usable;
    double nll = 0, nll_tolerance = 0;
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
        gradient_tolerance = std::abs(scale) * (5e-5 + 3 * scaled_error) + 1e-37;
        for (size_t i = 0; i < y.size(); ++i) {
            const double capped = logits.head.softcap > 0 ? y[i] / logits.head.softcap : 0;
            const double p = std::exp(scaled[i] - top) / mass;
            gradient.push_back((p - (static_cast<int64_t>(i) == target)) * scale * (1 - capped * capped));
        }
    }
};

// Checks each row's nll and what was written over `logits`: the gradient where it is `weighted`, else nothing.
void check_scores(const Case& c, const Logits& logits, const std::vector<ExpectedScore>& expected, bool weighted,
                  const std::vector<float>& nll, const Numbers& z) {
    for (int64_t r = 0; r < logits.rows; ++r) {
        const ExpectedScore& e = expected[r];
        if (e.usable == Usable::kYes) c.check_near("nll", r, 0, nll[r], static_cast<float>(e.nll), e.nll_tolerance);
        for (int64_t i = 0; i < logits.stride && (r + 1 < logits.rows || i < logits.vocab); ++i) {
            const int64_t at = r * logits.stride + i;
            if (!weighted || i >= logits.vocab) {
                if (!z.same_bits(logits.z, at))
                    c.fail("wrote to [%lld, %lld]", static_cast<long long>(r), static_cast<long long>(i));
            } else if (e.usable == Usable::kYes && e.gradient_in_range) {
                c.check_near("gradient", r, i, z.get(at), e.gradient[i],
                             e.gradient_tolerance + rounding(z.dtype()) * std::abs(e.gradient[i]));
            }
        }
    }
}

}  // namespace

void fuzz_cross_entropy(Case& c) {
    Random& random = c.random;
    const Logits logits = Logits::random(random);
    const auto rows = static_cast<size_t>(logits.rows);
    const float temperature = random_temperature(random);
    const bool weighted = random.one_in(2);
    const int threads = static_cast<int>(random.between(1, 2));
    std::vector<int64_t> target(rows);
    std::vector<float> weight(rows);
    std::vector<ExpectedScore> expected;
    std::vector<Usable> usable;
    for (size_t r = 0; r < rows; ++r) {
        target[r] = random.pick<int64_t>({0, logits.vocab - 1, random.between(0, logits.vocab - 1)});
        weight[r] = random.pick({0.0f, 1.0f, -0.5f, 1e-30f, random.normal()});
        expected.emplace_back(logits, r, temperature, target[r], weight[r]);
        usable.push_back(expected.back().usable);
    }
    c.for_each_isa([&] {
        Numbers z = logits.z;
        std::vector<float> nll(rows, std::numeric_limits<float>::quiet_NaN());
        std::vector<uint8_t> workspace(threads * cross_entropy_workspace_bytes(logits.vocab), 0xFF);
        const int64_t bad = kernels().cross_entropy(
            {z.data(), z.dtype(), logits.rows, logits.vocab, logits.stride, logits.head, temperature, target.data(),
             weighted ? weight.data() : nullptr, nll.data(), workspace.data(), threads});
        check_first_bad(c, usable, bad);
        check_scores(c, logits, expected, weighted, nll, z);
    });
}

}  // namespace pmc::fuzz
