// Hopper's copies, barriers and products by threads of the emulated GPU.
#include <cstdio>
#include <cstdlib>

#include "cuda/hopper.h"

namespace pmc::cuda {
namespace {

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "emulated GPU: %s\n", what);
    std::abort();
}

struct Matrix {
    const uint16_t* numbers;
    int64_t rows, columns, row_stride;
    int tile_rows;
};

// What an mbarrier's eight bytes hold.
struct Phase {
    uint32_t parity : 1, arrivals : 15, missing : 16;
    int32_t bytes;
};
static_assert(sizeof(Phase) == sizeof(Arrivals));

Phase load(const Arrivals* barrier) {
    Phase phase;
    std::memcpy(&phase, barrier, sizeof phase);
    return phase;
}

void change(Arrivals* barrier, unsigned arrivals, int bytes) {
    Phase phase = load(barrier);
    require(phase.missing >= arrivals, "more arrivals than a barrier waits for");
    phase.missing -= arrivals;
    phase.bytes += bytes;
    if (phase.missing == 0 && phase.bytes == 0) {
        phase.parity ^= 1;
        phase.missing = phase.arrivals;
    }
    std::memcpy(barrier, &phase, sizeof phase);
}

constexpr int kRankBit = 24;  // of an address in shared memory
uint32_t within_block(uint32_t address) { return address & ((1u << kRankBit) - 1); }

uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Counts as one thread's.
void copy(void* to, const TensorMap* from, int column, int row, Arrivals* barrier, unsigned ranks) {
    Matrix matrix;
    std::memcpy(&matrix, from, sizeof matrix);
    const uint32_t first = within_block(shared_address(to));
    require(first % kTileAlignment == 0, "a tile that is not aligned");
    for (int rank = 0; rank < cluster_size(); ++rank) {
        if (!(ranks >> rank & 1)) continue;
        unsigned char* const shared = static_cast<unsigned char*>(emulated::peer(shared_memory(), rank));
        Arrivals* const its_barrier = peer(barrier, rank);
        emulated::later([=] {
            for (int r = 0; r < matrix.tile_rows; ++r)
                for (int c = 0; c < kTileColumns; ++c) {
                    const bool inside = row + r < matrix.rows && column + c < matrix.columns;
                    const uint16_t number = inside ? matrix.numbers[(row + r) * matrix.row_stride + column + c] : 0;
                    std::memcpy(shared + swizzled(first + r * kTileRowBytes + 2 * c), &number, sizeof number);
                }
            change(its_barrier, 0, -matrix.tile_rows * kTileRowBytes);
        });
    }
}

// The numbers that a descriptor leads to.
class Operand {
  public:
    explicit Operand(TileDescriptor descriptor)
        : start_(static_cast<uint32_t>(descriptor.bits & 0x3FFF) << 4),
          eight_rows_(static_cast<uint32_t>(descriptor.bits >> 32 & 0x3FFF) << 4) {
        // The 1 is a distance that this layout has no use for.
        require(descriptor.bits >> 46 == 1 << 16 && (descriptor.bits >> 14 & 0x3FFFF) == 1 << 2,
                "a descriptor of another layout than swizzled tiles");
    }

    void row(int r, float (&numbers)[kProductDepth]) const {
        const uint32_t first = start_ + r / 8 * eight_rows_ + r % 8 * kTileRowBytes;
        for (int k = 0; k < kProductDepth; ++k) {
            uint16_t number;
            std::memcpy(&number, shared_memory() + swizzled(first + 2 * k), sizeof number);
            numbers[k] = widen(number);
        }
    }

  private:
    uint32_t start_, eight_rows_;
};

void take_product(float* sums, int columns, TileDescriptor a, TileDescriptor b, bool add) {
    const Operand left(a), right(b);
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp % 4;
    float of_a[2][kProductDepth], of_b[kProductDepth];
    for (int half = 0; half < 2; ++half) left.row(16 * warp + lane / 4 + 8 * half, of_a[half]);
    for (int j = 0; j < columns / 8; ++j)
        for (int next = 0; next < 2; ++next) {
            right.row(8 * j + lane % 4 * 2 + next, of_b);
            for (int half = 0; half < 2; ++half) {
                float& sum = sums[4 * j + 2 * half + next];
                float products = 0;
                for (int k = 0; k < kProductDepth; ++k) products += of_a[half][k] * of_b[k];
                sum = add ? sum + products : products;
            }
        }
}

}  // namespace

namespace emulated {

void add_product(float* sums, int columns, TileDescriptor a, TileDescriptor b, bool add) {
    Begun& begun = emulated::begun();
    const auto product = [=] { take_product(sums, columns, a, b, add); };
    if (begun.open.empty() && begun.groups.empty() && some_times())
        product();
    else
        begun.open.push_back(product);
}

void await_products(size_t groups) {
    Begun& begun = emulated::begun();
    for (; begun.groups.size() > groups; begun.groups.pop_front())
        for (const auto& product : begun.groups.front()) product();
    sync_warp();
}

}  // namespace emulated

void end_group() {
    emulated::Begun& begun = emulated::begun();
    begun.groups.push_back(std::move(begun.open));
    begun.open.clear();
}

uint32_t shared_address(const void* shared) {
    const auto first = static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - shared_memory());
    return static_cast<uint32_t>(cluster_rank()) << kRankBit | first;
}

void start(Arrivals* barrier, int arrivals) {
    const auto count = static_cast<unsigned>(arrivals);
    const Phase phase{0, count & 0x7FFF, count & 0xFFFF, 0};
    std::memcpy(barrier, &phase, sizeof phase);
}

void arrive(Arrivals* barrier, int rank) { change(peer(barrier, rank), 1, 0); }

void arrive_expecting(Arrivals* barrier, int bytes) { change(barrier, 1, bytes); }

void wait(Arrivals* barrier, unsigned parity) {
    emulated::wait_until([=] { return load(barrier).parity != parity; });
}

void copy_tile(void* to, const TensorMap* from, int column, int row, Arrivals* barrier) {
    copy(to, from, column, row, barrier, 1u << cluster_rank());
}

void copy_tile_to_all(void* to, const TensorMap* from, int column, int row, Arrivals* barrier, uint16_t ranks) {
    copy(to, from, column, row, barrier, ranks);
}

TensorMap tensor_map(const char*, const void* matrix, int64_t rows, int64_t columns, int64_t row_stride,
                     int tile_rows) {
    require(reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && row_stride % 8 == 0, "a matrix that is not aligned");
    const Matrix described{static_cast<const uint16_t*>(matrix), rows, columns, row_stride, tile_rows};
    TensorMap map{};
    static_assert(sizeof described <= sizeof map);
    std::memcpy(&map, &described, sizeof described);
    return map;
}

}  // namespace pmc::cuda
