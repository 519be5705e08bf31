// Products of small matrices as tiles of sums in registers.
#pragma once

#include <algorithm>

#include "cpu/simd.h"

namespace pmc::PMC_ISA {
namespace {

// A tile of rows x 2 vectors of sums, one broadcast value and two vectors fill the registers.
constexpr int kTileRows = kLanes == 16 ? 12 : 6;

// c[m, n] (+)= sum over k < steps of a[m * a_row + k * a_step] * b[k * b_row + n]
struct Product {
    const float* a;
    int64_t a_row, a_step;
    const float* b;
    int64_t b_row;
    float* c;
    int64_t c_row;
    int64_t steps;
    bool accumulate;
};

template <int Rows, int Vectors>
inline void multiply_tile(const Product& p) {
    Floats sums[Rows][Vectors];
#pragma GCC unroll 12
    for (int m = 0; m < Rows; ++m)
        for (int v = 0; v < Vectors; ++v) sums[m][v] = p.accumulate ? load(p.c + m * p.c_row + v * kLanes) : Floats{};
    const float *a = p.a, *b = p.b;
    for (int64_t k = 0; k < p.steps; ++k, a += p.a_step, b += p.b_row) {
        Floats values[Vectors];
        for (int v = 0; v < Vectors; ++v) values[v] = load(b + v * kLanes);
#pragma GCC unroll 12
        for (int m = 0; m < Rows; ++m) {
            const Floats x = broadcast(a[m * p.a_row]);
            for (int v = 0; v < Vectors; ++v) sums[m][v] += x * values[v];
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < Rows; ++m)
        for (int v = 0; v < Vectors; ++v) store(p.c + m * p.c_row + v * kLanes, sums[m][v]);
}

template <int Rows, int Vectors>
inline void multiply_tile(const Product& p, int64_t rows) {
    if (rows == Rows) return multiply_tile<Rows, Vectors>(p);
    if constexpr (Rows > 1) multiply_tile<Rows - 1, Vectors>(p, rows);
}

// Columns [begin, end) of at most kTileRows rows; both are multiples of kLanes.
inline void multiply_rows(Product p, int64_t rows, int64_t begin, int64_t end) {
    p.b += begin, p.c += begin;
    for (; begin + 2 * kLanes <= end; begin += 2 * kLanes, p.b += 2 * kLanes, p.c += 2 * kLanes)
        multiply_tile<kTileRows, 2>(p, rows);
    if (begin < end) multiply_tile<kTileRows, 1>(p, rows);
}

// Calls body(begin, end) for tiles of rows that are about equally large.
template <class Body>
void for_each_tile(int64_t rows, const Body& body) {
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t i = 0; i < tiles; ++i) body(rows * i / tiles, rows * (i + 1) / tiles);
}

}  // namespace
}  // namespace pmc::PMC_ISA
