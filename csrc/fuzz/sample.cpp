// sample and gumbel on the CPU.
#include <limits>

#include "fuzz/draws.h"

namespace pmc::fuzz {

void fuzz_sample(Case& c) {
    Random& random = c.random;
    Logits logits = Logits::random(random);
    const Options options = Options::random(random, logits.vocab);
    const auto rows = static_cast<size_t>(logits.rows);
    const int threads = static_cast<int>(random.between(1, 2));
    std::vector<int64_t> sequence(rows), position(rows);
    std::vector<ExpectedDraw> expected;
    std::vector<Usable> usable;
    for (size_t r = 0; r < rows; ++r) {
        sequence[r] = counter(random), position[r] = counter(random);
        expected.emplace_back(logits, r, options, sequence[r], position[r]);
        usable.push_back(expected.back().usable());
    }
    c.for_each_isa([&] {
        constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
        std::vector<int64_t> token(rows, -1);
        std::vector<float> logprob(rows, kNaN), sampling_logprob(rows, kNaN), kept_mass(rows, kNaN);
        std::vector<uint8_t> workspace(std::min<size_t>(threads, rows) * sample_workspace_bytes(logits.vocab), 0xFF);
        const int64_t bad =
            kernels().sample({logits.z.data(), logits.z.dtype(), logits.rows, logits.vocab, logits.stride, logits.head,
                              options.temperature, options.top_k, options.top_p, options.log_min_p, options.seed,
                              sequence.data(), position.data(), token.data(), logprob.data(), sampling_logprob.data(),
                              kept_mass.data(), workspace.data(), threads});
        check_first_bad(c, usable, bad);
        for (size_t r = 0; r < rows; ++r)
            if (usable[r] == Usable::kYes)
                expected[r].check(c, r, token[r], logprob[r], sampling_logprob[r], kept_mass[r]);
    });
}

void fuzz_gumbel(Case& c) {
    Random& random = c.random;
    const int64_t rows = random.between(0, 3), vocab = random.size();
    const uint64_t seed = random.bits();
    std::vector<int64_t> sequence, position;
    for (int64_t r = 0; r < rows; ++r) sequence.push_back(counter(random)), position.push_back(counter(random));
    sequence.shrink_to_fit(), position.shrink_to_fit();
    c.for_each_isa([&] {
        std::vector<float> got(rows * vocab);
        kernels().gumbel({rows, vocab, seed, sequence.data(), position.data(), got.data(), 2});
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < vocab; ++i)
                c.check_near("noise", r, i, got[r * vocab + i], noise(seed, sequence[r], position[r], i), 0);
    });
}

}  // namespace pmc::fuzz
