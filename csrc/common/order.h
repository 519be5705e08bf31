// The order in which truncation cuts and draws compete: by value, then by lower token id.
#pragma once

#include "common/host_device.h"

namespace pmc {

// Unsigned integers in the order of the floats, which are no NaN; -0 and 0 have one key.
PMC_HD uint32_t order_key(float value) {
    const uint32_t bits = float_bits(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

PMC_HD float from_order_key(uint32_t key) { return bits_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key); }

// Whether (value, token) comes before another pair.
PMC_HD bool comes_first(float value, int64_t token, float other, int64_t other_token) {
    return value > other || (value == other && token < other_token);
}

// The same order in one number, the first being the largest.
PMC_HD uint64_t ranked(float value, int32_t token) {
    return static_cast<uint64_t>(order_key(value)) << 32 | ~static_cast<uint32_t>(token);
}
PMC_HD int32_t token_of(uint64_t ranked_pair) { return static_cast<int32_t>(~static_cast<uint32_t>(ranked_pair)); }

// The kept set: everything up to a place in that order.
struct Cut {
    uint32_t key = 0;
    uint32_t last_token = 0xFFFFFFFFu;  // of those with that key

    PMC_HD bool keeps(uint32_t other_key, uint32_t token) const {
        return other_key > key || (other_key == key && token <= last_token);
    }
};

// Which digit of a 32-bit key a round of radix selection looks at.
struct RadixDigit {
    int shift, bits;

    PMC_HD uint32_t of(uint32_t key) const { return key >> shift & ((1u << bits) - 1); }
    PMC_HD uint32_t higher_bits(uint32_t key) const {
        return shift + bits == 32 ? 0 : key >> (shift + bits) << (shift + bits);
    }
};
constexpr int kRadixRounds = 3;
PMC_HD RadixDigit radix_digit(int round) {
    return round == 0 ? RadixDigit{21, 11} : round == 1 ? RadixDigit{10, 11} : RadixDigit{0, 10};
}

}  // namespace pmc
