// Causal attention over sequences end to end, which may share their beginning.
#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "cpu/packed_rows.h"

namespace pmc::PMC_ISA {
namespace {

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
            softmax(panel, seen.from, seen.to, begin, args.softcap, scores, top + r, mass + r, faded);
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

}  // namespace pmc::PMC_ISA
