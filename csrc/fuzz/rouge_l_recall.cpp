// rouge_l_lcs against the quadratic dynamic program.
#include "cpu/rouge_l_recall.h"

#include <algorithm>

#include "fuzz/fuzz.h"

namespace pmc::fuzz {
namespace {

struct Texts {
    std::vector<int32_t> ids;
    std::vector<int64_t> offsets{0};

    void add(Random& random, int64_t alphabet, int32_t base) {
        const int64_t size = random.one_in(3) ? random.pick<int64_t>({0, 1, 63, 64, 65, 127, 128, 129, 192, 256})
                                              : random.between(0, random.one_in(5) ? 400 : 80);
        for (int64_t i = 0; i < size; ++i) ids.push_back(static_cast<int32_t>(base + random.between(0, alphabet - 1)));
        offsets.push_back(static_cast<int64_t>(ids.size()));
    }
};

int64_t quadratic(const int32_t* a, int64_t a_size, const int32_t* b, int64_t b_size) {
    std::vector<int64_t> above(b_size + 1), row(b_size + 1);
    for (int64_t i = 0; i < a_size; ++i) {
        for (int64_t j = 0; j < b_size; ++j) row[j + 1] = a[i] == b[j] ? above[j] + 1 : std::max(above[j + 1], row[j]);
        std::swap(above, row);
    }
    return above[b_size];
}

}  // namespace

void fuzz_rouge_l_recall(Case& c) {
    Random& random = c.random;
    const int64_t pairs = random.between(0, 3);
    Texts candidates, references;
    for (int64_t p = 0; p < pairs; ++p) {
        const int64_t alphabet = random.pick<int64_t>({1, 2, 5, 50, 1000, 1 << 30});
        const int32_t base = random.pick<int32_t>({0, INT32_MIN, INT32_MAX - (1 << 30), -3});
        candidates.add(random, alphabet, base);
        references.add(random, alphabet, base);
    }
    for (Texts* texts : {&candidates, &references}) texts->ids.shrink_to_fit(), texts->offsets.shrink_to_fit();
    std::vector<int64_t> got(pairs, -1);
    rouge_l_lcs(candidates.ids.data(), candidates.offsets.data(), references.ids.data(), references.offsets.data(),
                pairs, got.data());
    for (int64_t p = 0; p < pairs; ++p) {
        const int64_t begin = candidates.offsets[p], other = references.offsets[p];
        const int64_t want = quadratic(candidates.ids.data() + begin, candidates.offsets[p + 1] - begin,
                                       references.ids.data() + other, references.offsets[p + 1] - other);
        if (got[p] != want)
            c.fail("pair %lld: length %lld, expected %lld", static_cast<long long>(p), static_cast<long long>(got[p]),
                   static_cast<long long>(want));
    }
}

}  // namespace pmc::fuzz
