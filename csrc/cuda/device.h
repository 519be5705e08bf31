// What kernels use of CUDA beyond the language, and their launch. Without nvcc, csrc/cuda/emulate.h stands in.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pmc::cuda {

// What a launch must know of a GPU.
struct Device {
    int threads;        // of a block
    int block_shared;   // bytes of shared memory that one block may have
    int shared;         // bytes of shared memory of a multiprocessor
    bool has_clusters;  // and the kernels were compiled for them
};

// Blocks of `cluster` of them; the grid's size is a multiple of it.
struct Grid {
    int64_t blocks;
    int threads, cluster;
    int64_t shared_bytes;
};

constexpr int kMostThreads = 256;  // of a block; two of them with 128 registers a thread fill an SM
constexpr int kMostCluster = 8;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

}  // namespace pmc::cuda

#ifdef __CUDACC__
#include "cuda/runtime.h"
#else
#include "cuda/emulate.h"
#endif
