// Vectors of PMC_LANES floats through the compiler's vector extensions. Everything is local to the including file, so
// that no function compiled for one instruction set can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pmc::PMC_ISA {
namespace {

constexpr int kLanes = PMC_LANES;

typedef float Floats __attribute__((vector_size(PMC_LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(PMC_LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(PMC_LANES * 4)));
typedef uint64_t WideWords __attribute__((vector_size(PMC_LANES * 8)));
typedef uint16_t Halves __attribute__((vector_size(PMC_LANES * 2)));

inline Floats broadcast(float value) { return value - Floats{}; }
inline Words broadcast_word(uint32_t value) { return value - Words{}; }

inline Floats load(const float* from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

inline Floats load(const uint16_t* from) {  // bfloat16
    Halves h;
    std::memcpy(&h, from, sizeof h);
    return reinterpret_cast<Floats>(__builtin_convertvector(h, Words) << 16);
}
inline void store(uint16_t* to, Floats v) {  // to nearest, ties to even; the caller has no NaN
    const Words bits = reinterpret_cast<Words>(v);
    const Halves h = __builtin_convertvector((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, Halves);
    std::memcpy(to, &h, sizeof h);
}

inline void from_float(float* to, float x) { *to = x; }
inline void from_float(uint16_t* to, float x) { *to = narrow(x); }

// Bit i is set where lane i of a comparison's result is true.
inline uint32_t lanes_true(Ints mask) {
#if PMC_LANES == 16 && defined(__AVX512DQ__)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif PMC_LANES == 8 && defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif PMC_LANES == 4 && defined(__SSE2__)
    return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= (mask[lane] ? 1u : 0u) << lane;
    return bits;
#endif
}

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

inline float horizontal_max(Floats v) {
    float best = v[0];
    for (int lane = 1; lane < kLanes; ++lane) best = v[lane] > best ? v[lane] : best;
    return best;
}

inline float horizontal_sum_float(Floats v) {
    float sums[kLanes];
    std::memcpy(sums, &v, sizeof v);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
    return sums[0];
}

// to[i] = the sum of v[i]'s lanes.
inline void horizontal_sums(const Floats (&v)[4], float* to) {
#if PMC_LANES >= 8 && defined(__AVX__)
    __m256 w[4];
    for (int i = 0; i < 4; ++i) {
#if PMC_LANES == 16 && defined(__AVX512DQ__)
        const __m512 x = reinterpret_cast<__m512>(v[i]);
        w[i] = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
#else
        w[i] = reinterpret_cast<__m256>(v[i]);
#endif
    }
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(w[0], w[1]), _mm256_hadd_ps(w[2], w[3]));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
    for (int i = 0; i < 4; ++i) to[i] = horizontal_sum_float(v[i]);
#endif
}

inline double horizontal_sum(Floats v) {
    double sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
    return sum;
}

// e^x for x <= 0 (or above it by rounding errors), relative error below 2e-7; below -87 the result is 0.
inline Floats exp_nonpositive(Floats x) {
    const Floats lowest = broadcast(-87.0f);
    const Ints vanishes = x < lowest;
    x = vanishes ? lowest : x;
    const Floats shifter = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats rounded = x * 1.44269504f + shifter;
    const Floats n = rounded - shifter;
    Floats r = x - n * 0.693359375f;  // ln 2 in two parts
    r = r + n * 2.12194440e-4f;
    Floats p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Words exponent = (reinterpret_cast<Words>(rounded) - 0x4B400000) << 23;  // NaN wraps
    const Floats result = reinterpret_cast<Floats>(reinterpret_cast<Words>(p) + exponent);
    return vanishes ? Floats{} : result;
}

// Relative error below 3e-7: a large soft cap multiplies that of small arguments.
inline Floats tanh(Floats x) {
    const Floats magnitude = x < 0 ? -x : x, square = x * x;
    Floats near = broadcast(-5.70498872745e-3f);  // the minimax polynomial of Cephes' tanhf
    near = near * square + 2.06390887954e-2f;
    near = near * square - 5.37397155531e-2f;
    near = near * square + 1.33314422036e-1f;
    near = near * square - 3.33332819422e-1f;
    near = near * square * x + x;
    const Floats e = exp_nonpositive(magnitude * -2.0f);
    const Floats far = (1.0f - e) / (1.0f + e), result = magnitude < 0.625f ? near : x < 0 ? -far : far;
    return x == x ? result : x;  // NaN stays NaN
}

// The 64-bit products of every lane with b, as high and low words.
inline void multiply_wide(Words a, uint32_t b, Words* high, Words* low) {
#if PMC_LANES == 16 && defined(__AVX512F__)
    const __m512i x = reinterpret_cast<__m512i>(a), y = _mm512_set1_epi64(b);
    const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
    *low = reinterpret_cast<Words>(_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)));
    *high = reinterpret_cast<Words>(_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd));
#elif PMC_LANES == 8 && defined(__AVX2__)
    const __m256i x = reinterpret_cast<__m256i>(a), y = _mm256_set1_epi64x(b);
    const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
    *low = reinterpret_cast<Words>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
    *high = reinterpret_cast<Words>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
#else
    const WideWords product = __builtin_convertvector(a, WideWords) * static_cast<uint64_t>(b);
    *low = a * b;
    *high = __builtin_convertvector(product >> 32, Words);
#endif
}

}  // namespace
}  // namespace pmc::PMC_ISA
