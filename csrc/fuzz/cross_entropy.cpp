// cross_entropy and its gradient on the CPU.
#include <limits>

#include "fuzz/scores.h"

namespace pmc::fuzz {

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
