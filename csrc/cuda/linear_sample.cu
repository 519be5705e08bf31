// Draws one token per row of hidden states from the head's distribution, for Hopper: logits never leave the chip.
//
// Each block of a persistent grid takes tiles of 128 tokens. One thread has the hardware copy 64 columns at a time of
// the tile and of all rows into a ring of stages; the two blocks of a cluster copy half of the rows each, for both. Up
// to 160 rows two warpgroups take tiles in turn, so that one draws while the other multiplies; beyond, each takes half
// of the rows of every tile. A warp turns its products round in shared memory: then a thread has neighbouring tokens of
// one row, and adds them to what it knows of that row. A second kernel joins what threads know.
//
// Where something is truncated, products are left in memory for `sample` instead.
#include "common/order.h"
#include "cuda/hopper.h"
#include "cuda/part.h"
#include "cuda/row.h"
#include "cuda/team.h"

namespace pmc::cuda {
namespace {

constexpr const char* kName = "linear_sample";
constexpr int kTokens = 128;                                               // of a tile
constexpr int kCluster = 2;                                                // blocks
constexpr int kWarpgroups = 2, kWarps = kWarpgroups * kWarpgroup / kWarp;  // that multiply and draw
constexpr int kThreads = (kWarpgroups + 1) * kWarpgroup;
constexpr int kCopying = 24, kDrawing = 240;  // registers of a thread
constexpr int kMostShared = 227 << 10;

struct HeadArgs {
    TensorMap hidden, weight;
    int depth;             // steps of 64 columns
    int groups, clusters;  // of tiles, of blocks
    float* logits;         // or null
    Part* parts;           // [rows, parts_of_row]
    int64_t parts_of_row;
    float inverse_temperature;
    SampleArgs draw;
};

// Of rows, kColumns for each of kHalves, and of shared memory.
template <int kColumns_, int kHalves_>
struct Shape {
    static constexpr int kColumns = kColumns_, kHalves = kHalves_, kRows = kColumns * kHalves;
    static constexpr int kPartsOfBlock = kWarps / kHalves;  // warps that see a row

    static constexpr int kWeightBytes = kTokens * kTileRowBytes;
    static constexpr int kStageBytes = kWeightBytes + kRows * kTileRowBytes;
    static constexpr int kTurned = kWarp * kWarp;  // floats of a warp
    static constexpr int kBarrierBytes = 256, kFixedBytes = kWarps * kTurned * 4 + kBarrierBytes;
    static constexpr int kFitting = (kMostShared - kFixedBytes) / kStageBytes;
    static constexpr int kStages = kFitting < 8 ? kFitting : 8;
    static constexpr int kBytes = kStages * kStageBytes + kFixedBytes;
    static_assert(kStages >= 4 && kBytes <= kMostShared);
};

// A block's shared memory. Steps take stages in turn, and count on from tile to tile.
template <class S>
struct Stages {
    static __device__ unsigned char* weight(int step) { return shared_memory() + step % S::kStages * S::kStageBytes; }
    static __device__ unsigned char* hidden(int step) { return weight(step) + S::kWeightBytes; }
    static __device__ float* turned(int warp) {
        return reinterpret_cast<float*>(shared_memory() + S::kStages * S::kStageBytes) + warp * S::kTurned;
    }

    static __device__ void start_all() {
        for (int stage = 0; stage < S::kStages; ++stage) {
            start(full(stage), 1);
            // By each warp that reads it, the other block's too, since what is copied is for both.
            start(empty(stage), kCluster * S::kHalves * kWarpgroup / kWarp);
        }
        for (int which = 0; which < kWarpgroups; ++which) start(passed(which), kWarpgroup / kWarp);
        publish_started();
    }

    static __device__ Arrivals* full(int step) { return barriers() + step % S::kStages; }
    static __device__ void await_full(int step) { wait(full(step), round(step) & 1); }
    static __device__ void await_empty(int step) { wait(empty(step), (round(step) + 1) & 1); }
    static __device__ void leave(int step, int lane) {
        if (lane < kCluster) arrive(empty(step), lane);
    }

    // Whoever has not seen a stage full in one round cannot tell it from the next. So warpgroups that take tiles in
    // turn wait until the other one has seen all stages of its tile.
    static __device__ void await_turn(int turn) {
        if (turn > 0) wait(passed(turn - 1), (turn - 1) / kWarpgroups & 1);
    }
    static __device__ void pass_on(int turn, int lane) {
        __syncwarp();
        if (lane == 0) arrive(passed(turn), cluster_rank());
    }

  private:
    static __device__ Arrivals* passed(int turn) { return barriers() + 2 * S::kStages + turn % kWarpgroups; }
    static __device__ unsigned round(int step) { return static_cast<unsigned>(step / S::kStages); }
    static __device__ Arrivals* empty(int step) { return full(step) + S::kStages; }
    static __device__ Arrivals* barriers() {
        static_assert((2 * S::kStages + kWarpgroups) * sizeof(Arrivals) <= S::kBarrierBytes);
        return reinterpret_cast<Arrivals*>(shared_memory() + S::kBytes - S::kBarrierBytes);
    }
};

// The tiles of a block: those of a cluster are neighbours. The last one may lie beyond the vocabulary.
// A template, like all that only Hopper's code uses: for other targets nothing is left of it that could be unused.
template <class S>
class Turns {
  public:
    explicit __device__ Turns(const HeadArgs& args) : args_(args) {}

    __device__ bool has(int turn) const { return group(turn) < args_.groups; }
    __device__ int token(int turn) const { return (group(turn) * kCluster + cluster_rank()) * kTokens; }

  private:
    __device__ int group(int turn) const { return static_cast<int>(blockIdx.x) / kCluster + turn * args_.clusters; }

    const HeadArgs& args_;
};

template <class S>
__device__ void copy_tiles(const HeadArgs& args) {
    using Ring = Stages<S>;
    const Turns<S> turns(args);
    constexpr int kShare = S::kRows / kCluster;
    const int first_row = cluster_rank() * kShare;
    int step = 0;
    for (int turn = 0; turns.has(turn); ++turn)
        for (int k = 0; k < args.depth; ++k, ++step) {
            Ring::await_empty(step);
            arrive_expecting(Ring::full(step), S::kStageBytes);
            copy_tile(Ring::weight(step), &args.weight, k * kTileColumns, turns.token(turn), Ring::full(step));
            copy_tile_to_all(Ring::hidden(step) + first_row * kTileRowBytes, &args.hidden, k * kTileColumns, first_row,
                             Ring::full(step), (1 << kCluster) - 1);
        }
}

// A warpgroup's work.
template <class S>
class Drawing {
    using Ring = Stages<S>;

  public:
    explicit __device__ Drawing(const HeadArgs& args) : args_(args) {}

    __device__ void run() {
        const Turns<S> turns(args_);
        if (!args_.logits)
            for (int row = first_row() + lane(); row < first_row() + S::kColumns; row += kWarp)
                if (row < args_.draw.rows) *part_of(row) = Part{};
        for (int turn = kInTurn ? warpgroup() : 0; turns.has(turn); turn += kInTurn ? kWarpgroups : 1)
            take(turn, turns.token(turn));
    }

  private:
    static constexpr bool kInTurn = S::kHalves == 1;
    static constexpr int kParts = kTokens / kProductRows;  // of a tile, one product each

    static __device__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
    static __device__ int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
    static __device__ int warpgroup() { return static_cast<int>(threadIdx.x) / kWarpgroup; }
    static __device__ int first_row() { return S::kHalves == 1 ? 0 : warpgroup() * S::kColumns; }
    static __device__ float* turned() { return Ring::turned(warp()); }
    __device__ Part* part_of(int row) const {
        const int part = static_cast<int>(blockIdx.x) * S::kPartsOfBlock + warp() % S::kPartsOfBlock;
        return &args_.parts[row * args_.parts_of_row + part];
    }

    __device__ void take(int turn, int first_token) {
        float sums[kParts][S::kColumns / 2];
        multiply_tile(sums, turn);
#pragma unroll 1
        for (int chunk = 0; chunk < S::kColumns / kWarp; ++chunk) {
#pragma unroll
            for (int i = 0; i < S::kColumns / kWarp; ++i)
                if (i == chunk) turn_round(sums, i);
            __syncwarp();
            const int row = first_row() + chunk * kWarp;
            if (args_.logits)
                write(row, first_token);
            else if (row + lane() < args_.draw.rows)
                draw(row + lane(), first_token);
            __syncwarp();
        }
    }

    __device__ void multiply_tile(float (&sums)[kParts][S::kColumns / 2], int turn) const {
        if (kInTurn) Ring::await_turn(turn);
        int step = turn * args_.depth;
#pragma unroll 1
        for (int k = 0; k < args_.depth; ++k, ++step) {
            Ring::await_full(step);
            if (kInTurn && k == args_.depth - 1) Ring::pass_on(turn, lane());
            const auto weight = TileDescriptor::at(shared_address(Ring::weight(step)));
            const auto hidden = TileDescriptor::at(shared_address(Ring::hidden(step))).down(first_row());
            begin_products();
#pragma unroll
            for (int column = 0; column < kTileColumns; column += kProductDepth)
#pragma unroll
                for (int part = 0; part < kParts; ++part)
                    multiply<S::kColumns>(sums[part], weight.down(part * kProductRows).right(column),
                                          hidden.right(column), k > 0 || column > 0);
            end_group();
            if (k == 0) continue;
            await_products<1>();
            Ring::leave(step - 1, lane());
        }
        await_products<0>();
        Ring::leave(step - 1, lane());
    }

    // A warp's 32 tokens of a tile lie in two parts of it.
    __device__ int token_of(int place) const {
        return place / 16 * kProductRows + warp() % (kWarpgroup / kWarp) * 16 + place % 16;
    }

    // Four neighbours side by side. Which four depends on the row, so that threads of a warp meet in no bank.
    static __device__ int turned_place(int row, int place) {
        return row * kWarp + (place / 4 ^ row % 8) * 4 + place % 4;
    }

    // What a thread holds lies 2 rows, 8 and 16 tokens from its first: other places are other bits, or fixed distances.
    __device__ void turn_round(const float (&sums)[kParts][S::kColumns / 2], int chunk) const {
        const int first = turned_place(lane() % 4 * 2, lane() / 4);
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
            for (int i = 0; i < kWarp / 2; ++i) {
                const int next_row = i % 2 * (kWarp ^ 4), next_tokens = i / 2 % 2 * 8 ^ part * 16;
                turned()[(first ^ next_row ^ next_tokens) + i / 4 * 8 * kWarp] = sums[part][chunk * kWarp / 2 + i];
            }
    }

    // A thread for each row.
    __device__ void draw(int row, int first_token) const {
        const SampleArgs& args = args_.draw;
        const int vocab = static_cast<int>(args.vocab);
        PartOfRow part(
            *part_of(row),
            {args.seed, static_cast<uint32_t>(args.sequence[row]), static_cast<uint32_t>(args.position[row])},
            args.temperature, args_.inverse_temperature);
#pragma unroll 1
        for (int place = 0; place < kWarp; place += 4) {
            const int token = first_token + token_of(place);
            Four y = *reinterpret_cast<const Four*>(&turned()[turned_place(lane(), place)]);
            if (args.bias)
#pragma unroll
                for (int i = 0; i < 4; ++i) y.of[i] += args.bias[token + i < vocab ? token + i : vocab - 1];
#pragma unroll
            for (int i = 0; i < 4; ++i) y.of[i] = token + i < vocab ? transformed(y.of[i], args.head) : -INFINITY;
            part.add(y, token);
        }
        *part_of(row) = part.part();
    }

    // A thread for each token.
    __device__ void write(int first_row, int first_token) const {
        const int token = first_token + token_of(lane());
        if (token >= args_.draw.vocab) return;
#pragma unroll 1
        for (int r = 0; r < kWarp && first_row + r < args_.draw.rows; ++r)
            args_.logits[(first_row + r) * args_.draw.row_stride + token] = turned()[turned_place(r, lane())];
    }

    const HeadArgs& args_;
};

template <class S>
__global__ void __launch_bounds__(kThreads, 1) head_kernel(const __grid_constant__ HeadArgs args) {
    if constexpr (kHopperCode) {
        if (threadIdx.x == 0) Stages<S>::start_all();
        sync_cluster();
        if (threadIdx.x / kWarpgroup == kWarpgroups) {
            keep_registers<kCopying>();
            if (threadIdx.x % kWarpgroup == 0) copy_tiles<S>(args);
        } else {
            take_registers<kDrawing>();
            Drawing<S>(args).run();
        }
        sync_cluster();  // a block may still be copied to, and told that stages are empty
    }
}

// A block for each row.
__global__ void __launch_bounds__(kMostThreads) join_kernel(const __grid_constant__ HeadArgs args) {
    Team team(reinterpret_cast<Exchange*>(shared_memory()));
    const SampleArgs& draw = args.draw;
    const int64_t r = blockIdx.x;
    const Part* const parts = args.parts + r * args.parts_of_row;
    const int count = static_cast<int>(args.parts_of_row);
    const bool greedy = draw.temperature == 0, tempered = !greedy && draw.temperature != 1;
    const auto scale = [&](float y) { return tempered ? y / draw.temperature : y; };

    float top = -INFINITY, least = -FLT_MAX;
    for (int i = team.thread(); i < count; i += team.threads()) {
        top = fmaxf(top, parts[i].top);
        least = fmaxf(least, parts[i].least);
    }
    const float row_top = from_order_key(static_cast<uint32_t>(team.largest(order_key(top))));
    const float shift = scale(row_top);
    if (!is_finite(row_top) || !is_finite(shift)) {
        if (team.leads()) atomicMin(draw.bad, static_cast<int32_t>(r));
        return;
    }
    least = from_order_key(static_cast<uint32_t>(team.largest(order_key(least))));

    uint64_t mass = 0, tempered_mass = 0, winner = 0;
    float logit = 0;
    for (int i = team.thread(); i < count; i += team.threads()) {
        const Part part = parts[i];
        const float drop = fmaxf(part.top, -FLT_MAX) - row_top;
        mass += fixed_mass(part.mass * expf(drop));
        if (tempered) tempered_mass += fixed_mass(part.tempered_mass * expf(drop / draw.temperature));
        if (part.most < least || part.most == -INFINITY) continue;
        const float score = greedy ? part.logit : scale(part.logit) + gumbel_from_word(part.word);
        const uint64_t offered = ranked(score, part.token);
        if (offered <= winner) continue;
        winner = offered;
        logit = part.logit;
    }
    mass = team.sum(mass);
    tempered_mass = tempered ? team.sum(tempered_mass) : mass;
    if (team.largest(winner) != winner) return;
    draw.token[r] = token_of(winner);
    draw.logprob[r] = static_cast<float>(static_cast<double>(logit) - row_top - log(from_fixed_mass(mass)));
    draw.sampling_logprob[r] =
        greedy ? 0
               : static_cast<float>(static_cast<double>(scale(logit)) - shift - log(from_fixed_mass(tempered_mass)));
    draw.kept_mass[r] = 1;
}

// Tiles for clusters of blocks, as many as the GPU runs at once.
template <class S>
struct Plan {
    int groups, clusters;
    Grid grid;

    explicit Plan(int64_t vocab)
        : groups(static_cast<int>((vocab + kCluster * kTokens - 1) / (kCluster * kTokens))),
          grid{kCluster, kThreads, kCluster, S::kBytes} {
        const int resident = resident_clusters(kName, head_kernel<S>, grid);
        clusters = resident < 1 ? 1 : resident < groups ? resident : groups;
        grid.blocks = static_cast<int64_t>(clusters) * kCluster;
    }
    int64_t parts_of_row() const { return grid.blocks * S::kPartsOfBlock; }
};

// Calls visit(shape) for the fewest rows that hold `rows`.
template <class Visit>
void with_shape(int64_t rows, const Visit& visit) {
    if (rows <= 32) return visit(Shape<32, 1>{});
    if (rows <= 64) return visit(Shape<64, 1>{});
    if (rows <= 96) return visit(Shape<96, 1>{});
    if (rows <= 128) return visit(Shape<128, 1>{});
    if (rows <= 160) return visit(Shape<160, 1>{});
    if (rows <= 192) return visit(Shape<96, 2>{});
    return visit(Shape<128, 2>{});
}

template <class S>
void launch_linear_sample(const LinearSampleArgs& args, const Queue& queue) {
    const SampleArgs& draw = args.draw;
    const Plan<S> plan(draw.vocab);
    const HeadArgs head{tensor_map(kName, args.hidden, draw.rows, args.size, args.hidden_stride, S::kRows / kCluster),
                        tensor_map(kName, args.weight, draw.vocab, args.size, args.weight_stride, kTokens),
                        static_cast<int>((args.size + kTileColumns - 1) / kTileColumns),
                        plan.groups,
                        plan.clusters,
                        args.logits,
                        static_cast<Part*>(args.parts),
                        plan.parts_of_row(),
                        draw.temperature == 0 ? 0 : 1 / draw.temperature,
                        draw};
    launch(kName, head_kernel<S>, plan.grid, queue.stream, head);
    if (args.logits) return;
    const Device device = current_device(kName, join_kernel);
    launch(kName, join_kernel, {draw.rows, device.threads, 1, sizeof(Exchange)}, queue.stream, head);
}

}  // namespace

int64_t linear_sample_scratch(int64_t rows, int64_t vocab, const Queue& queue) {
    const CurrentDevice current(queue.device, kName);
    int64_t bytes = 0;
    with_shape(rows, [&](auto shape) {
        bytes = rows * Plan<decltype(shape)>(vocab).parts_of_row() * static_cast<int64_t>(sizeof(Part));
    });
    return bytes;
}

void linear_sample(const LinearSampleArgs& args, const Queue& queue) {
    if (args.draw.rows == 0) return;
    {
        const CurrentDevice current(queue.device, kName);
        with_shape(args.draw.rows, [&](auto shape) { launch_linear_sample<decltype(shape)>(args, queue); });
    }
    if (!args.logits) return;
    SampleArgs draw = args.draw;
    draw.logits = args.logits;
    sample(draw, Dtype::kFloat32, queue);
}

}  // namespace pmc::cuda
