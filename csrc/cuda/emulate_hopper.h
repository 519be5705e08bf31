// csrc/cuda/hopper.h on the CPU. Copies land, and products are taken, as late or as early as the hardware might.
#pragma once

namespace pmc::cuda {

constexpr bool kHopperCode = true;

namespace emulated {

void add_product(float* sums, int columns, TileDescriptor a, TileDescriptor b, bool add);
void await_products(size_t groups);

}  // namespace emulated

uint32_t shared_address(const void* shared);  // from where the block's begins; its rank in the cluster above that
void start(Arrivals* barrier, int arrivals);
inline void publish_started() {}
void arrive(Arrivals* barrier, int rank);
void arrive_expecting(Arrivals* barrier, int bytes);
void wait(Arrivals* barrier, unsigned parity);
void copy_tile(void* to, const TensorMap* from, int column, int row, Arrivals* barrier);
void copy_tile_to_all(void* to, const TensorMap* from, int column, int row, Arrivals* barrier, uint16_t ranks);
template <int kRegisters>
void keep_registers() {}
template <int kRegisters>
void take_registers() {}
inline void begin_products() {}
void end_group();
template <int kGroups>
void await_products() {
    emulated::await_products(kGroups);
}
template <int kColumns>
void multiply(float (&sums)[kColumns / 2], TileDescriptor a, TileDescriptor b, bool add) {
    emulated::add_product(sums, kColumns, a, b, add);
}
TensorMap tensor_map(const char* kernel, const void* matrix, int64_t rows, int64_t columns, int64_t row_stride,
                     int tile_rows);

}  // namespace pmc::cuda
