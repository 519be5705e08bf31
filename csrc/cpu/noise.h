// Philox words of many tokens at once.
#pragma once

#include "common/philox.h"
#include "cpu/simd.h"

namespace pmc::PMC_ISA {
namespace {

// Draws are identified by (seed, sequence, position, token); one block holds the words of four tokens.
struct Draw {
    uint64_t seed;
    uint32_t sequence, position;
    static constexpr uint32_t stream = 0;
};

struct Block {
    Words word[4];
};

// Lane i of word[w] belongs to token 4 * block[i] + w.
inline Block philox(const Draw& draw, Words block) {
    Words c0 = block, c1 = broadcast_word(draw.position), c2 = broadcast_word(draw.sequence),
          c3 = broadcast_word(Draw::stream);
    uint32_t k0 = static_cast<uint32_t>(draw.seed), k1 = static_cast<uint32_t>(draw.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        Words high0, low0, high1, low1;
        multiply_wide(c0, kPhiloxM0, &high0, &low0);
        multiply_wide(c2, kPhiloxM1, &high1, &low1);
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
    }
    return {{c0, c1, c2, c3}};
}

// An upper bound of gumbel_from_word in each lane, at most 0.1 above it where it matters (large noise).
// -log(-log1p(-u)) <= -log(u), and reading a float's bits as a line between powers of two bounds its log2 from below.
inline Floats gumbel_bound(Words word) {
    const Floats value = __builtin_convertvector(word, Floats);
    const Floats log2_times_2_23 = __builtin_convertvector(reinterpret_cast<Ints>(value) - 0x3F800000, Floats);
    return 22.1808f - log2_times_2_23 * 8.26295829e-8f;  // ln 2 * (32 - log2(word)), rounded up
}

}  // namespace
}  // namespace pmc::PMC_ISA
