// csrc/cuda/device.h on the CPU, for csrc/fuzz and tests: a block's threads are fibers that run one at a time, in an
// order that changes from turn to turn, each until it waits for others.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__

namespace pmc::cuda {

struct Index {
    unsigned x;
};

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

namespace emulated {

extern Device device;  // what kernels are launched for
extern int multiprocessors;
extern uint64_t order;       // seeds the order in which threads take turns
extern Index thread, block;  // of the running thread
extern Index block_size;

unsigned char* shared_memory();
void* peer(void* mine, int rank);
int cluster_rank();
int cluster_size();
void sync_threads();
void sync_cluster();
void sync_warp();
uint64_t shuffle(uint64_t value, int from_lane);  // every lane of the warp must come
void wait_until(std::function<bool()> holds);
void later(std::function<void()> work);  // that no thread does
bool some_times();                       // by chance

// Products that a thread has begun, and groups of them.
struct Begun {
    std::vector<std::function<void()>> open;
    std::deque<std::vector<std::function<void()>>> groups;
};
Begun& begun();  // by this thread

void run(const Grid& grid, const std::function<void()>& kernel);

}  // namespace emulated

using emulated::cluster_rank;
using emulated::cluster_size;
using emulated::shared_memory;
using emulated::sync_cluster;

inline uint64_t each_time(uint64_t value) { return value; }

template <class T>
T* peer(T* mine, int rank) {
    return static_cast<T*>(emulated::peer(mine, rank));
}

inline void __syncthreads() { emulated::sync_threads(); }
inline void __syncwarp() { emulated::sync_warp(); }

inline float __expf(float x) { return expf(x); }
inline float __log2f(float x) { return log2f(x); }

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

template <class Args>
int resident_clusters(const char*, void (*)(Args), const Grid& grid) {
    return emulated::multiprocessors / grid.cluster;
}

}  // namespace pmc::cuda

#define threadIdx (::pmc::cuda::emulated::thread)
#define blockIdx (::pmc::cuda::emulated::block)
#define blockDim (::pmc::cuda::emulated::block_size)
