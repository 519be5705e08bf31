// Philox-4x32-10 (Salmon et al., SC 2011) and the Gumbel noise made from it: pmc_fast/philox.py in C++.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace pmc {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments
constexpr int kPhiloxRounds = 10;

// The largest noise any word can give (word 0): a token that trails by more than this cannot win.
constexpr float kMaxGumbel = 22.8739f;

// Draws are identified by (seed, sequence, position, token); one block of Philox holds the words of four tokens.
struct Draw {
    uint64_t seed;
    uint32_t sequence, position;
    uint32_t first_block = 0;  // token t of a row draws the noise of token 4 * first_block + t
    static constexpr uint32_t stream = 0;
};

// The counter in, the words out; `multiply(a, b, &high, &low)` is the 64-bit product of each of a's lanes with b.
template <class Words, class Multiply>
PMC_HD void philox_rounds(uint64_t seed, Words& c0, Words& c1, Words& c2, Words& c3, const Multiply& multiply) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        Words high0, low0, high1, low1;
        multiply(c0, kPhiloxM0, &high0, &low0);
        multiply(c2, kPhiloxM1, &high1, &low1);
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
    }
}

// g = -log(-log1p(-u)), u = (word + 0.5) / 2^32, in double so that every implementation rounds to the same float.
PMC_HD float gumbel_from_word(uint32_t word) {
    const double u = (static_cast<double>(word) + 0.5) * 0x1p-32;
    return static_cast<float>(-log(-log1p(-u)));
}

// An upper bound of gumbel_from_word, at most 0.1 above it where it matters (large noise), is
//   kBoundOffset - kBoundSlope * (bits of float(word) - bits of 1.0f):
// -log(-log1p(-u)) <= -log(u), and reading a float's bits as a line between powers of two bounds its log2 from below.
constexpr float kBoundOffset = 22.1808f, kBoundSlope = 8.26295829e-8f;  // ln 2 * 32, rounded up; ln 2 * 2^-23
constexpr int32_t kBitsOfOne = 0x3F800000;

}  // namespace pmc
