// sample and gumbel on the CPU.
#include <algorithm>
#include <limits>
#include <numeric>

#include "fuzz/draws.h"

#define PMC_ISA fuzz
#define PMC_LANES 4
#include "cpu/noise.h"

namespace pmc::fuzz {
namespace {

// What the noise of any word can be at most, by which the kernels leave tokens out.
void check_bounds(const Case& c, Random& random) {
    const uint32_t power = 1u << random.between(0, 31);  // where the bound is tightest
    for (uint32_t word : {uint32_t{0}, power - 1, power, static_cast<uint32_t>(random.bits())}) {
        const float g = gumbel_from_word(word), bound = gumbel_bound(broadcast_word(word))[0];
        if (g > kMaxGumbel || g > bound)
            c.fail("the noise of word %u is %.9g, its bounds %.9g and %.9g", word, g, bound, kMaxGumbel);
    }
}

}  // namespace

void fuzz_sample(Case& c) {
    Random& random = c.random;
    Logits logits = Logits::random(random);
    Options options = Options::random(random, logits.vocab);
    options.first_token = 4 * random.pick<int64_t>({0, 0, 1, random.between(0, 1 << 16), random.between(0, 1 << 29)});
    const auto rows = static_cast<size_t>(logits.rows);
    const int threads = static_cast<int>(random.between(1, 2));
    // Several draws of a row, or none, in any order; or one of each.
    const bool grouped = random.between(0, 1);
    const size_t draws = grouped ? static_cast<size_t>(random.between(0, 3 * logits.rows)) : rows;
    std::vector<int64_t> begin(rows + 1), order(draws), row_of(draws), sequence(draws), position(draws);
    for (size_t i = 0; i < draws; ++i) {
        row_of[i] = grouped ? random.between(0, logits.rows - 1) : static_cast<int64_t>(i);
        sequence[i] = counter(random), position[i] = counter(random), order[i] = static_cast<int64_t>(i);
        ++begin[static_cast<size_t>(row_of[i]) + 1];
    }
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return row_of[static_cast<size_t>(a)] < row_of[static_cast<size_t>(b)];
    });
    std::vector<ExpectedDraw> expected;
    std::vector<Usable> usable;
    for (size_t r = 0; r < rows; ++r)
        usable.push_back(begin[r] == begin[r + 1] ? Usable::kYes : ExpectedDraw(logits, r, options, 0, 0).usable());
    for (size_t i = 0; i < draws; ++i)
        expected.emplace_back(logits, static_cast<size_t>(row_of[i]), options, sequence[i], position[i]);
    c.for_each_isa([&] {
        constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
        std::vector<int64_t> token(draws, -1);
        std::vector<float> logprob(draws, kNaN), sampling_logprob(draws, kNaN), kept_mass(draws, kNaN);
        std::vector<uint8_t> workspace(std::min<size_t>(threads, rows) * sample_workspace_bytes(logits.vocab), 0xFF);
        const int64_t bad = kernels().sample({logits.z.data(),
                                              logits.z.dtype(),
                                              logits.rows,
                                              logits.vocab,
                                              logits.stride,
                                              logits.head,
                                              options.temperature,
                                              options.top_k,
                                              options.top_p,
                                              options.log_min_p,
                                              options.seed,
                                              grouped ? begin.data() : nullptr,
                                              grouped ? order.data() : nullptr,
                                              sequence.data(),
                                              position.data(),
                                              token.data(),
                                              logprob.data(),
                                              sampling_logprob.data(),
                                              kept_mass.data(),
                                              workspace.data(),
                                              threads,
                                              options.first_token});
        check_first_bad(c, usable, bad);
        for (size_t i = 0; i < draws; ++i)
            if (usable[static_cast<size_t>(row_of[i])] == Usable::kYes)
                expected[i].check(c, i, token[i], logprob[i], sampling_logprob[i], kept_mass[i]);
    });
}

void fuzz_gumbel(Case& c) {
    Random& random = c.random;
    const int64_t rows = random.between(0, 3), vocab = random.size();
    const uint64_t seed = random.bits();
    std::vector<int64_t> sequence, position;
    for (int64_t r = 0; r < rows; ++r) sequence.push_back(counter(random)), position.push_back(counter(random));
    sequence.shrink_to_fit(), position.shrink_to_fit();
    check_bounds(c, random);
    c.for_each_isa([&] {
        std::vector<float> got(rows * vocab);
        kernels().gumbel({rows, vocab, seed, sequence.data(), position.data(), got.data(), 2});
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < vocab; ++i)
                c.check_near("noise", r, i, got[r * vocab + i], noise(seed, sequence[r], position[r], i), 0);
    });
}

}  // namespace pmc::fuzz
