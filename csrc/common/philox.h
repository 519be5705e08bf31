// Philox-4x32-10 (Salmon et al., SC 2011) and the Gumbel noise made from it: pmc_fast/philox.py in C++.
#pragma once

#include <cmath>
#include <cstdint>

namespace pmc {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments
constexpr int kPhiloxRounds = 10;

// The largest noise any word can give (word 0): a token that trails by more than this cannot win.
constexpr float kMaxGumbel = 22.8739f;

// g = -log(-log1p(-u)), u = (word + 0.5) / 2^32, in double so that every implementation rounds to the same float.
inline float gumbel_from_word(uint32_t word) {
    const double u = (static_cast<double>(word) + 0.5) * 0x1p-32;
    return static_cast<float>(-std::log(-std::log1p(-u)));
}

}  // namespace pmc
