// Functions that the host's compiler and nvcc both compile. On the host they are always inlined: nothing that was
// compiled for one instruction set may be linked into another.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PMC_HD __host__ __device__ __forceinline__
#else
#define PMC_HD inline __attribute__((always_inline))
#endif

namespace pmc {

PMC_HD uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

PMC_HD float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// bfloat16 is the upper half of a float.
PMC_HD float widen(float x) { return x; }
PMC_HD float widen(uint16_t x) { return bits_float(static_cast<uint32_t>(x) << 16); }

// To nearest, ties to even; the caller has no NaN.
PMC_HD uint16_t narrow(float x) {
    const uint32_t bits = float_bits(x);
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

}  // namespace pmc
