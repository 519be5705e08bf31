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
int multiprocessors = 4;
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
    std::function<bool()> waits_until;
    Begun begun;
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
    std::unique_ptr<unsigned char[], decltype(&std::free)> shared{nullptr, std::free};
    std::vector<Warp> warps;
    Barrier barrier;
};

std::vector<std::unique_ptr<Fiber>> fibers;  // kept for the next launch
std::vector<Block> blocks;                   // of the running cluster
Barrier cluster_barrier;
std::vector<std::function<void()>> under_way;  // what no thread does
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
    fiber->waits_until = nullptr;
    fiber->begun = {};
    fiber->done = false;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStackBytes;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, start, 0);
}

bool can_run(const Fiber& fiber) {
    return !fiber.done && (!fiber.waits_for || fiber.waits_for->generation != fiber.generation) &&
           (!fiber.waits_until || fiber.waits_until());
}

uint64_t next_random() { return (order = order * 0x5851F42D4C957F2D + 0x14057B7EF767814F) >> 33; }

// One of the things under way comes to its end, whichever was begun first.
bool finish_one() {
    if (under_way.empty()) return false;
    std::swap(under_way[next_random() % under_way.size()], under_way.back());
    const std::function<void()> work = std::move(under_way.back());
    under_way.pop_back();
    work();
    return true;
}

void fail(const char* what) {
    std::fprintf(stderr, "emulated GPU: %s\n", what);
    std::abort();
}

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
        fiber.waits_until = nullptr;
        enter(&fiber);
        if (next_random() % 16 == 0) finish_one();
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
        if (turn(count, slow, true, &left) || moved || finish_one()) continue;
        fail("threads wait for others that never come");
    }
    if (!under_way.empty()) fail("a block ended before its copies did");
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

void sync_warp() { wait(&running->block->warps[running->index / kWarp].barrier); }

void wait_until(std::function<bool()> holds) {
    if (holds()) return;
    running->waits_until = std::move(holds);
    leave(false);
}

void later(std::function<void()> work) { under_way.push_back(std::move(work)); }

bool some_times() { return next_random() % 4 == 0; }

Begun& begun() { return running->begun; }

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
            void* shared = nullptr;
            if (posix_memalign(&shared, kSharedAlignment, static_cast<size_t>(grid.shared_bytes)))
                fail("there is no memory left");
            b.shared.reset(static_cast<unsigned char*>(shared));
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
