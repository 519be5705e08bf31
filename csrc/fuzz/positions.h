// Cached keys or values in any layout.
#pragma once

#include <limits>
#include <vector>

#include "fuzz/fuzz.h"

namespace pmc::fuzz {

// Keys or values of some rows' positions. Positions [first[r], end[r]) of row r are random, all else is NaN.
struct Positions {
    CacheStrides stride;
    Numbers x;

    static Positions random(Random& random, int64_t rows, int64_t kv_heads, int64_t length, int64_t dim, Dtype dtype,
                            float spread, const std::vector<int64_t>& first, const std::vector<int64_t>& end) {
        CacheStrides stride;
        const int64_t gap = random.one_in(2) ? 0 : random.between(1, 5);
        if (random.one_in(2)) {  // heads outside, positions inside
            stride.position = dim + gap;
            stride.head = stride.position * (length + gap);
            stride.row = stride.head * kv_heads + gap;
        } else {
            stride.head = dim + gap;
            stride.position = stride.head * kv_heads + gap;
            stride.row = stride.position * (length + gap);
        }
        const int64_t last = (rows - 1) * stride.row + (kv_heads - 1) * stride.head + (length - 1) * stride.position;
        Positions made{stride,
                       Numbers(dtype, rows && length ? last + dim : 0, std::numeric_limits<float>::quiet_NaN())};
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t h = 0; h < kv_heads; ++h)
                for (int64_t t = first[r]; t < end[r]; ++t)
                    for (int64_t i = 0; i < dim; ++i) made.x.set(made.at(r, h, t) + i, random.normal() * spread);
        return made;
    }

    int64_t at(int64_t row, int64_t head, int64_t position) const {
        return row * stride.row + head * stride.head + position * stride.position;
    }
};

inline CachedPositions cached(Positions& key, Positions& value, int64_t length) {
    return {key.x.data(), value.x.data(), key.stride, value.stride, length};
}

}  // namespace pmc::fuzz
