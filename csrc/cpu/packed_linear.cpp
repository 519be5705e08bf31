// y (+)= x W^T + bias in float32, W packed into panels of a few columns that lie as the inner loop reads them, in its
// own dtype: where rows are few, reading W is what takes the time. W may lie as it is, too; then a part of a panel is
// packed, and widened, whenever it is multiplied.
#include <algorithm>

#include "common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/transpose.h"

namespace pmc::PMC_ISA {
namespace {

constexpr int kPanel = 2 * kLanes;
// A tile of rows x kPanel sums, one vector of x and two of the panel fill the registers.
constexpr int kTileRows = kLanes == 16 ? 12 : 6;
// Inputs taken at once, so that a panel's part stays in the second-level cache while the tiles pass over it.
constexpr int64_t kDepth = 2048;
// Of a weight as it is: a part of a panel that the first-level cache holds.
constexpr int64_t kGatheredDepth = 256;
// How far ahead of use a panel's lines are asked for, in inputs: they come from the second-level cache.
constexpr int64_t kAhead = 16;
// And in bytes, where they come from memory.
constexpr int64_t kFarAhead = 8192;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kLongestRun = 48;

// The columns of a panel that vector i of two has are i * kLanes and those after it. In bfloat16 they lie in turns, so
// that the two are the upper and lower halves of one vector's words.
inline void load_columns(const float* from, Floats* low, Floats* high) {
    *low = load(from), *high = load(from + kLanes);
}
inline void load_columns(const uint16_t* from, Floats* low, Floats* high) {
    Words both;
    std::memcpy(&both, from, sizeof both);
    *low = reinterpret_cast<Floats>(both << 16), *high = reinterpret_cast<Floats>(both & 0xFFFF0000);
}
template <class T>
constexpr int64_t place_of_column(int64_t column) {
    return sizeof(T) == sizeof(float) ? column : column % kLanes * 2 + column / kLanes;
}

// What a tile fetches from memory meanwhile, with each of its inputs: where it is alone, what comes kFarAhead of it.
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
    int64_t bytes_per_input;

    void fetch(int64_t k) const { __builtin_prefetch(at + k * bytes_per_input, 0, 2); }
    NextPanel share(int64_t index, int64_t tiles, int64_t depth) const {
        return {at + depth * index / tiles * bytes_per_input,
                std::min(kLineBytes, (bytes_per_input + tiles - 1) / tiles)};
    }
};

// Or so many bytes of each of kPanel rows, row_bytes apart: an input's address is in the row after the last one's.
struct NextRows {
    const char* at;
    int64_t row_bytes, bytes;

    void fetch(int64_t k) const { __builtin_prefetch(at + k % kPanel * row_bytes + k / kPanel * bytes, 0, 2); }
    NextRows share(int64_t index, int64_t tiles, int64_t depth) const {
        return {at + bytes * index / tiles, row_bytes, bytes * kPanel / (depth * tiles)};
    }
};

template <class T, class Next>
struct Tile {
    const float* x;
    int64_t x_stride;
    const T* panel;
    int64_t depth;
    const float* bias;  // the sums begin with this row
    bool accumulate;    // and with what y holds
    float* y;
    int64_t y_stride;
    Next next;
};

// y[Rows, kPanel] = bias (+ y) + x[Rows, depth] panel[depth, kPanel]. Unrolled, or the sums would live in memory.
template <int Rows, class T, class Next>
inline void multiply_tile(const Tile<T, Next>& tile) {
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
    const float* x = tile.x;
    const T* panel = tile.panel;
    const Next next = tile.next;
    // One loop: with AVX-512, a shorter one inside it, for each line of the next panel, takes a tenth of the rate.
    for (int64_t k = 0; k < tile.depth; ++k, ++x, panel += kPanel) {
        next.fetch(k);
        for (int64_t at = 0; at < kPanel; at += kLineBytes / sizeof(T))
            __builtin_prefetch(panel + kAhead * kPanel + at);
        Floats a, b;
        load_columns(panel, &a, &b);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) {
            const Floats value = broadcast(x[r * tile.x_stride]);
            low[r] += value * a;
            high[r] += value * b;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
        store(tile.y + r * tile.y_stride, low[r]);
        store(tile.y + r * tile.y_stride + kLanes, high[r]);
    }
}

template <int Rows, class T, class Next>
inline void multiply_tile(const Tile<T, Next>& tile, int64_t rows) {
    if (rows == Rows) return multiply_tile<Rows>(tile);
    if constexpr (Rows > 1) multiply_tile<Rows - 1>(tile, rows);
}

// `depth` inputs of a panel, from the one numbered `k` on.
template <class T, class Next>
struct PanelPart {
    const T* at;
    int64_t k, depth;
    Next next;
};

// Its share of one panel's columns of y, `begin` and those after it, for all rows.
template <class T, class Next>
void multiply_part(const PackedLinearArgs& args, const PanelPart<T, Next>& part, const float* bias, int64_t begin,
                   int64_t columns) {
    const bool whole = columns == kPanel;
    const int64_t tiles = (args.rows + kTileRows - 1) / kTileRows;
    for (int64_t index = 0; index < tiles; ++index) {
        const int64_t row = args.rows * index / tiles, rows = args.rows * (index + 1) / tiles - row;
        float* const y = args.y + row * args.y_stride + begin;
        Tile<T, Next> tile{args.x + row * args.x_stride + part.k,
                           args.x_stride,
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
template <class T>
void multiply_packed(const PackedLinearArgs& args, int64_t panel) {
    const int64_t begin = panel * kPanel, columns = std::min<int64_t>(kPanel, args.out_features - begin);
    const T* const weight = static_cast<const T*>(args.weight) + panel * kPanel * args.in_features;
    float bias[kPanel] = {};
    if (args.bias) std::copy_n(args.bias + begin, columns, bias);
    for (int64_t k = 0; k < args.in_features; k += kDepth) {
        const int64_t depth = std::min(kDepth, args.in_features - k);
        const T* const at = weight + k * kPanel;
        if (args.rows <= kTileRows) {
            const FarAhead<T> ahead{reinterpret_cast<const char*>(at) + kFarAhead};
            multiply_part<T, FarAhead<T>>(args, {at, k, depth, ahead}, bias, begin, columns);
        } else {
            const NextPanel next{reinterpret_cast<const char*>(at + kPanel * args.in_features), kPanel * sizeof(T)};
            multiply_part<T, NextPanel>(args, {at, k, depth, next}, bias, begin, columns);
        }
        std::fill_n(bias, kPanel, 0.0f);
    }
}

// [depth, kPanel] of float32 from `columns` rows of a weight as it is, row_stride elements apart.
template <class T>
inline void gather(const T* weight, int64_t row_stride, int64_t columns, int64_t depth, float* to) {
    for (int64_t begin = 0; begin < kPanel; begin += kLanes) {
        const T* const rows = weight + begin * row_stride;
        const int64_t here = std::clamp<int64_t>(columns - begin, 0, kLanes);
        int64_t k = 0;
        if (here == kLanes) {
            for (; k + kLanes <= depth; k += kLanes) {
                Floats v[kLanes];
#pragma GCC unroll 16
                for (int r = 0; r < kLanes; ++r) v[r] = load(rows + r * row_stride + k);
                transpose(v);
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) store(to + (k + i) * kPanel + begin, v[i]);
            }
        }
        for (; k < depth; ++k)
            for (int64_t r = 0; r < kLanes; ++r)
                to[k * kPanel + begin + r] = r < here ? widen(rows[r * row_stride + k]) : 0.0f;
    }
}

// The same from a weight as it is.
template <class T>
void multiply_in_place(const PackedLinearArgs& args, int64_t panel) {
    const int64_t begin = panel * kPanel, columns = std::min<int64_t>(kPanel, args.out_features - begin);
    const T* const weight = static_cast<const T*>(args.weight) + begin * args.row_stride;
    float bias[kPanel] = {};
    if (args.bias) std::copy_n(args.bias + begin, columns, bias);
    for (int64_t k = 0; k < args.in_features; k += kGatheredDepth) {
        const int64_t depth = std::min(kGatheredDepth, args.in_features - k);
        alignas(kLineBytes) float wide[kGatheredDepth * kPanel];
        gather(weight + k, args.row_stride, columns, depth, wide);
        const bool last = k + depth == args.in_features;
        const T* const next = weight + (last ? kPanel * args.row_stride : k + depth);
        constexpr int64_t kBytes = sizeof(T);
        const NextRows rows{reinterpret_cast<const char*>(next), args.row_stride * kBytes, depth * kBytes};
        multiply_part<float, NextRows>(args, {wide, k, depth, rows}, bias, begin, columns);
        std::fill_n(bias, kPanel, 0.0f);
    }
}

template <class T>
void multiply_panel(const PackedLinearArgs& args, int64_t panel) {
    args.row_stride == kPacked ? multiply_packed<T>(args, panel) : multiply_in_place<T>(args, panel);
}

template <class T>
void pack_panel(const PackWeightArgs& args, int64_t panel) {
    const int64_t begin = panel * kPanel, columns = std::min<int64_t>(kPanel, args.out_features - begin);
    const T* weight = static_cast<const T*>(args.weight) + begin * args.row_stride;
    T* to = static_cast<T*>(args.packed) + begin * args.in_features;
    for (int64_t k = 0; k < args.in_features; ++k, to += kPanel)
        for (int64_t c = 0; c < kPanel; ++c)
            to[place_of_column<T>(c)] = c < columns ? weight[c * args.row_stride + k] : T{};
}

int64_t panels(int64_t out_features) { return (out_features + kPanel - 1) / kPanel; }

}  // namespace

int64_t packed_weight_elements(int64_t out_features, int64_t in_features) {
    return panels(out_features) * kPanel * in_features;
}

void pack_weight(const PackWeightArgs& args) {
    parallel_for(panels(args.out_features), args.threads, [&](int64_t panel, int) {
        args.dtype == Dtype::kFloat32 ? pack_panel<float>(args, panel) : pack_panel<uint16_t>(args, panel);
    });
}

void packed_linear(const PackedLinearArgs& args) {
    // A thread takes neighbouring panels, since each is fetched while the one before is in use. Of large products there
    // is then still something to share out when the threads are not equally fast.
    const int64_t count = panels(args.out_features);
    const int64_t run = std::clamp<int64_t>((count + args.threads - 1) / args.threads, 1, kLongestRun);
    parallel_for((count + run - 1) / run, args.threads, [&](int64_t part, int) {
        for (int64_t panel = part * run; panel < std::min(count, (part + 1) * run); ++panel)
            args.dtype == Dtype::kFloat32 ? multiply_panel<float>(args, panel) : multiply_panel<uint16_t>(args, panel);
    });
}

}  // namespace pmc::PMC_ISA
