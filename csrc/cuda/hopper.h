// What Hopper adds to csrc/cuda/device.h: tiles that the hardware copies (TMA), barriers that count arrivals and bytes
// (mbarrier), products by the four warps of a warpgroup (wgmma).
//
// A tile is rows of 64 bfloat16 numbers, 128 bytes each, from a multiple of 1024 bytes on. The eight 16-byte pieces of
// a row are exchanged: bits 4 to 6 of their addresses are XORed with bits 7 to 9, so that rows start in other banks.
#pragma once

#include "common/host_device.h"
#include "cuda/device.h"

namespace pmc::cuda {

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kTileColumns = 64, kTileRowBytes = 128, kTileAlignment = 1024;
constexpr int kProductRows = 64, kProductDepth = 16;  // of an instruction

// In memory, a matrix [rows, columns] of bfloat16, from which tiles of `tile_rows` rows are copied. What they hold of
// it beyond its edges is 0.
struct alignas(128) TensorMap {
    unsigned char opaque[128];
};

// In shared memory. A phase ends when all arrivals have come and all expected bytes are there; phases are told apart by
// their parity, the first one's being 0.
struct Arrivals {
    uint64_t state;
};

// How products find a tile, or the part of it from a multiple of eight rows, or of 16 columns, on.
struct TileDescriptor {
    uint64_t bits;

    static PMC_HD TileDescriptor at(uint32_t shared_address) {
        constexpr uint64_t kEightRows = 8 * kTileRowBytes, kSwizzle128 = 1;
        constexpr uint32_t kWithinBlock = (1u << 18) - 1;  // higher bits say which block of the cluster
        return {(shared_address & kWithinBlock) >> 4 | uint64_t{1} << 16 | (kEightRows >> 4) << 32 | kSwizzle128 << 62};
    }
    PMC_HD TileDescriptor down(int rows) const { return {bits + static_cast<uint32_t>(rows * kTileRowBytes >> 4)}; }
    PMC_HD TileDescriptor right(int columns) const { return {bits + static_cast<uint32_t>(2 * columns >> 4)}; }
};

}  // namespace pmc::cuda

#ifdef __CUDACC__
#include "cuda/hopper_ptx.h"
#else
#include "cuda/emulate_hopper.h"
#endif
