// The gradients of packed_attention.
#include <algorithm>

#include "common/parallel.h"
#include "cpu/packed_rows.h"

namespace pmc::PMC_ISA {
namespace {

constexpr int64_t kTokensReduced = 16;

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

// The gradients of a token's key and value: sums of what some tasks have of them, in the tasks' order.
template <class T>
void write_sums(const PackedAttentionBackwardArgs& all, const float* key, const float* value, int64_t tasks,
                int64_t stride, int64_t token, int64_t kv_head, float* sum) {
    const PackedAttentionArgs& args = all.forward;
    const int64_t padded = packed_attention_padded(args.dim), at = (token * args.kv_heads + kv_head) * args.dim;
    const auto write = [&](const float* from, void* to) {
        std::fill_n(sum, padded, 0.0f);
        for (int64_t task = 0; task < tasks; ++task)
            for (int64_t i = 0; i < padded; i += kLanes) store(sum + i, load(sum + i) + load(from + task * stride + i));
        copy_out(sum, args.dim, 1, static_cast<T*>(to) + at);
    };
    write(key, all.d_key);
    write(value, all.d_value);
}

template <class T>
void run(const PackedAttentionBackwardArgs& all) {
    const PackedAttentionArgs& args = all.forward;
    const int64_t kv_heads = args.kv_heads, group = args.heads / kv_heads, padded = packed_attention_padded(args.dim);
    const PackedAttentionTasks& tasks = all.tasks;
    const Sequence* const list = list_sequences(args, [](const Sequence&) { return 0; });
    Scratch scratch = after_sequences(args);
    float* const of_threads = scratch.take(args.threads * packed_attention_backward_thread_floats(args.dim));
    float* const sums = scratch.at;  // [lanes, parts, kv_heads, 2, positions, padded]
    const int64_t of_values = tasks.positions * padded, size = 2 * of_values;
    const auto of_thread = [&](int thread) {
        return Scratch{of_threads + thread * packed_attention_backward_thread_floats(args.dim)};
    };
    parallel_for(tasks.lanes * tasks.parts * kv_heads, args.threads, [&](int64_t task, int thread) {
        const int64_t kv_head = task % kv_heads, lane = task / kv_heads / tasks.parts;
        const int64_t head = task / kv_heads % tasks.parts * tasks.heads, heads = std::min(tasks.heads, group - head);
        float *const d_key = sums + task * size, *const d_value = d_key + of_values;
        const auto clear = [&](int64_t begin, int64_t end) {
            for (float* to : {d_key, d_value}) std::fill_n(to + begin * padded, (end - begin) * padded, 0.0f);
        };
        clear(0, list->own);
        for (int64_t n = tasks.first + lane; n < args.sequences; n += tasks.lanes) {
            const Sequence& s = list[n];
            if (n > 0) clear(s.shared, s.positions());
            Rows rows{s, kv_head, kv_head * group + head, heads, 0, 0, args.window};
            for (; rows.begin < s.own * heads; rows.begin = rows.end) {
                rows.end = std::min(rows.begin + kRows, s.own * heads);
                backward<T>(all, rows, d_key, d_value, of_thread(thread));
            }
            for (int64_t t = 0; n > 0 && tasks.parts == 1 && t < s.own; ++t) {
                const int64_t at = (s.shared + t) * padded;
                write_sums<T>(all, d_key + at, d_value + at, 1, 0, s.start + t, kv_head, of_thread(thread).at);
            }
        }
    });
    // What is left: the shared beginning's, sums over all lanes and parts; with several parts, the others', over these.
    const int64_t tokens = tasks.parts == 1 ? list->own : list[args.sequences].start;
    const int64_t chunks = (tokens + kTokensReduced - 1) / kTokensReduced;
    parallel_for(chunks * kv_heads, args.threads, [&](int64_t task, int thread) {
        const int64_t kv_head = task % kv_heads, begin = task / kv_heads * kTokensReduced;
        for (int64_t t = begin; t < std::min(tokens, begin + kTokensReduced); ++t) {
            const Sequence& s = find(list, args.sequences, &Sequence::start, t);
            const int64_t lane = &s - list - tasks.first, lanes = &s == list ? tasks.lanes : 1;
            const float* const key =
                sums + (lane * tasks.parts * kv_heads + kv_head) * size + (s.shared + t - s.start) * padded;
            write_sums<T>(all, key, key + of_values, lanes * tasks.parts, kv_heads * size, t, kv_head,
                          of_thread(thread).at);
        }
    });
}

}  // namespace

void packed_attention_backward(const PackedAttentionBackwardArgs& all) {
    all.forward.dtype == Dtype::kFloat32 ? run<float>(all) : run<uint16_t>(all);
}

}  // namespace pmc::PMC_ISA
