// cross_entropy and its gradient on the CPU.
#include <limits>
#include <vector>

#include "fuzz/scores.h"

namespace pmc::fuzz {

void fuzz_cross_entropy(Case& c) {
    Random& random = c.random;
    const Logits logits = Logits::random(random);
    const auto rows = static_cast<size_t>(logits.rows);
    const bool weighted = random.one_in(2);
    const int threads = static_cast<int>(random.between(1, 2));
    const Targets targets(random, logits, 1);
    c.for_each_isa([&] {
        Numbers z = logits.z;
        std::vector<float> nll(rows, std::numeric_limits<float>::quiet_NaN());
        std::vector<uint8_t> workspace(threads * head_workspace_bytes(logits.vocab), 0xFF);
        const int64_t bad = kernels().cross_entropy(
            {z.data(), z.dtype(), logits.rows, logits.vocab, logits.stride, logits.head, targets.target.data(),
             weighted ? targets.weight.data() : nullptr, nll.data(), workspace.data(), threads});
        check_first_bad(c, targets.usable, bad);
        for (size_t r = 0; r < rows; ++r) {
            const ExpectedScore& e = targets.expected[r];
            if (e.usable == Usable::kYes)
                c.check_near("nll", static_cast<int64_t>(r), 0, nll[r], static_cast<float>(e.nll), e.nll_tolerance);
        }
        if (weighted)
            check_gradient(c, logits, targets.expected, z);
        else if (!z.same_bits(logits.z))
            c.fail("wrote to the logits");
    });
}

}  // namespace pmc::fuzz
