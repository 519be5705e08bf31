// linear_logprob and its gradient on the CPU, from slices of the vocabulary.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "fuzz/scores.h"

namespace pmc::fuzz {
namespace {

// Tokens [begin, end) of every row, in memory that ends with the last of them.
struct Slice {
    int64_t begin, end;
    int64_t stride;
    Numbers z;

    Slice(const Logits& logits, int64_t begin, int64_t end, int64_t padding, float fill)
        : begin(begin),
          end(end),
          stride(end - begin + padding),
          z(logits.z.dtype(), logits.rows ? (logits.rows - 1) * stride + end - begin : 0, fill) {
        for (int64_t r = 0; r < logits.rows; ++r)
            for (int64_t i = begin; i < end; ++i) z.set(r * stride + i - begin, logits.z.get(r * logits.stride + i));
    }
};

std::vector<Slice> random_slices(Random& random, const Logits& logits) {
    std::vector<Slice> slices;
    for (int64_t begin = 0; begin < logits.vocab;) {
        const int64_t most = random.one_in(3) ? logits.vocab : std::max(random.size(), logits.vocab / 10);
        const int64_t end = std::min(logits.vocab, begin + most);
        slices.emplace_back(logits, begin, end, random.one_in(2) ? 0 : random.between(1, 70), random.nan());
        begin = end;
    }
    return slices;
}

}  // namespace

void fuzz_linear_logprob(Case& c) {
    Random& random = c.random;
    const Logits logits = Logits::random(random);
    const auto rows = static_cast<size_t>(logits.rows);
    const float temperature = random_temperature(random);
    const int threads = static_cast<int>(random.between(1, 2));
    const Targets targets(random, logits, temperature);
    const std::vector<Slice> slices = random_slices(random, logits);
    std::vector<bool> in_half;
    for (int64_t i = 0; i < logits.vocab; ++i) in_half.push_back(random.one_in(2));
    c.for_each_isa([&] {
        constexpr double kNothing = std::numeric_limits<double>::quiet_NaN();
        std::vector<RowScore> score(rows, {-std::numeric_limits<double>::infinity(), 0, kNothing});
        const auto kernel_slice = [&](const Slice& slice, Numbers* z, std::vector<uint8_t>* workspace) {
            workspace->assign(threads * head_workspace_bytes(slice.end - slice.begin), 0xFF);
            return LogitSlice{z->data(),   z->dtype(),  logits.rows, slice.end - slice.begin, slice.stride,
                              slice.begin, logits.head, temperature, targets.target.data(),   workspace->data(),
                              threads};
        };
        std::vector<uint8_t> workspace;
        for (const Slice& slice : slices) {
            Numbers z = slice.z;
            kernels().score_slice({kernel_slice(slice, &z, &workspace), score.data()});
            if (!z.same_bits(slice.z)) c.fail("scoring wrote to the logits");
        }
        std::vector<float> normalizer;
        for (size_t r = 0; r < rows; ++r) {
            const ExpectedScore& e = targets.expected[r];
            const bool usable = std::isfinite(score[r].top);
            if (e.usable != Usable::kUnsure && usable != (e.usable == Usable::kYes))
                c.fail("row %lld: the largest logit is %g", static_cast<long long>(r), score[r].top);
            normalizer.push_back(static_cast<float>(score[r].top));
            normalizer.push_back(static_cast<float>(score[r].mass));
            if (e.usable == Usable::kYes)
                c.check_near("nll", static_cast<int64_t>(r), 0,
                             static_cast<float>(score[r].top - score[r].target_logit + std::log(score[r].mass)),
                             static_cast<float>(e.nll), e.nll_tolerance);
        }
        // Calls body(r, i, value) for token i of every row of a slice that was written over.
        const auto for_each_written = [&](const Slice& slice, const Numbers& z, auto&& body) {
            for (int64_t r = 0; r < logits.rows; ++r)
                for (int64_t i = 0; i < slice.stride && r * slice.stride + i < z.size(); ++i) {
                    const int64_t at = r * slice.stride + i;
                    if (i < slice.end - slice.begin)
                        body(r, slice.begin + i, z.get(at));
                    else if (!z.same_bits(slice.z, at))
                        c.fail("wrote to [%lld, %lld] of a slice", static_cast<long long>(r),
                               static_cast<long long>(i));
                }
        };
        Logits written = logits;
        for (const Slice& slice : slices) {
            Numbers z = slice.z;
            kernels().slice_gradient({kernel_slice(slice, &z, &workspace), normalizer.data(), targets.weight.data()});
            for_each_written(slice, z,
                             [&](int64_t r, int64_t i, float value) { written.z.set(r * logits.stride + i, value); });
        }
        check_gradient(c, logits, targets.expected, written.z);

        // With its terms a slice scores the same. Sums: of all terms, and of those that a random half of the tokens
        // have.
        std::vector<RowScore> again(rows, {-std::numeric_limits<double>::infinity(), 0, kNothing});
        std::vector<float> sums(2 * rows, 0);
        for (const Slice& slice : slices) {
            Numbers z = slice.z;
            kernels().score_slice_terms({kernel_slice(slice, &z, &workspace), again.data(), sums.data(), 2});
            std::vector<double> added(sums.size(), 0);
            for_each_written(slice, z, [&](int64_t r, int64_t i, float value) {
                added[2 * r] += value;
                if (in_half[i]) added[2 * r + 1] += value;
            });
            for (size_t i = 0; i < sums.size(); ++i) sums[i] += static_cast<float>(added[i]);
        }
        for (size_t r = 0; r < rows; ++r) {
            const ExpectedScore& e = targets.expected[r];
            if (e.usable != Usable::kYes) continue;
            if (std::memcmp(&again[r], &score[r], sizeof(RowScore)) != 0)
                c.fail("row %lld: another score with its terms", static_cast<long long>(r));
            double want[2] = {0, 0};
            for (int64_t i = 0; i < logits.vocab; ++i) {
                if (i == targets.target[r]) continue;
                want[0] += e.share[i];
                want[1] += in_half[i] ? e.share[i] : 0;
            }
            for (int64_t half : {0, 1})
                c.check_near("sum of terms", static_cast<int64_t>(r), half,
                             static_cast<float>(sums[2 * r + half] / score[r].mass), static_cast<float>(want[half]),
                             e.share_tolerance + rounding(logits.z.dtype()));
        }
    });
}

}  // namespace pmc::fuzz
