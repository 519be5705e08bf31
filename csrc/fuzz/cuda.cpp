// The CUDA kernels on an emulated GPU, whose size and order of threads change from case to case.
#include <limits>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/noise.h"
#include "fuzz/draws.h"

namespace pmc::fuzz {
namespace {

void some_gpu(Case* c) {
    Random& random = c->random;
    // The less an SM has, the more blocks share a row; the less a block may have, the more of it is read again.
    const int block = random.pick({25 << 10, 30 << 10, 163 << 10});
    const int sm = 2 * static_cast<int>(random.between(10 << 10, 60 << 10));
    cuda::emulated::device = {random.pick({32, 32, 32, 64, 128}), block, sm, random.one_in(2)};
    cuda::emulated::multiprocessors = static_cast<int>(random.between(2, 5));
    cuda::emulated::order = random.bits();
    c->isa = "an emulated GPU";
}

constexpr int64_t kLong = 3000;  // rows of more equal tokens than a block's list of candidates holds

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// What must be drawn, from each row of logits once or from rows in any order, and room for what a kernel says.
struct Drawn {
    Drawn(Random& random, const Logits& logits, const Options& options, bool grouped = false)
        : rows(static_cast<size_t>(grouped ? random.between(0, 3 * logits.rows) : logits.rows)),
          logits_row(grouped ? rows : 0),
          sequence(rows),
          position(rows),
          token(rows, -1),
          logprob(rows, kNaN),
          sampling_logprob(rows, kNaN),
          kept_mass(rows, kNaN),
          bad(static_cast<int32_t>(rows)) {
        for (size_t r = 0; r < rows; ++r) {
            sequence[r] = counter(random), position[r] = counter(random);
            if (grouped) logits_row[r] = random.between(0, logits.rows - 1);
            const int64_t from = grouped ? logits_row[r] : static_cast<int64_t>(r);
            expected.emplace_back(logits, from, options, sequence[r], position[r]);
            usable.push_back(expected.back().usable());
        }
    }

    cuda::SampleArgs arguments(const void* z, const Logits& logits, const Options& options) {
        return {z,
                logits_row.empty() ? nullptr : logits_row.data(),
                static_cast<int64_t>(rows),
                logits.vocab,
                logits.stride,
                logits.bias.empty() ? nullptr : logits.bias.data(),
                logits.head,
                options.temperature,
                options.top_k,
                options.top_p,
                options.log_min_p,
                options.seed,
                sequence.data(),
                position.data(),
                token.data(),
                logprob.data(),
                sampling_logprob.data(),
                kept_mass.data(),
                &bad,
                0};
    }

    void check(const Case& c) const {
        check_first_bad(c, usable, bad == static_cast<int32_t>(rows) ? kAllRowsFinite : bad);
        for (size_t r = 0; r < rows; ++r)
            if (usable[r] == Usable::kYes)
                expected[r].check(c, r, token[r], logprob[r], sampling_logprob[r], kept_mass[r]);
    }

    size_t rows;
    std::vector<int64_t> logits_row, sequence, position, token;
    std::vector<float> logprob, sampling_logprob, kept_mass;
    int32_t bad;
    std::vector<ExpectedDraw> expected;
    std::vector<Usable> usable;
};

void some_bias(Random& random, Logits* logits) {
    if (random.one_in(4))
        for (int64_t i = 0; i < logits->vocab; ++i)
            logits->bias.push_back(random.one_in(9) ? -INFINITY : random.normal());
}

// Rows of numbers whose products' sums are exact in any order, 16 bytes times something apart.
struct Matrix {
    Matrix(Random& random, int64_t rows, int64_t columns, float unit)
        : stride((columns + 7) / 8 * 8 + 8 * random.between(0, 2)),
          z(Dtype::kBFloat16, rows ? (rows - 1) * stride + columns : 0, random.nan()) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < columns; ++i)
                z.set(r * stride + i, unit * static_cast<float>(random.between(-8, 8)));
    }

    int64_t stride;
    Numbers z;
};

}  // namespace

void fuzz_cuda_sample(Case& c) {
    Random& random = c.random;
    some_gpu(&c);
    Logits logits = Logits::random(random, kLong);
    some_bias(random, &logits);
    const Options options = Options::random(random, logits.vocab);
    Drawn drawn(random, logits, options, random.one_in(3));
    cuda::sample(drawn.arguments(logits.z.data(), logits, options), logits.z.dtype(), {});
    drawn.check(c);
}

void fuzz_cuda_linear_sample(Case& c) {
    Random& random = c.random;
    if (!random.one_in(3)) return;  // since one case takes as long as three of the others
    some_gpu(&c);
    // Few of all, or many rows, or more tiles than blocks take at once, or more steps than there are stages.
    const int64_t kind = random.between(0, 14);
    const int64_t rows = kind == 0 ? random.between(33, 256) : random.between(0, 6);
    const int64_t vocab = random.between(1, kind % 5 == 1 ? 1500 : 300);
    const int64_t size = random.between(1, kind == 0 || kind % 5 == 1 ? 70 : kind % 5 == 2 ? 700 : 200);
    Matrix hidden(random, rows, size, 0.25f), weight(random, vocab, size, random.pick({0x1p-9f, 0x1p-5f, 0.5f}));
    if (rows && random.one_in(8))
        hidden.z.set(random.between(0, rows - 1) * hidden.stride, random.one_in(2) ? random.nan() : INFINITY);

    for (int i = 0; i < 100; ++i) {
        const auto word = static_cast<uint32_t>(random.bits() >> random.between(32, 63));
        c.check_near("noise", 0, word, cuda::about_gumbel(word), gumbel_from_word(word), cuda::kNoiseError / 2);
    }

    Logits logits{rows, vocab, vocab + random.between(0, 5), {1, 0}, Numbers(Dtype::kFloat32, 0, 0)};
    logits.z = Numbers(Dtype::kFloat32, rows * logits.stride, kNaN);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t v = 0; v < vocab; ++v) {
            float sum = 0;
            for (int64_t i = 0; i < size; ++i)
                sum += hidden.z.get(r * hidden.stride + i) * weight.z.get(v * weight.stride + i);
            logits.z.set(r * logits.stride + v, sum);
        }
    some_bias(random, &logits);
    if (random.one_in(4)) logits.head.logit_scale = random.pick({0.25f, -1.0f, 1e-30f, 1e30f});
    if (random.one_in(4)) logits.head.softcap = random.pick({1.0f, 30.0f, 0.01f});
    const Options options = Options::random(random, vocab);
    Drawn drawn(random, logits, options);

    const bool truncates = options.temperature > 0 && ((options.top_k > 0 && options.top_k < vocab) ||
                                                       options.top_p < 1 || options.log_min_p > -INFINITY);
    Numbers products(Dtype::kFloat32, truncates ? rows * logits.stride : 0, kNaN);
    std::vector<float> parts(truncates ? 0 : cuda::linear_sample_scratch(rows, vocab, {}) / sizeof(float), kNaN);
    cuda::linear_sample({hidden.z.data(), weight.z.data(), size, hidden.stride, weight.stride,
                         truncates ? static_cast<float*>(products.data()) : nullptr, parts.data(),
                         drawn.arguments(nullptr, logits, options)},
                        {});
    drawn.check(c);
}

}  // namespace pmc::fuzz
