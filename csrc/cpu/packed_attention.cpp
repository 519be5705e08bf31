// Causal attention over sequences end to end, which may share their beginning, and its gradients.
//
// The queries of the heads that share keys are rows, token by token. Scores are held for a panel of rows and a block of
// keys at a time, [keys, rows]: lanes run over rows, so that softmax needs no sum across lanes.
#include <algorithm>
#include <cmath>
#include <utility>

#include "common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/row.h"

namespace pmc::PMC_ISA {
namespace {

constexpr int64_t kPanel = kPackedAttentionPanel, kRows = kPackedAttentionRows, kKeys = kPackedAttentionKeys;
// A tile of rows x 2 vectors of sums, one broadcast value and two vectors fill the registers.
constexpr int kTileRows = kLanes == 16 ? 12 : 6;
constexpr int64_t kTokensReduced = 16;

// c[m, n] (+)= sum over k < steps of a[m * a_row + k * a_step] * b[k * b_row + n]
struct Product {
    const float* a;
    int64_t a_row, a_step;
    const float* b;
    int64_t b_row;
    float* c;
    int64_t c_row;
    int64_t steps;
    bool accumulate;
};

template <int Rows, int Vectors>
inline void multiply_tile(const Product& p) {
    Floats sums[Rows][Vectors];
#pragma GCC unroll 12
    for (int m = 0; m < Rows; ++m)
        for (int v = 0; v < Vectors; ++v) sums[m][v] = p.accumulate ? load(p.c + m * p.c_row + v * kLanes) : Floats{};
    const float *a = p.a, *b = p.b;
    for (int64_t k = 0; k < p.steps; ++k, a += p.a_step, b += p.b_row) {
        Floats values[Vectors];
        for (int v = 0; v < Vectors; ++v) values[v] = load(b + v * kLanes);
#pragma GCC unroll 12
        for (int m = 0; m < Rows; ++m) {
            const Floats x = broadcast(a[m * p.a_row]);
            for (int v = 0; v < Vectors; ++v) sums[m][v] += x * values[v];
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < Rows; ++m)
        for (int v = 0; v < Vectors; ++v) store(p.c + m * p.c_row + v * kLanes, sums[m][v]);
}

template <int Rows, int Vectors>
inline void multiply_tile(const Product& p, int64_t rows) {
    if (rows == Rows) return multiply_tile<Rows, Vectors>(p);
    if constexpr (Rows > 1) multiply_tile<Rows - 1, Vectors>(p, rows);
}

// Columns [begin, end) of at most kTileRows rows; both are multiples of kLanes.
void multiply_rows(Product p, int64_t rows, int64_t begin, int64_t end) {
    p.b += begin, p.c += begin;
    for (; begin + 2 * kLanes <= end; begin += 2 * kLanes, p.b += 2 * kLanes, p.c += 2 * kLanes)
        multiply_tile<kTileRows, 2>(p, rows);
    if (begin < end) multiply_tile<kTileRows, 1>(p, rows);
}

// Calls body(begin, end) for tiles of rows that are about equally large.
template <class Body>
void for_each_tile(int64_t rows, const Body& body) {
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t i = 0; i < tiles; ++i) body(rows * i / tiles, rows * (i + 1) / tiles);
}

template <int Width, int... Lane>
inline void exchange(Floats& a, Floats& b, std::integer_sequence<int, Lane...>) {
#ifdef __clang__
    const Floats low = __builtin_shufflevector(a, b, (Lane & Width ? kLanes + Lane - Width : Lane)...);
    b = __builtin_shufflevector(a, b, (Lane & Width ? kLanes + Lane : Lane + Width)...);
#else
    const Floats low = __builtin_shuffle(a, b, Ints{(Lane & Width ? kLanes + Lane - Width : Lane)...});
    b = __builtin_shuffle(a, b, Ints{(Lane & Width ? kLanes + Lane : Lane + Width)...});
#endif
    a = low;
}

// v[i][j] and v[j][i] change places.
template <int Width = kLanes / 2>
inline void transpose(Floats (&v)[kLanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
        if (!(i & Width)) exchange<Width>(v[i], v[i + Width], std::make_integer_sequence<int, kLanes>{});
    if constexpr (Width > 1) transpose<Width / 2>(v);
}

// A panel of rows [kPanel, size] as columns [size, kPanel].
void transpose_panel(const float* from, int64_t size, float* to) {
    for (int64_t r = 0; r < kPanel; r += kLanes)
        for (int64_t i = 0; i < size; i += kLanes) {
            Floats v[kLanes];
#pragma GCC unroll 16
            for (int lane = 0; lane < kLanes; ++lane) v[lane] = load(from + (r + lane) * size + i);
            transpose(v);
#pragma GCC unroll 16
            for (int lane = 0; lane < kLanes; ++lane) store(to + (i + lane) * kPanel + r, v[lane]);
        }
}

// Also of NaN with any payload, which rounding could carry over.
inline void store_any(float* to, Floats v) { store(to, v); }
inline void store_any(uint16_t* to, Floats v) {
    const Ints quiet = Ints{} + 0x7FC00000;
    store(to, v == v ? v : reinterpret_cast<Floats>(quiet));
}

// to[i] = from[i] * scale, and zeros up to padded.
template <class T>
void copy_in(const T* from, int64_t size, float scale, float* to, int64_t padded) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(to + i, load(from + i) * scale);
    for (; i < size; ++i) to[i] = widen(from[i]) * scale;
    for (; i < padded; ++i) to[i] = 0;
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
    int64_t first_task;  // its tasks of one key head
    int64_t slot;        // of its gradients of keys and values, backward

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
void multiply_keys(const Panel& panel, const Seen& seen, int64_t begin, const float* keys, int64_t dim, int64_t padded,
                   const float* columns, float* products) {
    for_each_tile(seen.to - seen.from, [&](int64_t a, int64_t b) {
        a += seen.from, b += seen.from;
        const int64_t first = panel.first_that_sees(begin + a) / kLanes * kLanes;
        const int64_t end = (panel.end_that_sees(begin + b - 1) + kLanes - 1) / kLanes * kLanes;
        multiply_rows({keys + a * padded, padded, 1, columns, kPanel, products + a * kPanel, kPanel, dim, false}, b - a,
                      first, end);
    });
}

// to[row] += sum over the keys that a tile's rows see of weight[key, row] * keys[key]
void add_to_rows(const Panel& panel, const Seen& seen, int64_t begin, const float* weight, const float* keys,
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

// to[key] += sum over the rows that see a key of its tile of weight[key, row] * rows[row]
void add_to_keys(const Panel& panel, const Seen& seen, int64_t begin, const float* weight, const float* rows,
                 int64_t padded, float* to) {
    for_each_tile(seen.to - seen.from, [&](int64_t a, int64_t b) {
        a += seen.from, b += seen.from;
        const int64_t from = panel.first_that_sees(begin + a), steps = panel.end_that_sees(begin + b - 1) - from;
        if (steps <= 0) return;
        multiply_rows(
            {weight + a * kPanel + from, kPanel, 1, rows + from * padded, padded, to + a * padded, padded, steps, true},
            b - a, 0, padded);
    });
}

// Scores become exp(score - top), unseen ones 0; top, mass and what is already summed move on to the new maximum.
void softmax(const Panel& panel, const Seen& seen, int64_t begin, float softcap, float* scores, float* top, float* mass,
             float* faded) {
    for (int64_t c = 0; c < panel.columns(); c += kLanes) {
        const Floats before = load(top + c);
        Floats most = before;
        for (int64_t j = seen.from; j < seen.to; ++j) {
            float* const at = scores + j * kPanel + c;
            Floats s = load(at);
            if (softcap > 0) store(at, s = softcap * tanh(s / softcap));
            if (!panel.all_see(begin + j)) s = panel.see(begin + j, c) ? s : broadcast(-kInfinity);
            most = max(s, most);
        }
        const Floats shift = most == -kInfinity ? Floats{} : most, fade = exp_nonpositive(before - shift);
        Floats sum = load(mass + c) * fade;
        for (int64_t j = seen.from; j < seen.to; ++j) {
            float* const at = scores + j * kPanel + c;
            const Floats x = load(at) - shift, e = exp_nonpositive(x);
            Floats weight = x == x ? e : x;
            if (!panel.all_see(begin + j)) weight = panel.see(begin + j, c) ? weight : Floats{};
            sum += weight;
            store(at, weight);
        }
        store(top + c, most);
        store(mass + c, sum);
        store(faded + c, fade);
    }
}

// Scores become probabilities, and products with upstream gradients become gradients of the scores.
void softmax_gradient(const Panel& panel, const Seen& seen, int64_t begin, float softcap, const float* log_mass,
                      const float* along, float* scores, float* gradient) {
    const float inverse_cap = softcap > 0 ? 1 / softcap : 0;
    for (int64_t c = 0; c < panel.columns(); c += kLanes) {
        const Floats shift = load(log_mass + c), mean = load(along + c);
        for (int64_t j = seen.from; j < seen.to; ++j) {
            float *const at = scores + j * kPanel + c, *const to = gradient + j * kPanel + c;
            Floats s = load(at), slope = broadcast(1);
            if (softcap > 0) {
                const Floats t = tanh(s * inverse_cap);
                s = softcap * t;
                slope = 1 - t * t;
            }
            const Floats x = s - shift, e = exp_nonpositive(x);
            Floats p = x == x ? e : x, d = p * (load(to) - mean) * slope;
            if (!panel.all_see(begin + j)) {
                const Ints sees = panel.see(begin + j, c);
                p = sees ? p : Floats{};
                d = sees ? d : Floats{};
            }
            store(at, p);
            store(to, d);
        }
    }
}

// Hands out a workspace.
struct Scratch {
    float* at;
    float* take(int64_t floats) {
        float* const taken = at;
        at += floats;
        return taken;
    }
};

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

template <class T>
void forward(const PackedAttentionArgs& args, const Rows& rows, Scratch scratch) {
    const int64_t padded = packed_attention_padded(args.dim), size = kPanel * padded;
    float* const natural = scratch.take(size);
    float* const columns = scratch.take(kRows * padded);
    float* const out = scratch.take(kRows * padded);
    float* const top = scratch.take(kRows);
    float* const mass = scratch.take(kRows);
    float* const faded = scratch.take(kPanel);
    float* const scores = scratch.take(kKeys * kPanel);
    Block block{scratch.take(kKeys * padded), scratch.take(kKeys * padded)};
    const int64_t count = rows.end - rows.begin;
    std::fill_n(out, count * padded, 0.0f);
    std::fill_n(top, kRows, -kInfinity);
    std::fill_n(mass, kRows, 0.0f);
    for (int64_t r = 0; r < count; r += kPanel) {
        load_panel<T>(Panel(rows, rows.begin + r), args.query, args.dim, args.scale, padded, natural);
        transpose_panel(natural, padded, columns + r * padded);
    }
    const int64_t last = rows.seen_to(rows.end - 1);
    for (int64_t begin = rows.seen_from(rows.begin), end; begin < last; begin = end) {
        end = std::min(last, begin + kKeys);
        block.load<T>(args, rows, begin, end, padded);
        for (int64_t r = 0; r < count; r += kPanel) {
            const Panel panel(rows, rows.begin + r);
            const Seen seen(panel, begin, end);
            if (seen.from >= seen.to) continue;
            multiply_keys(panel, seen, begin, block.key, args.dim, padded, columns + r * padded, scores);
            softmax(panel, seen, begin, args.softcap, scores, top + r, mass + r, faded);
            float* const to = out + r * padded;
            for (int64_t i = 0; begin > rows.seen_from(rows.begin) && i < panel.rows; ++i)
                copy_in(to + i * padded, padded, faded[i], to + i * padded, padded);
            add_to_rows(panel, seen, begin, scores, block.value, padded, to);
        }
    }
    for (int64_t r = 0; r < count; ++r) {
        const int64_t at = rows.token(rows.begin + r) * args.heads + rows.head_of(rows.begin + r);
        copy_out(out + r * padded, args.dim, 1 / mass[r], static_cast<T*>(args.out) + at * args.dim);
        args.log_mass[at] = top[r] + std::log(mass[r]);
    }
}

// Also of `rows` in keys and values, [positions, padded] each.
template <class T>
void backward(const PackedAttentionBackwardArgs& all, const Rows& rows, float* d_key, float* d_value, Scratch scratch) {
    const PackedAttentionArgs& args = all.forward;
    const int64_t padded = packed_attention_padded(args.dim);
    float* const query = scratch.take(kRows * padded);
    float* const query_columns = scratch.take(kRows * padded);
    float* const upstream = scratch.take(kRows * padded);
    float* const upstream_columns = scratch.take(kRows * padded);
    float* const d_query = scratch.take(kRows * padded);
    float* const log_mass = scratch.take(kRows);
    float* const along = scratch.take(kRows);  // the gradient's part along the output
    float* const scores = scratch.take(kKeys * kPanel);
    float* const gradient = scratch.take(kKeys * kPanel);
    Block block{scratch.take(kKeys * padded), scratch.take(kKeys * padded)};
    const int64_t count = rows.end - rows.begin;
    std::fill_n(d_query, count * padded, 0.0f);
    std::fill_n(log_mass, kRows, 0.0f);
    std::fill_n(along, kRows, 0.0f);
    for (int64_t r = 0; r < count; r += kPanel) {
        const Panel panel(rows, rows.begin + r);
        const int64_t at = r * padded;
        load_panel<T>(panel, args.query, args.dim, args.scale, padded, query + at);
        load_panel<T>(panel, all.upstream, args.dim, 1, padded, upstream + at);
        transpose_panel(query + at, padded, query_columns + at);
        transpose_panel(upstream + at, padded, upstream_columns + at);
    }
    for (int64_t r = 0; r < count; ++r) {
        const int64_t at = rows.token(rows.begin + r) * args.heads + rows.head_of(rows.begin + r);
        const T* const out = static_cast<const T*>(args.out) + at * args.dim;
        const float* const row = upstream + r * padded;
        Floats sums{};
        int64_t i = 0;
        for (; i + kLanes <= args.dim; i += kLanes) sums += load(row + i) * load(out + i);
        along[r] = horizontal_sum_float(sums);
        for (; i < args.dim; ++i) along[r] += row[i] * widen(out[i]);
        log_mass[r] = args.log_mass[at];
    }
    const int64_t last = rows.seen_to(rows.end - 1);
    for (int64_t begin = rows.seen_from(rows.begin), end; begin < last; begin = end) {
        end = std::min(last, begin + kKeys);
        block.load<T>(args, rows, begin, end, padded);
        for (int64_t r = 0; r < count; r += kPanel) {
            const Panel panel(rows, rows.begin + r);
            const Seen seen(panel, begin, end);
            if (seen.from >= seen.to) continue;
            const int64_t at = r * padded;
            multiply_keys(panel, seen, begin, block.key, args.dim, padded, query_columns + at, scores);
            multiply_keys(panel, seen, begin, block.value, args.dim, padded, upstream_columns + at, gradient);
            softmax_gradient(panel, seen, begin, args.softcap, log_mass + r, along + r, scores, gradient);
            add_to_keys(panel, seen, begin, scores, upstream + at, padded, d_value + begin * padded);
            add_to_keys(panel, seen, begin, gradient, query + at, padded, d_key + begin * padded);
            add_to_rows(panel, seen, begin, gradient, block.key, padded, d_query + at);
        }
    }
    for (int64_t r = 0; r < count; ++r) {
        const int64_t at = rows.token(rows.begin + r) * args.heads + rows.head_of(rows.begin + r);
        copy_out(d_query + r * padded, args.dim, args.scale, static_cast<T*>(all.d_query) + at * args.dim);
    }
}

// The sequences, the shared beginning being the first, and the tasks of each for one key head; ends with one of none.
template <class Tasks>
const Sequence* list_sequences(const PackedAttentionArgs& args, const Tasks& tasks_of) {
    static_assert(sizeof(Sequence) == kPackedSequenceBytes);
    Sequence* const list = static_cast<Sequence*>(args.workspace);
    Sequence next{0, 0, 0, 0, 0};
    for (int64_t s = 0; s < args.sequences; ++s) {
        next.shared = s > 0 ? args.lengths[0] : 0;
        next.own = args.lengths[s];
        list[s] = next;
        const int64_t tasks = tasks_of(next);
        next.start += next.own;
        next.first_task += tasks;
        next.slot += tasks * args.kv_heads * next.positions();
    }
    list[args.sequences] = next;
    return list;
}

// The sequence that a task, or a token, belongs to.
const Sequence& find(const Sequence* list, int64_t sequences, int64_t Sequence::* member, int64_t index) {
    const auto before = [member](int64_t i, const Sequence& s) { return i < s.*member; };
    return *(std::upper_bound(list, list + sequences, index, before) - 1);
}

Scratch after_sequences(const PackedAttentionArgs& args) {
    return {static_cast<float*>(args.workspace) + packed_sequences_floats(args.sequences)};
}

// The gradients of keys and values of some tokens: sums over the tasks that saw them, in their order.
template <class T>
void reduce(const PackedAttentionBackwardArgs& all, const Sequence* list, const float* slots, int64_t begin,
            int64_t end, int64_t kv_head, float* sums) {
    const PackedAttentionArgs& args = all.forward;
    const int64_t padded = packed_attention_padded(args.dim);
    for (int64_t t = begin; t < end; ++t) {
        std::fill_n(sums, 2 * padded, 0.0f);
        const Sequence* s = &find(list, args.sequences, &Sequence::start, t);
        const int64_t position = t - s->start + s->shared;
        for (const bool shared = s == list; s < list + args.sequences; ++s) {
            for (int64_t task = 0; s->own > 0 && task < s[1].first_task - s->first_task; ++task) {
                const float* const slot =
                    slots + 2 * padded * (s->slot + (task * args.kv_heads + kv_head) * s->positions());
                const float* const parts[2] = {slot, slot + s->positions() * padded};
                for (int which = 0; which < 2; ++which)
                    for (int64_t i = 0; i < padded; i += kLanes) {
                        float* const to = sums + which * padded + i;
                        store(to, load(to) + load(parts[which] + position * padded + i));
                    }
            }
            if (!shared) break;
        }
        const int64_t at = (t * args.kv_heads + kv_head) * args.dim;
        copy_out(sums, args.dim, 1, static_cast<T*>(all.d_key) + at);
        copy_out(sums + padded, args.dim, 1, static_cast<T*>(all.d_value) + at);
    }
}

}  // namespace

void packed_attention(const PackedAttentionArgs& args) {
    const int64_t group = args.heads / args.kv_heads;
    const Sequence* const list =
        list_sequences(args, [&](const Sequence& s) { return (s.own * group + kRows - 1) / kRows; });
    parallel_for(list[args.sequences].first_task * args.kv_heads, args.threads, [&](int64_t task, int thread) {
        const int64_t kv_head = task % args.kv_heads;
        const Sequence& s = find(list, args.sequences, &Sequence::first_task, task / args.kv_heads);
        const int64_t begin = (task / args.kv_heads - s.first_task) * kRows;
        const Rows rows{s, kv_head, kv_head * group, group, begin, std::min(begin + kRows, s.own * group), args.window};
        Scratch scratch = after_sequences(args);
        scratch.take(thread * packed_attention_thread_floats(args.dim));
        args.dtype == Dtype::kFloat32 ? forward<float>(args, rows, scratch) : forward<uint16_t>(args, rows, scratch);
    });
}

void packed_attention_backward(const PackedAttentionBackwardArgs& all) {
    const PackedAttentionArgs& args = all.forward;
    const int64_t group = args.heads / args.kv_heads, padded = packed_attention_padded(args.dim);
    const Sequence* const list =
        list_sequences(args, [&](const Sequence& s) { return packed_attention_backward_parts(s.positions(), group); });
    Scratch scratch = after_sequences(args);
    float* const of_threads = scratch.take(args.threads * packed_attention_backward_thread_floats(args.dim));
    float* const slots = scratch.at;
    const auto of_thread = [&](int thread) {
        return Scratch{of_threads + thread * packed_attention_backward_thread_floats(args.dim)};
    };
    parallel_for(list[args.sequences].first_task * args.kv_heads, args.threads, [&](int64_t task, int thread) {
        const int64_t kv_head = task % args.kv_heads;
        const Sequence& s = find(list, args.sequences, &Sequence::first_task, task / args.kv_heads);
        const int64_t part = task / args.kv_heads - s.first_task;
        const int64_t heads = group / packed_attention_backward_parts(s.positions(), group);
        float* const d_key = slots + 2 * padded * (s.slot + (part * args.kv_heads + kv_head) * s.positions());
        float* const d_value = d_key + padded * s.positions();
        std::fill_n(d_key, 2 * padded * s.positions(), 0.0f);
        Rows rows{s, kv_head, kv_head * group + part * heads, heads, 0, 0, args.window};
        for (; rows.begin < s.own * heads; rows.begin = rows.end) {
            rows.end = std::min(rows.begin + kRows, s.own * heads);
            if (args.dtype == Dtype::kFloat32)
                backward<float>(all, rows, d_key, d_value, of_thread(thread));
            else
                backward<uint16_t>(all, rows, d_key, d_value, of_thread(thread));
        }
    });
    const int64_t tokens = list[args.sequences].start, chunks = (tokens + kTokensReduced - 1) / kTokensReduced;
    parallel_for(chunks * args.kv_heads, args.threads, [&](int64_t task, int thread) {
        const int64_t begin = task / args.kv_heads * kTokensReduced, end = std::min(tokens, begin + kTokensReduced);
        const auto run = args.dtype == Dtype::kFloat32 ? reduce<float> : reduce<uint16_t>;
        run(all, list, slots, begin, end, task % args.kv_heads, of_thread(thread).at);
    });
}

}  // namespace pmc::PMC_ISA
