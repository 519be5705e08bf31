// The rows of a packed batch's sequences, as its attention takes them, forward and backward.
//
// The queries of the heads that share keys are rows, token by token.
#pragma once

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/panel.h"

namespace pmc::PMC_ISA {
namespace {

constexpr int64_t kRows = kPackedAttentionRows;

// Also of NaN with any payload, which rounding could carry over.
inline void store_any(float* to, Floats v) { store(to, v); }
inline void store_any(uint16_t* to, Floats v) {
    const Ints quiet = Ints{} + 0x7FC00000;
    store(to, v == v ? v : reinterpret_cast<Floats>(quiet));
}

template <class T>
void copy_out(const float* from, int64_t size, float scale, T* to) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store_any(to + i, load(from + i) * scale);
    T last[kLanes];
    if (i == size) return;
    store_any(last, load(from + i) * scale);  // `from` is padded
    std::copy_n(last, size - i, to + i);
}

template <class T>
const T* row_of(const TokenHeads& from, int64_t token, int64_t head) {
    return static_cast<const T*>(from.at) + token * from.token_stride + head * from.head_stride;
}

// A sequence and the beginning before it: positions [0, shared) are tokens from 0 on, those after it from `start` on.
struct Sequence {
    int64_t start, shared, own;
    int64_t first_task;  // forward: the first of its tasks of one key head

    int64_t positions() const { return shared + own; }
    int64_t token(int64_t position) const { return position < shared ? position : start + position - shared; }
};

// Some rows of a sequence: the queries of `group` heads from `head` on, token by token.
struct Rows {
    Sequence sequence;
    int64_t kv_head, head, group, begin, end;
    int64_t window;

    int64_t position(int64_t row) const { return sequence.shared + row / group; }
    int64_t token(int64_t row) const { return sequence.start + row / group; }
    int64_t head_of(int64_t row) const { return head + row % group; }
    // The positions that rows from `row` on see begin there; those that `row` sees end there.
    int64_t seen_from(int64_t row) const { return std::max<int64_t>(0, position(row) - window + 1); }
    int64_t seen_to(int64_t row) const { return position(row) + 1; }
};

// At most kPanel rows, and which of them see a key. Rows are counted from the panel's first.
struct Panel {
    const Rows& all;
    int64_t first, rows;
    int32_t ahead[kPanel];  // positions after that of the panel's first row

    Panel(const Rows& all, int64_t first) : all(all), first(first), rows(std::min(kPanel, all.end - first)) {
        int64_t left = all.group - first % all.group;
        for (int32_t r = 0, at = 0; r < kPanel; ++r) {
            ahead[r] = at;
            if (--left == 0) left = all.group, ++at;
        }
    }

    int64_t columns() const { return (rows + kLanes - 1) / kLanes * kLanes; }
    int64_t seen_from(int64_t row = 0) const { return all.seen_from(first + row); }
    int64_t seen_to(int64_t row) const { return all.seen_to(first + row); }
    int64_t seen_to() const { return seen_to(rows - 1); }
    // The rows that see key j lie within [first_that_sees(j), end_that_sees(j)).
    int64_t first_that_sees(int64_t j) const {
        return std::max<int64_t>(0, (j - all.sequence.shared) * all.group - first);
    }
    int64_t end_that_sees(int64_t j) const {
        return std::min(rows, (j + all.window - all.sequence.shared) * all.group - first);
    }
    bool all_see(int64_t j) const { return j < seen_to(0) && j >= seen_from(rows - 1); }
    Ints see(int64_t j, int64_t column) const {
        const int64_t from = j - all.position(first), to = from + all.window;
        Ints at;
        std::memcpy(&at, ahead + column, sizeof at);
        const auto narrow = [](int64_t x) { return static_cast<int32_t>(std::clamp<int64_t>(x, -1, kPanel + 1)); };
        return (at >= narrow(from)) & (at < narrow(to));
    }
};

// The part of a block of keys that a panel sees, counted from the block's first.
struct Seen {
    int64_t from, to;
    Seen(const Panel& panel, int64_t begin, int64_t end)
        : from(std::max(begin, panel.seen_from()) - begin), to(std::min(end, panel.seen_to()) - begin) {}
};

// products[j] = keys[j] . columns for the rows that see a key of its tile; keys are counted from position `begin`.
inline void multiply_keys(const Panel& panel, const Seen& seen, int64_t begin, const float* keys, int64_t dim,
                          int64_t padded, const float* columns, float* products) {
    for_each_tile(seen.to - seen.from, [&](int64_t a, int64_t b) {
        a += seen.from, b += seen.from;
        const int64_t first = panel.first_that_sees(begin + a) / kLanes * kLanes;
        const int64_t end = (panel.end_that_sees(begin + b - 1) + kLanes - 1) / kLanes * kLanes;
        multiply_rows({keys + a * padded, padded, 1, columns, kPanel, products + a * kPanel, kPanel, dim, false}, b - a,
                      first, end);
    });
}

// to[row] += sum over the keys that a tile's rows see of weight[key, row] * keys[key]
inline void add_to_rows(const Panel& panel, const Seen& seen, int64_t begin, const float* weight, const float* keys,
                        int64_t padded, float* to) {
    for_each_tile(panel.rows, [&](int64_t a, int64_t b) {
        const int64_t from = std::max(seen.from, panel.seen_from(a) - begin);
        const int64_t steps = std::min(seen.to, panel.seen_to(b - 1) - begin) - from;
        if (steps <= 0) return;
        multiply_rows(
            {weight + from * kPanel + a, 1, kPanel, keys + from * padded, padded, to + a * padded, padded, steps, true},
            b - a, 0, padded);
    });
}

// Keys and values of a block of positions, [positions, padded].
struct Block {
    float *key, *value;

    template <class T>
    void load(const PackedAttentionArgs& args, const Rows& rows, int64_t begin, int64_t end, int64_t padded) {
        for (int64_t j = begin; j < end; ++j) {
            const int64_t token = rows.sequence.token(j), to = (j - begin) * padded;
            copy_in(row_of<T>(args.key, token, rows.kv_head), args.dim, 1, key + to, padded);
            copy_in(row_of<T>(args.value, token, rows.kv_head), args.dim, 1, value + to, padded);
        }
    }
};

// Rows of a panel as they are, [kPanel, padded], those that it lacks being zeros.
template <class T>
void load_panel(const Panel& panel, const TokenHeads& from, int64_t dim, float scale, int64_t padded, float* to) {
    for (int64_t r = 0; r < panel.rows; ++r) {
        const int64_t row = panel.first + r;
        copy_in(row_of<T>(from, panel.all.token(row), panel.all.head_of(row)), dim, scale, to + r * padded, padded);
    }
    std::fill_n(to + panel.rows * padded, (kPanel - panel.rows) * padded, 0.0f);
}

// The sequences, the shared beginning being the first, and the tasks of each for one key head; ends with one of none.
template <class Tasks>
const Sequence* list_sequences(const PackedAttentionArgs& args, const Tasks& tasks_of) {
    static_assert(sizeof(Sequence) == kPackedSequenceBytes);
    Sequence* const list = static_cast<Sequence*>(args.workspace);
    Sequence next{0, 0, 0, 0};
    for (int64_t s = 0; s < args.sequences; ++s) {
        next.shared = s > 0 ? args.lengths[0] : 0;
        next.own = args.lengths[s];
        list[s] = next;
        next.first_task += tasks_of(next);
        next.start += next.own;
    }
    list[args.sequences] = next;
    return list;
}

// The sequence that a task, or a token, belongs to.
inline const Sequence& find(const Sequence* list, int64_t sequences, int64_t Sequence::* member, int64_t index) {
    const auto before = [member](int64_t i, const Sequence& s) { return i < s.*member; };
    return *(std::upper_bound(list, list + sequences, index, before) - 1);
}

inline Scratch after_sequences(const PackedAttentionArgs& args) {
    return {static_cast<float*>(args.workspace) + packed_sequences_floats(args.sequences)};
}

}  // namespace
}  // namespace pmc::PMC_ISA
