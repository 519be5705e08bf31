// Fibers that stand in for a GPU's threads.
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/device.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(...) static_cast<void>(0)
#define __sanitizer_finish_switch_fiber(...) static_cast<void>(0)
#endif

namespace pmc::cuda::emulated {

Device device{64, 64 << 10, 128 << 10, true};
uint64_t order = 0;
Index thread{}, block{}, block_size{};

namespace {

constexpr size_t kStackBytes = 32 << 10;

// Threads that wait for one another.
struct Barrier {
    int64_t expected = 0, arrived = 0;
    uint64_t generation = 0;
};

struct Block;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    Block* block;
    unsigned index;
    int shuffles;  // how many so far: neighbouring ones use different places
    const Barrier* waits_for;
    uint64_t generation;
    bool done;
};

struct Warp {
    Barrier barrier;
    uint64_t exchanged[2][kWarp];
};

struct Block {
    unsigned index;
    int rank;
    int running;  // threads
    std::unique_ptr<unsigned char[]> shared;
    std::vector<Warp> warps;
    Barrier barrier;
};

std::vector<std::unique_ptr<Fiber>> fibers;  // kept for the next launch
std::vector<Block> blocks;                   // of the running cluster
Barrier cluster_barrier;
Fiber* running = nullptr;
ucontext_t scheduler;
void* scheduler_shadow = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
const std::function<void()>* body = nullptr;

void leave(bool for_good) {
    Fiber* const self = running;
    void* shadow = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &shadow, scheduler_stack, scheduler_stack_bytes);
    swapcontext(&self->context, &scheduler);
    __sanitizer_finish_switch_fiber(shadow, &scheduler_stack, &scheduler_stack_bytes);
}

void enter(Fiber* fiber) {
    running = fiber;
    thread.x = fiber->index;
    block.x = fiber->block->index;
    __sanitizer_start_switch_fiber(&scheduler_shadow, fiber->stack.get(), kStackBytes);
    swapcontext(&scheduler, &fiber->context);
    __sanitizer_finish_switch_fiber(scheduler_shadow, nullptr, nullptr);
}

void start() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
    (*body)();
    running->done = true;
    leave(true);
}

void wait(Barrier* barrier) {
    if (++barrier->arrived == barrier->expected) {
        barrier->arrived = 0;
        ++barrier->generation;
        return;
    }
    running->waits_for = barrier;
    running->generation = barrier->generation;
    leave(false);
}

void prepare(Fiber* fiber, Block* its_block, unsigned index) {
    fiber->block = its_block;
    fiber->index = index;
    fiber->shuffles = 0;
    fiber->waits_for = nullptr;
    fiber->done = false;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStackBytes;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, start, 0);
}

bool can_run(const Fiber& fiber) {
    return !fiber.done && (!fiber.waits_for || fiber.waits_for->generation != fiber.generation);
}

uint64_t next_random() { return (order = order * 0x5851F42D4C957F2D + 0x14057B7EF767814F) >> 33; }

// Some warps that follow one another, which run only when no others can.
struct Slow {
    size_t first = 0, count = 0;

    explicit Slow(size_t warps) : first(next_random() % warps), count(next_random() % (warps + 1)) {}
    bool has(size_t fiber) const { return fiber / kWarp - first < count; }
};

// Lets each thread run that can and is slow or not; returns whether any could.
bool turn(size_t count, const Slow& slow, bool slow_ones, size_t* left) {
    const size_t first = next_random() % count;
    const bool backwards = next_random() % 2;
    bool moved = false;
    for (size_t i = 0; i < count; ++i) {
        const size_t at = (first + (backwards ? count - i : i)) % count;
        Fiber& fiber = *fibers[at];
        if (slow.has(at) != slow_ones || !can_run(fiber)) continue;
        fiber.waits_for = nullptr;
        enter(&fiber);
        moved = true;
        if (!fiber.done) continue;
        --*left;
        if (--fiber.block->running == 0) fiber.block->shared.reset();  // nobody may read it any more
    }
    return moved;
}

void run_cluster(size_t count) {
    size_t left = count;
    while (left > 0) {
        const Slow slow(count / kWarp);
        bool moved = false;
        while (turn(count, slow, false, &left)) moved = true;
        if (turn(count, slow, true, &left) || moved) continue;
        std::fprintf(stderr, "emulated GPU: threads wait for others that never come\n");
        std::abort();
    }
}

}  // namespace

unsigned char* shared_memory() { return running->block->shared.get(); }

void* peer(void* mine, int rank) {
    return blocks[static_cast<size_t>(rank)].shared.get() + (static_cast<unsigned char*>(mine) - shared_memory());
}

int cluster_rank() { return running->block->rank; }

int cluster_size() { return static_cast<int>(blocks.size()); }

void sync_threads() { wait(&running->block->barrier); }

void sync_cluster() { wait(&cluster_barrier); }

uint64_t shuffle(uint64_t value, int from_lane) {
    Warp& warp = running->block->warps[running->index / kWarp];
    uint64_t* const exchanged = warp.exchanged[running->shuffles++ % 2];
    exchanged[running->index % kWarp] = value;
    wait(&warp.barrier);
    return exchanged[from_lane];
}

void run(const Grid& grid, const std::function<void()>& kernel) {
    const auto threads = static_cast<size_t>(grid.threads), cluster = static_cast<size_t>(grid.cluster);
    body = &kernel;
    block_size.x = static_cast<unsigned>(grid.threads);
    while (fibers.size() < threads * cluster) fibers.push_back(std::make_unique<Fiber>());
    for (int64_t first = 0; first < grid.blocks; first += grid.cluster) {
        blocks.clear();
        blocks.resize(cluster);
        cluster_barrier = {static_cast<int64_t>(threads * cluster), 0, 0};
        for (size_t rank = 0; rank < cluster; ++rank) {
            Block& b = blocks[rank];
            b.index = static_cast<unsigned>(first) + static_cast<unsigned>(rank);
            b.rank = static_cast<int>(rank);
            b.running = grid.threads;
            b.shared.reset(new unsigned char[static_cast<size_t>(grid.shared_bytes)]);
            std::memset(b.shared.get(), 0xFF, static_cast<size_t>(grid.shared_bytes));
            b.barrier.expected = grid.threads;
            b.warps.resize(threads / kWarp);
            for (Warp& warp : b.warps) warp.barrier.expected = kWarp;
            for (size_t i = 0; i < threads; ++i)
                prepare(fibers[rank * threads + i].get(), &b, static_cast<unsigned>(i));
        }
        run_cluster(threads * cluster);
    }
}

}  // namespace pmc::cuda::emulated
