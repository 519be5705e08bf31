// Philox words of many tokens at once.
#pragma once

#include "common/philox.h"
#include "cpu/simd.h"

namespace pmc::PMC_ISA {
namespace {

struct Block {
    Words word[4];
};

// Lane i of word[w] belongs to token 4 * block[i] + w of the row.
inline Block philox(const Draw& draw, Words block) {
    Words c0 = block + broadcast_word(draw.first_block), c1 = broadcast_word(draw.position),
          c2 = broadcast_word(draw.sequence), c3 = broadcast_word(Draw::stream);
    philox_rounds(draw.seed, c0, c1, c2, c3,
                  [](Words a, uint32_t b, Words* high, Words* low) { multiply_wide(a, b, high, low); });
    return {{c0, c1, c2, c3}};
}

// Of gumbel_from_word in each lane.
inline Floats gumbel_bound(Words word) {
    const Floats value = __builtin_convertvector(word, Floats);
    return kBoundOffset - __builtin_convertvector(reinterpret_cast<Ints>(value) - kBitsOfOne, Floats) * kBoundSlope;
}

}  // namespace
}  // namespace pmc::PMC_ISA
