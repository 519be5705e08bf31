// The CUDA kernels on an emulated GPU, whose size and order of threads change from case to case.
#include <limits>
#include <numeric>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "fuzz/draws.h"
#include "fuzz/scores.h"

namespace pmc::fuzz {
namespace {

void some_gpu(Case* c) {
    Random& random = c->random;
    // The less an SM has, the more blocks share a row; the less a block may have, the more of it is read again.
    const int block = random.pick({30 << 10, 40 << 10, 163 << 10});
    const int sm = 2 * static_cast<int>(random.between(10 << 10, 60 << 10));
    cuda::emulated::device = {1, random.pick({32, 32, 32, 64, 128}), block, sm, random.one_in(2)};
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
    const auto rows = static_cast<size_t>(logits.rows);
    std::vector<int64_t> sequence(rows), position(rows), token(rows, -1);
    std::vector<float> logprob(rows, kNaN), sampling_logprob(rows, kNaN), kept_mass(rows, kNaN);
    std::vector<ExpectedDraw> expected;
    std::vector<Usable> usable;
    for (size_t r = 0; r < rows; ++r) {
        sequence[r] = counter(random), position[r] = counter(random);
        expected.emplace_back(logits, r, options, sequence[r], position[r]);
        usable.push_back(expected.back().usable());
    }
    auto bad = static_cast<int32_t>(rows);
    cuda::sample({logits.z.data(), logits.rows, logits.vocab, logits.stride,
                  logits.bias.empty() ? nullptr : logits.bias.data(), logits.head, options.temperature, options.top_k,
                  options.top_p, options.log_min_p, options.seed, sequence.data(), position.data(), token.data(),
                  logprob.data(), sampling_logprob.data(), kept_mass.data(), &bad, 0},
                 logits.z.dtype(), {});
    check_first_bad(c, usable, bad == static_cast<int32_t>(rows) ? kAllRowsFinite : bad);
    for (size_t r = 0; r < rows; ++r)
        if (usable[r] == Usable::kYes) expected[r].check(c, r, token[r], logprob[r], sampling_logprob[r], kept_mass[r]);
}

void fuzz_cuda_cross_entropy(Case& c) {
    Random& random = c.random;
    some_gpu(&c);
    const Logits logits = Logits::random(random, kLong);
    const auto rows = static_cast<size_t>(logits.rows);
    const float temperature = random_temperature(random);
    const bool weighted = random.one_in(2);
    std::vector<int64_t> target(rows);
    std::vector<float> weight(rows), nll(rows, kNaN);
    std::vector<ExpectedScore> expected;
    std::vector<Usable> usable;
    for (size_t r = 0; r < rows; ++r) {
        target[r] = random.pick<int64_t>({0, logits.vocab - 1, random.between(0, logits.vocab - 1)});
        weight[r] = random.pick({0.0f, 1.0f, -0.5f, 1e-30f, random.normal()});
        expected.emplace_back(logits, r, temperature, target[r], weight[r]);
        usable.push_back(expected.back().usable);
    }
    // Rows in the middle of a caller's, or anywhere among them.
    const int64_t first = random.between(0, 3);
    std::vector<int64_t> number(rows);
    std::iota(number.begin(), number.end(), first);
    const bool numbered = random.one_in(2);
    if (numbered) std::reverse(number.begin(), number.end());
    const size_t all = rows + static_cast<size_t>(first);
    std::vector<int64_t> its_target(all, -1);
    std::vector<float> its_weight(all, kNaN), its_nll(all, kNaN);
    for (size_t r = 0; r < rows; ++r) its_target[number[r]] = target[r], its_weight[number[r]] = weight[r];
    Numbers z = logits.z;
    auto bad = static_cast<int32_t>(all);
    cuda::cross_entropy({z.data(), logits.rows, logits.vocab, logits.stride, logits.head, temperature,
                         numbered ? number.data() : nullptr, numbered ? -1 : first, its_target.data(),
                         weighted ? its_weight.data() : nullptr, its_nll.data(), &bad, 0},
                        logits.z.dtype(), {});
    if (numbered) std::reverse(usable.begin(), usable.end());
    check_first_bad(c, usable, bad == static_cast<int32_t>(all) ? kAllRowsFinite : bad - first);
    for (size_t r = 0; r < rows; ++r) nll[r] = its_nll[number[r]];
    check_scores(c, logits, expected, weighted, nll, z);
}

void fuzz_cuda_append_token(Case& c) {
    Random& random = c.random;
    some_gpu(&c);
    const int64_t answers = random.between(0, 300), rows = random.between(0, answers), width = random.between(1, 6);
    std::vector<int64_t> ends(static_cast<size_t>(random.between(1, 3)));
    for (int64_t& end : ends) end = random.between(0, 4);
    std::vector<int64_t> limit(answers), length(answers), tokens(answers * width, -1);
    std::vector<float> logprobs(answers * width, kNaN);
    std::vector<double> sum(answers);
    std::vector<uint8_t> finished(answers), done(rows, 0xFF);
    for (int64_t a = 0; a < answers; ++a) {
        limit[a] = random.between(1, width);
        length[a] = random.between(0, limit[a] - 1);
        sum[a] = random.normal();
    }
    std::vector<int64_t> token(rows), slot(rows), position(rows);
    std::vector<float> logprob(rows);
    const int64_t skipped = random.between(0, answers - rows);
    for (int64_t r = 0; r < rows; ++r) {
        token[r] = random.between(0, 4), position[r] = random.between(0, 1000);
        slot[r] = answers - 1 - skipped - r, logprob[r] = random.normal();
    }
    auto want_length = length, want_tokens = tokens, want_position = position;
    auto want_logprobs = logprobs;
    auto want_sum = sum;
    auto want_finished = finished, want_done = done;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t a = slot[r], at = a * width + want_length[a]++;
        want_tokens[at] = token[r], want_logprobs[at] = logprob[r];
        want_sum[a] += logprob[r];
        const bool ended = std::find(ends.begin(), ends.end(), token[r]) != ends.end();
        want_finished[a] = ended;
        want_done[r] = ended || want_length[a] == limit[a];
        ++want_position[r];
    }
    cuda::append_token({token.data(), logprob.data(), slot.data(), rows, ends.data(), static_cast<int64_t>(ends.size()),
                        limit.data(), tokens.data(), logprobs.data(), width, length.data(), sum.data(), finished.data(),
                        position.data(), done.data()},
                       {});
    if (length != want_length || tokens != want_tokens || position != want_position || sum != want_sum ||
        finished != want_finished || done != want_done)
        c.fail("the answers differ");
    for (int64_t i = 0; i < answers * width; ++i)
        c.check_near("logprobs", i / width, i % width, logprobs[i], want_logprobs[i], 0);
}

}  // namespace pmc::fuzz
