// csrc/cuda/hopper.h by PTX and the driver.
#pragma once

#include <cuda.h>

namespace pmc::cuda {

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHopperCode = false;
#else
constexpr bool kHopperCode = true;
#endif

inline __device__ uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

inline __device__ void start(Arrivals* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Before the cluster's barrier after which others use the barriers that this thread has started.
inline __device__ void publish_started() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival at the same barrier of another block of the cluster, or of this one.
inline __device__ void arrive(Arrivals* barrier, int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}

// One arrival, and so many bytes more to wait for.
inline __device__ void arrive_expecting(Arrivals* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Until the phase of this parity has ended.
inline __device__ void wait(Arrivals* barrier, unsigned parity) {
    uint32_t ended = 0;
    while (!ended)
        asm volatile(
            "{\n"
            ".reg .pred ended;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
            "selp.u32 %0, 1, 0, ended;\n"
            "}"
            : "=r"(ended)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
}

// Copies the tile whose first number is at (row, column); its bytes count for `barrier`.
inline __device__ void copy_tile(void* to, const TensorMap* from, int column, int row, Arrivals* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(shared_address(to)),
        "l"(from), "r"(shared_address(barrier)), "r"(column), "r"(row)
        : "memory");
}

// To the same place in every block whose bit of `ranks` is set; bytes count for the same barrier there.
inline __device__ void copy_tile_to_all(void* to, const TensorMap* from, int column, int row, Arrivals* barrier,
                                        uint16_t ranks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
        "l"(from), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(ranks)
        : "memory");
}

// What a thread may use of the registers, for all of its warpgroup.
template <int kRegisters>
__device__ void keep_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Around the products that add to the same sums: before them, after each group, and until at most so many groups run.
inline __device__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
inline __device__ void end_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kGroups>
__device__ void await_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// A warpgroup's product of 64 rows of a, 16 columns wide, and as many columns of kColumns rows of b, added to `sums` or
// in their place. Of the result [64, kColumns] a thread holds rows 16 * warp + lane / 4 and 8 further on, columns
// 8 * j + lane % 4 * 2 and the next one, as sums[4 * j], two of the first row before two of the second.
template <int kColumns>
__device__ void multiply(float (&sums)[kColumns / 2], TileDescriptor a, TileDescriptor b, bool add);

#define PMC_SUMS(i)                                                                                               \
    "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
        "+f"(sums[i + 6]), "+f"(sums[i + 7]), "+f"(sums[i + 8]), "+f"(sums[i + 9]), "+f"(sums[i + 10]),           \
        "+f"(sums[i + 11]), "+f"(sums[i + 12]), "+f"(sums[i + 13]), "+f"(sums[i + 14]), "+f"(sums[i + 15])
#define PMC_SUMS_0 PMC_SUMS(0)
#define PMC_SUMS_1 PMC_SUMS_0, PMC_SUMS(16)
#define PMC_SUMS_2 PMC_SUMS_1, PMC_SUMS(32)
#define PMC_SUMS_3 PMC_SUMS_2, PMC_SUMS(48)
#define PMC_SUMS_4 PMC_SUMS_3, PMC_SUMS(64)
#define PMC_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define PMC_NAMES_1 PMC_NAMES_0 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PMC_NAMES_2 PMC_NAMES_1 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define PMC_NAMES_3 PMC_NAMES_2 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PMC_NAMES_4 PMC_NAMES_3 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"

#define PMC_MULTIPLY(columns, names, sums_, a_, b_, add_)                                                    \
    template <>                                                                                              \
    inline __device__ void multiply<columns>(float (&sums)[columns / 2], TileDescriptor a, TileDescriptor b, \
                                             bool add) {                                                     \
        asm volatile(                                                                                        \
            "{\n"                                                                                            \
            ".reg .pred add;\n"                                                                              \
            "setp.ne.b32 add, " add_                                                                         \
            ", 0;\n"                                                                                         \
            "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 {" names "}, " a_ ", " b_        \
            ", add, 1, 1, 0, 0;\n"                                                                           \
            "}"                                                                                              \
            : sums_                                                                                          \
            : "l"(a.bits), "l"(b.bits), "r"(static_cast<int>(add)));                                         \
    }
PMC_MULTIPLY(32, PMC_NAMES_0, PMC_SUMS_0, "%16", "%17", "%18")
PMC_MULTIPLY(64, PMC_NAMES_1, PMC_SUMS_1, "%32", "%33", "%34")
PMC_MULTIPLY(96, PMC_NAMES_2, PMC_SUMS_2, "%48", "%49", "%50")
PMC_MULTIPLY(128, PMC_NAMES_3, PMC_SUMS_3, "%64", "%65", "%66")
PMC_MULTIPLY(160, PMC_NAMES_4, PMC_SUMS_4, "%80", "%81", "%82")

#undef PMC_MULTIPLY
#undef PMC_SUMS
#undef PMC_SUMS_0
#undef PMC_SUMS_1
#undef PMC_SUMS_2
#undef PMC_SUMS_3
#undef PMC_SUMS_4
#undef PMC_NAMES_0
#undef PMC_NAMES_1
#undef PMC_NAMES_2
#undef PMC_NAMES_3
#undef PMC_NAMES_4

// The driver is asked for the function that encodes it, so that nothing is linked against the driver.
inline TensorMap tensor_map(const char* kernel, const void* matrix, int64_t rows, int64_t columns, int64_t row_stride,
                            int tile_rows) {
#if CUDART_VERSION < 12000
    (void)matrix, (void)rows, (void)columns, (void)row_stride, (void)tile_rows;
    throw std::runtime_error(std::string("CUDA, kernel ") + kernel + ": built by an nvcc older than 12.0");
#else
    using Encode = CUresult(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
    constexpr const char* kName = "cuTensorMapEncodeTiled";
    void* encode = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion(kName, &encode, 12000, cudaEnableDefault, &found), kernel);
#else
    check(cudaGetDriverEntryPoint(kName, &encode, cudaEnableDefault, &found), kernel);
#endif
    if (found != cudaDriverEntryPointSuccess)
        throw std::runtime_error(std::string("CUDA, kernel ") + kernel + ": the driver has no " + kName);
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(2 * row_stride)};
    const cuuint32_t tile[2] = {kTileColumns, static_cast<cuuint32_t>(tile_rows)}, steps[2] = {1, 1};
    CUtensorMap map;
    const CUresult result = reinterpret_cast<Encode*>(encode)(
        &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix), sizes, strides, tile, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        throw std::runtime_error(std::string("CUDA, kernel ") + kernel + ": " + kName + " returned " +
                                 std::to_string(static_cast<int>(result)));
    TensorMap encoded;
    memcpy(&encoded, &map, sizeof map);
    return encoded;
#endif
}

}  // namespace pmc::cuda
