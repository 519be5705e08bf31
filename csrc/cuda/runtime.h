// csrc/cuda/device.h by nvcc and the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace pmc::cuda {

inline __device__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char dynamic_shared[];
    return dynamic_shared;
}

// Before sm_90 a block is a cluster by itself.
inline __device__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
#else
    __syncthreads();
#endif
}

inline __device__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
    return static_cast<int>(__clusterRelativeBlockRank());
#else
    return 0;
#endif
}

inline __device__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
    return static_cast<int>(__clusterSizeInBlocks());
#else
    return 1;
#endif
}

// The same place in the shared memory of another block of the cluster.
template <class T>
__device__ T* peer(T* mine, int rank) {
#if __CUDA_ARCH__ >= 900
    return static_cast<T*>(__cluster_map_shared_rank(mine, static_cast<unsigned>(rank)));
#else
    (void)rank;
    return mine;
#endif
}

inline void check(cudaError_t status, const char* kernel) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // an error that is not sticky would be found again by the next one who asks
    throw std::runtime_error(std::string("CUDA, kernel ") + kernel + ": " + cudaGetErrorString(status));
}

// Makes a device the current one for as long as it lives.
class CurrentDevice {
  public:
    CurrentDevice(int device, const char* kernel) {
        check(cudaGetDevice(&before_), kernel);
        if (device != before_) check(cudaSetDevice(device), kernel);
    }
    ~CurrentDevice() { cudaSetDevice(before_); }
    CurrentDevice(const CurrentDevice&) = delete;
    CurrentDevice& operator=(const CurrentDevice&) = delete;

  private:
    int before_ = 0;
};

// The current device, as the code of `kernel` that was loaded for it can use it.
template <class Args>
Device current_device(const char* name, void (*kernel)(Args)) {
    int device = 0;
    check(cudaGetDevice(&device), name);
    const auto attribute = [&](cudaDeviceAttr which) {
        int value = 0;
        check(cudaDeviceGetAttribute(&value, which, device), name);
        return value;
    };
    cudaFuncAttributes code;
    check(cudaFuncGetAttributes(&code, kernel), name);
    return {kMostThreads, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
            attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor), code.ptxVersion >= 90};
}

template <class Args>
void launch(const char* name, void (*kernel)(Args), const Grid& grid, void* stream, const Args& args) {
    if (grid.blocks == 0) return;
    if (grid.shared_bytes > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(grid.shared_bytes)),
              name);
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = grid.cluster > 1 ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, args), name);
}

}  // namespace pmc::cuda
