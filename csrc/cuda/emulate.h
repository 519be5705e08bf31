// csrc/cuda/device.h on the CPU, for csrc/fuzz and tests: a block's threads are fibers that run one at a time, in an
// order that changes from turn to turn, each until it waits for others.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __launch_bounds__(...)

namespace pmc::cuda {

struct Index {
    unsigned x;
};

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

namespace emulated {

extern Device device;        // what kernels are launched for
extern uint64_t order;       // seeds the order in which threads take turns
extern Index thread, block;  // of the running thread
extern Index block_size;

unsigned char* shared_memory();
void* peer(void* mine, int rank);
int cluster_rank();
int cluster_size();
void sync_threads();
void sync_cluster();
uint64_t shuffle(uint64_t value, int from_lane);  // every lane of the warp must come
void run(const Grid& grid, const std::function<void()>& kernel);

}  // namespace emulated

using emulated::cluster_rank;
using emulated::cluster_size;
using emulated::shared_memory;
using emulated::sync_cluster;

template <class T>
T* peer(T* mine, int rank) {
    return static_cast<T*>(emulated::peer(mine, rank));
}

inline void __syncthreads() { emulated::sync_threads(); }

template <class T>
T shuffled(T value, int from_lane) {
    uint64_t wide = 0;
    std::memcpy(&wide, &value, sizeof value);
    wide = emulated::shuffle(wide, from_lane);
    std::memcpy(&value, &wide, sizeof value);
    return value;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return shuffled(value, static_cast<int>(emulated::thread.x % kWarp) ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned lanes) {
    const int from = static_cast<int>(emulated::thread.x % kWarp) - static_cast<int>(lanes);
    return shuffled(value, from < 0 ? static_cast<int>(emulated::thread.x % kWarp) : from);
}

template <class T>
T atomicAdd(T* at, T value) {
    const T before = *at;
    *at += value;
    return before;
}
template <class T>
T atomicMax(T* at, T value) {
    const T before = *at;
    *at = before > value ? before : value;
    return before;
}
template <class T>
T atomicMin(T* at, T value) {
    const T before = *at;
    *at = before < value ? before : value;
    return before;
}

// A launch for one device after another is nothing that can be emulated.
struct CurrentDevice {
    CurrentDevice(int, const char*) {}
};

template <class Args>
Device current_device(const char*, void (*)(Args)) {
    return emulated::device;
}

template <class Args>
void launch(const char*, void (*kernel)(Args), const Grid& grid, void*, const Args& args) {
    emulated::run(grid, [&] { kernel(args); });
}

}  // namespace pmc::cuda

#define threadIdx (::pmc::cuda::emulated::thread)
#define blockIdx (::pmc::cuda::emulated::block)
#define blockDim (::pmc::cuda::emulated::block_size)
