// The words of noise of four neighbouring tokens, and what float32 alone can say of the noise that a word gives.
#pragma once

#include "common/philox.h"
#include "cuda/device.h"

namespace pmc::cuda {

// Of tokens 4 * block and the three that follow.
inline __device__ void noise_words(const Draw& draw, int32_t block, uint32_t* w0, uint32_t* w1, uint32_t* w2,
                                   uint32_t* w3) {
    *w0 = static_cast<uint32_t>(block), *w1 = draw.position, *w2 = draw.sequence, *w3 = Draw::stream;
    philox_rounds(draw.seed, *w0, *w1, *w2, *w3, [](uint32_t a, uint32_t b, uint32_t* high, uint32_t* low) {
        const uint64_t product = static_cast<uint64_t>(a) * b;
        *high = static_cast<uint32_t>(product >> 32);
        *low = static_cast<uint32_t>(product);
    });
}

// gumbel_from_word to within kNoiseError. -log(1 - u) is a series where 1 - u would lose u's digits; elsewhere it is at
// least 2^-8, beside which the 3e-7 that the difference and the GPU's logarithm are off by are less than 8e-5.
constexpr float kNoiseError = 2e-4f;

inline __device__ float about_gumbel(uint32_t word) {
    constexpr float kLn2 = 0.693147181f;
    const float u = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
    const float series = u * (1 + u * (0.5f + u * (1 / 3.0f)));
    const float whole = -kLn2 * __log2f((static_cast<float>(~word) + 0.5f) * 0x1p-32f);
    return -kLn2 * __log2f(word < 1u << 24 ? series : whole);
}

}  // namespace pmc::cuda
