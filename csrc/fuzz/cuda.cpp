// The CUDA kernel on an emulated GPU, whose size and order of threads change from case to case.
#include <limits>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "fuzz/draws.h"

namespace pmc::fuzz {
namespace {

void some_gpu(Case* c) {
    Random& random = c->random;
    // The less an SM has, the more blocks share a row; the less a block may have, the more of it is read again.
    const int block = random.pick({25 << 10, 30 << 10, 163 << 10});
    const int sm = 2 * static_cast<int>(random.between(10 << 10, 60 << 10));
    cuda::emulated::device = {random.pick({32, 32, 32, 64, 128}), block, sm, random.one_in(2)};
    cuda::emulated::order = random.bits();
    c->isa = "an emulated GPU";
}

constexpr int64_t kLong = 3000;  // rows of more equal tokens than a block's list of candidates holds

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

}  // namespace

void fuzz_cuda_sample(Case& c) {
    Random& random = c.random;
    some_gpu(&c);
    Logits logits = Logits::random(random, kLong);
    if (random.one_in(4))
        for (int64_t i = 0; i < logits.vocab; ++i)
            logits.bias.push_back(random.one_in(9) ? -INFINITY : random.normal());
    const Options options = Options::random(random, logits.vocab);
    // From each row once, or from rows in any order.
    const bool grouped = random.one_in(3), seed_in_memory = random.one_in(2);
    const auto rows = static_cast<size_t>(grouped ? random.between(0, 3 * logits.rows) : logits.rows);
    std::vector<int64_t> logits_row(grouped ? rows : 0), sequence(rows), position(rows), token(rows, -1);
    std::vector<float> logprob(rows, kNaN), sampling_logprob(rows, kNaN), kept_mass(rows, kNaN);
    std::vector<ExpectedDraw> expected;
    std::vector<Usable> usable;
    for (size_t r = 0; r < rows; ++r) {
        sequence[r] = counter(random), position[r] = counter(random);
        if (grouped) logits_row[r] = random.between(0, logits.rows - 1);
        const int64_t from = grouped ? logits_row[r] : static_cast<int64_t>(r);
        expected.emplace_back(logits, from, options, sequence[r], position[r]);
        usable.push_back(expected.back().usable());
    }
    auto bad = static_cast<int32_t>(rows);
    cuda::sample({logits.z.data(),
                  grouped ? logits_row.data() : nullptr,
                  static_cast<int64_t>(rows),
                  logits.vocab,
                  logits.stride,
                  logits.bias.empty() ? nullptr : logits.bias.data(),
                  logits.head,
                  options.temperature,
                  options.top_k,
                  options.top_p,
                  options.log_min_p,
                  seed_in_memory ? 0 : options.seed,
                  seed_in_memory ? &options.seed : nullptr,
                  sequence.data(),
                  position.data(),
                  token.data(),
                  logprob.data(),
                  sampling_logprob.data(),
                  kept_mass.data(),
                  &bad,
                  0},
                 logits.z.dtype(), {});
    check_first_bad(c, usable, bad == static_cast<int32_t>(rows) ? kAllRowsFinite : bad);
    for (size_t r = 0; r < rows; ++r)
        if (usable[r] == Usable::kYes) expected[r].check(c, r, token[r], logprob[r], sampling_logprob[r], kept_mass[r]);
}

}  // namespace pmc::fuzz
