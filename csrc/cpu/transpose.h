// A square of vectors, rows against columns.
#pragma once

#include <utility>

#include "cpu/simd.h"

namespace pmc::PMC_ISA {
namespace {

template <int Width, int... Lane>
inline void exchange(Floats& a, Floats& b, std::integer_sequence<int, Lane...>) {
#ifdef __clang__
    const Floats low = __builtin_shufflevector(a, b, (Lane & Width ? kLanes + Lane - Width : Lane)...);
    b = __builtin_shufflevector(a, b, (Lane & Width ? kLanes + Lane : Lane + Width)...);
#else
    const Floats low = __builtin_shuffle(a, b, Ints{(Lane & Width ? kLanes + Lane - Width : Lane)...});
    b = __builtin_shuffle(a, b, Ints{(Lane & Width ? kLanes + Lane : Lane + Width)...});
#endif
    a = low;
}

// v[i][j] and v[j][i] change places.
template <int Width = kLanes / 2>
inline void transpose(Floats (&v)[kLanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
        if (!(i & Width)) exchange<Width>(v[i], v[i + Width], std::make_integer_sequence<int, kLanes>{});
    if constexpr (Width > 1) transpose<Width / 2>(v);
}

}  // namespace
}  // namespace pmc::PMC_ISA
