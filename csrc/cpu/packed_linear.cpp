// y (+)= x W^T + bias in float32, W packed into panels of a few columns that lie as the inner loop reads them, in its
// own dtype: where rows are few, reading W is what takes the time. W may lie as it is, too; then a part of a panel is
// packed, and widened, whenever it is multiplied. If x is to be rounded to bfloat16, inputs of a bfloat16 W are taken
// two at a time, as some CPUs multiply them.
#include <algorithm>
#include <memory>

#include "common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/transpose.h"

namespace pmc::PMC_ISA {
namespace {

constexpr int kPanel = 2 * kLanes;
// A tile of rows x kPanel sums, one vector of x and two of the panel fill the registers.
constexpr int kTileRows = kLanes == 16 ? 12 : 6;
// Steps taken at once, of an input or a pair each, so that a panel's part stays in the second-level cache while the
// tiles pass over it.
constexpr int64_t kDepth = 2048;
// Of a weight as it is: a part of a panel that the first-level cache holds.
constexpr int64_t kGatheredDepth = 256;
// How far ahead of use a panel's lines are asked for, in steps: they come from the second-level cache.
constexpr int64_t kAhead = 16;
// And in bytes, where they come from memory.
constexpr int64_t kFarAhead = 8192;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kLongestRun = 48;
constexpr uint32_t kNaN = 0x7FC0;  // in bfloat16
// Between rows of rounded inputs: rows a multiple of 4 KiB apart would compete for the same lines of the cache.
constexpr int64_t kPadding = 16;

// How inputs meet a panel's weights: one at a time, widened to float32. The columns that vector i of two has are
// i * kLanes and those after it. In bfloat16 they lie in turns, so that the two are the upper and lower halves of one
// vector's words.
template <class T>
struct Single {
    using Input = float;
    using Stored = T;  // what a weight as it is is made of
    using Weight = T;  // of a step and a column
    using Gathered = Single<float>;
    struct Columns {
        Floats low, high;
    };
    static constexpr int64_t kInputs = 1;

    static Columns columns(const T* from) {
        if constexpr (sizeof(T) == sizeof(float)) return {load(from), load(from + kLanes)};
        Words both;
        std::memcpy(&both, from, sizeof both);
        return {reinterpret_cast<Floats>(both << 16), reinterpret_cast<Floats>(both & 0xFFFF0000)};
    }
    static int64_t place_of_column(int64_t column) {
        return sizeof(T) == sizeof(float) ? column : column % kLanes * 2 + column / kLanes;
    }
    static T weight_of(const T* row, int64_t step, int64_t) { return row[step]; }
    static Floats gathered(const T* row, int64_t step) { return load(row + step); }
    static float gathered_one(const T* row, int64_t step, int64_t) { return widen(row[step]); }
    static Floats in_all_lanes(float x) { return broadcast(x); }
    static Floats add_product(Floats sum, Floats x, Floats weight) { return sum + x * weight; }
};

// Or two at a time, both of bfloat16, the first one in the lower half of a word.
template <bool kByOneInstruction>
struct Pair {
    using Input = uint32_t;
    using Stored = uint16_t;
    using Weight = uint32_t;
    using Gathered = Pair;
    struct Columns {
        Words low, high;
    };
    static constexpr int64_t kInputs = 2;

    static Columns columns(const uint32_t* from) {
        Columns made;
        std::memcpy(&made.low, from, sizeof made.low);
        std::memcpy(&made.high, from + kLanes, sizeof made.high);
        return made;
    }
    static int64_t place_of_column(int64_t column) { return column; }
    static uint32_t weight_of(const uint16_t* row, int64_t step, int64_t inputs) {
        const uint32_t first = row[2 * step], second = 2 * step + 1 < inputs ? row[2 * step + 1] : 0;
        return first | second << 16;
    }
    static Floats gathered(const uint16_t* row, int64_t step) {
        Floats pairs;
        std::memcpy(&pairs, row + 2 * step, sizeof pairs);
        return pairs;
    }
    static uint32_t gathered_one(const uint16_t* row, int64_t step, int64_t inputs) {
        return weight_of(row, step, inputs);
    }
    static Words in_all_lanes(uint32_t x) { return broadcast_word(x); }
    static Floats add_product(Floats sum, Words x, Words weight) {
#if PMC_LANES == 16
        if constexpr (kByOneInstruction) {
            // No intrinsic: that would want this file compiled for CPUs that have it, and others run it, too.
            asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weight));
            return sum;
        }
#endif
        sum += reinterpret_cast<Floats>(x << 16) * reinterpret_cast<Floats>(weight << 16);
        return sum + reinterpret_cast<Floats>(x & 0xFFFF0000) * reinterpret_cast<Floats>(weight & 0xFFFF0000);
    }
};

// What a tile fetches from memory meanwhile, with each of its steps: where it is alone, what comes kFarAhead of it.
template <class T>
struct FarAhead {
    const char* at;

    void fetch(int64_t k) const {
        for (int64_t line = 0; line < kPanel * int64_t{sizeof(T)}; line += kLineBytes)
            __builtin_prefetch(at + k * kPanel * int64_t{sizeof(T)} + line, 0, 2);
    }
    FarAhead share(int64_t, int64_t, int64_t) const { return *this; }
};

// Else its share of the same part of the next panel.
struct NextPanel {
    const char* at;
    int64_t bytes_per_step;

    void fetch(int64_t k) const { __builtin_prefetch(at + k * bytes_per_step, 0, 2); }
    NextPanel share(int64_t index, int64_t tiles, int64_t depth) const {
        return {at + depth * index / tiles * bytes_per_step,
                std::min(kLineBytes, (bytes_per_step + tiles - 1) / tiles)};
    }
};

// Or so many bytes of each of kPanel rows, row_bytes apart: a step's address is in the row after the last one's.
struct NextRows {
    const char* at;
    int64_t row_bytes, bytes;

    void fetch(int64_t k) const { __builtin_prefetch(at + k % kPanel * row_bytes + k / kPanel * bytes, 0, 2); }
    NextRows share(int64_t index, int64_t tiles, int64_t depth) const {
        return {at + bytes * index / tiles, row_bytes, bytes * kPanel / (depth * tiles)};
    }
};

template <class How, class Next>
struct Tile {
    const typename How::Input* x;
    int64_t x_stride;
    const typename How::Weight* panel;
    int64_t depth;      // in steps
    const float* bias;  // the sums begin with this row
    bool accumulate;    // and with what y holds
    float* y;
    int64_t y_stride;
    Next next;
};

// y[Rows, kPanel] = bias (+ y) + x[Rows, depth] panel[depth, kPanel]. Unrolled, or the sums would live in memory.
template <int Rows, class How, class Next>
inline void multiply_tile(const Tile<How, Next>& tile) {
    Floats low[Rows], high[Rows];
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
        low[r] = load(tile.bias);
        high[r] = load(tile.bias + kLanes);
        if (tile.accumulate) {
            low[r] += load(tile.y + r * tile.y_stride);
            high[r] += load(tile.y + r * tile.y_stride + kLanes);
        } else {
            __builtin_prefetch(tile.y + r * tile.y_stride, 1);
        }
    }
    const typename How::Input* x = tile.x;
    const typename How::Weight* panel = tile.panel;
    const Next next = tile.next;
    // One loop: with AVX-512, a shorter one inside it, for each line of the next panel, takes a tenth of the rate.
    for (int64_t k = 0; k < tile.depth; ++k, ++x, panel += kPanel) {
        next.fetch(k);
        for (int64_t at = 0; at < kPanel; at += kLineBytes / sizeof(*panel))
            __builtin_prefetch(panel + kAhead * kPanel + at);
        const auto columns = How::columns(panel);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) {
            const auto value = How::in_all_lanes(x[r * tile.x_stride]);
            low[r] = How::add_product(low[r], value, columns.low);
            high[r] = How::add_product(high[r], value, columns.high);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
        store(tile.y + r * tile.y_stride, low[r]);
        store(tile.y + r * tile.y_stride + kLanes, high[r]);
    }
}

template <int Rows, class How, class Next>
inline void multiply_tile(const Tile<How, Next>& tile, int64_t rows) {
    if (rows == Rows) return multiply_tile<Rows>(tile);
    if constexpr (Rows > 1) multiply_tile<Rows - 1>(tile, rows);
}

template <class How>
int64_t steps_of(int64_t in_features) {
    return (in_features + How::kInputs - 1) / How::kInputs;
}

// A product, and its x as it is multiplied.
template <class Input>
struct Product {
    const PackedLinearArgs& args;
    const Input* x;
    int64_t x_stride;
};

// `depth` steps of a panel, from the one numbered `k` on.
template <class How, class Next>
struct PanelPart {
    const typename How::Weight* at;
    int64_t k, depth;
    Next next;
};

// Its share of one panel's columns of y, `begin` and those after it, for all rows.
template <class How, class Next>
void multiply_part(const Product<typename How::Input>& product, const PanelPart<How, Next>& part, const float* bias,
                   int64_t begin, int64_t columns) {
    const PackedLinearArgs& args = product.args;
    const bool whole = columns == kPanel;
    const int64_t tiles = (args.rows + kTileRows - 1) / kTileRows;
    for (int64_t index = 0; index < tiles; ++index) {
        const int64_t row = args.rows * index / tiles, rows = args.rows * (index + 1) / tiles - row;
        float* const y = args.y + row * args.y_stride + begin;
        Tile<How, Next> tile{product.x + row * product.x_stride + part.k,
                             product.x_stride,
                             part.at,
                             part.depth,
                             bias,
                             args.accumulate || part.k > 0,
                             y,
                             args.y_stride,
                             part.next.share(index, tiles, part.depth)};
        float edge[kTileRows * kPanel] = {};  // the last columns, where a whole vector would leave the row
        if (!whole) {
            tile.y = edge, tile.y_stride = kPanel;
            if (tile.accumulate)
                for (int64_t r = 0; r < rows; ++r) std::copy_n(y + r * args.y_stride, columns, edge + r * kPanel);
        }
        multiply_tile<kTileRows>(tile, rows);
        if (!whole)
            for (int64_t r = 0; r < rows; ++r) std::copy_n(edge + r * kPanel, columns, y + r * args.y_stride);
    }
}

// One panel's columns of y, for all rows.
template <class How>
void multiply_packed(const Product<typename How::Input>& product, int64_t panel) {
    using Weight = typename How::Weight;
    const PackedLinearArgs& args = product.args;
    const int64_t begin = panel * kPanel, columns = std::min<int64_t>(kPanel, args.out_features - begin);
    const int64_t steps = steps_of<How>(args.in_features);
    const Weight* const weight = static_cast<const Weight*>(args.weight) + panel * kPanel * steps;
    float bias[kPanel] = {};
    if (args.bias) std::copy_n(args.bias + begin, columns, bias);
    for (int64_t k = 0; k < steps; k += kDepth) {
        const int64_t depth = std::min(kDepth, steps - k);
        const Weight* const at = weight + k * kPanel;
        if (args.rows <= kTileRows) {
            const FarAhead<Weight> ahead{reinterpret_cast<const char*>(at) + kFarAhead};
            multiply_part<How, FarAhead<Weight>>(product, {at, k, depth, ahead}, bias, begin, columns);
        } else {
            const NextPanel next{reinterpret_cast<const char*>(at + kPanel * steps), kPanel * sizeof(Weight)};
            multiply_part<How, NextPanel>(product, {at, k, depth, next}, bias, begin, columns);
        }
        std::fill_n(bias, kPanel, 0.0f);
    }
}

// [depth, kPanel] from `columns` rows of a weight as it is, steps [k, k + depth) of each.
template <class How>
inline void gather(const PackedLinearArgs& args, const typename How::Stored* weight, int64_t columns, int64_t k,
                   int64_t depth, typename How::Gathered::Weight* to) {
    const int64_t whole = std::min(k + depth, args.in_features / How::kInputs);  // steps before it have all inputs
    for (int64_t begin = 0; begin < kPanel; begin += kLanes) {
        const auto* const rows = weight + begin * args.row_stride;
        const int64_t here = std::clamp<int64_t>(columns - begin, 0, kLanes);
        auto* at = to + begin;
        int64_t step = k;
        if (here == kLanes) {
            for (; step + kLanes <= whole; step += kLanes, at += kLanes * kPanel) {
                Floats v[kLanes];
#pragma GCC unroll 16
                for (int r = 0; r < kLanes; ++r) v[r] = How::gathered(rows + r * args.row_stride, step);
                transpose(v);
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) std::memcpy(at + i * kPanel, &v[i], sizeof v[i]);
            }
        }
        for (; step < k + depth; ++step, at += kPanel)
            for (int64_t r = 0; r < kLanes; ++r)
                at[r] = r < here ? How::gathered_one(rows + r * args.row_stride, step, args.in_features) : 0;
    }
}

// The same from a weight as it is.
template <class How>
void multiply_in_place(const Product<typename How::Input>& product, int64_t panel) {
    using Gathered = typename How::Gathered;
    const PackedLinearArgs& args = product.args;
    const int64_t begin = panel * kPanel, columns = std::min<int64_t>(kPanel, args.out_features - begin);
    const auto* const weight = static_cast<const typename How::Stored*>(args.weight) + begin * args.row_stride;
    const int64_t steps = steps_of<How>(args.in_features);
    float bias[kPanel] = {};
    if (args.bias) std::copy_n(args.bias + begin, columns, bias);
    for (int64_t k = 0; k < steps; k += kGatheredDepth) {
        const int64_t depth = std::min(kGatheredDepth, steps - k);
        alignas(kLineBytes) typename Gathered::Weight gathered[kGatheredDepth * kPanel];
        gather<How>(args, weight, columns, k, depth, gathered);
        const auto* const next = weight + (k + depth == steps ? kPanel * args.row_stride : (k + depth) * How::kInputs);
        constexpr int64_t kBytes = sizeof(*weight);
        const NextRows rows{reinterpret_cast<const char*>(next), args.row_stride * kBytes,
                            depth * How::kInputs * kBytes};
        multiply_part<Gathered, NextRows>(product, {gathered, k, depth, rows}, bias, begin, columns);
        std::fill_n(bias, kPanel, 0.0f);
    }
}

template <class How>
void pack_panel(const PackWeightArgs& args, int64_t panel) {
    const int64_t begin = panel * kPanel, columns = std::min<int64_t>(kPanel, args.out_features - begin);
    const int64_t steps = steps_of<How>(args.in_features);
    const auto* const weight = static_cast<const typename How::Stored*>(args.weight) + begin * args.row_stride;
    auto* to = static_cast<typename How::Weight*>(args.packed) + begin * steps;
    for (int64_t step = 0; step < steps; ++step, to += kPanel)
        for (int64_t c = 0; c < kPanel; ++c)
            to[How::place_of_column(c)] =
                c < columns ? How::weight_of(weight + c * args.row_stride, step, args.in_features) : 0;
}

int64_t panels(int64_t out_features) { return (out_features + kPanel - 1) / kPanel; }

template <class How>
void multiply(const Product<typename How::Input>& product) {
    const PackedLinearArgs& args = product.args;
    // A thread takes neighbouring panels, since each is fetched while the one before is in use. Of large products there
    // is then still something to share out when the threads are not equally fast.
    const int64_t count = panels(args.out_features);
    const int64_t run = std::clamp<int64_t>((count + args.threads - 1) / args.threads, 1, kLongestRun);
    parallel_for((count + run - 1) / run, args.threads, [&](int64_t part, int) {
        for (int64_t panel = part * run; panel < std::min(count, (part + 1) * run); ++panel)
            args.row_stride == kPacked ? multiply_packed<How>(product, panel) : multiply_in_place<How>(product, panel);
    });
}

// To bfloat16, two to a word; what is missing in the last one is 0.
void round_to_pairs(const float* from, int64_t count, uint32_t* to) {
    const auto round = [](float x) -> uint32_t { return x == x ? narrow(x) : kNaN; };
    for (int64_t i = 0; i < count / 2; ++i) to[i] = round(from[2 * i]) | round(from[2 * i + 1]) << 16;
    if (count % 2) to[count / 2] = round(from[count - 1]);
}

}  // namespace

int64_t packed_weight_elements(int64_t out_features, int64_t in_features, bool rounded) {
    return panels(out_features) * kPanel * (rounded ? in_features + in_features % 2 : in_features);
}

void pack_weight(const PackWeightArgs& args) {
    parallel_for(panels(args.out_features), args.threads, [&](int64_t panel, int) {
        if (args.rounded) return pack_panel<Pair<false>>(args, panel);
        args.dtype == Dtype::kFloat32 ? pack_panel<Single<float>>(args, panel)
                                      : pack_panel<Single<uint16_t>>(args, panel);
    });
}

bool has_dot_product() {
#if PMC_LANES == 16
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

void packed_linear(const PackedLinearArgs& args) {
    if (!args.rounded) {
        const Product<float> product{args, args.x, args.x_stride};
        return args.dtype == Dtype::kFloat32 ? multiply<Single<float>>(product) : multiply<Single<uint16_t>>(product);
    }
    const int64_t stride = steps_of<Pair<false>>(args.in_features) + kPadding;
    const std::unique_ptr<uint32_t[]> x(new uint32_t[static_cast<size_t>(args.rows * stride)]);
    parallel_for(args.rows, args.threads, [&](int64_t row, int) {
        round_to_pairs(args.x + row * args.x_stride, args.in_features, x.get() + row * stride);
    });
    const Product<uint32_t> product{args, x.get(), stride};
    has_dot_product() ? multiply<Pair<true>>(product) : multiply<Pair<false>>(product);
}

}  // namespace pmc::PMC_ISA
