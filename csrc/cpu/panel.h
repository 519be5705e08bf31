// A panel of queries against a block of keys, as attention takes them where many queries see the same keys.
//
// Scores are held [keys, queries]: lanes run over queries, so that softmax needs no sum across lanes.
#pragma once

#include "cpu/kernels.h"
#include "cpu/row.h"
#include "cpu/tile_product.h"
#include "cpu/transpose.h"

namespace pmc::PMC_ISA {
namespace {

constexpr int64_t kPanel = kPackedAttentionPanel, kKeys = kPackedAttentionKeys;

// Hands out a workspace.
struct Scratch {
    float* at;

    static Scratch from_a_line(float* at) {
        return {reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(at) + 63) / 64 * 64)};
    }
    float* take(int64_t floats) {
        float* const taken = at;
        at += floats;
        return taken;
    }
};

// A panel of rows [kPanel, size] as columns [size, kPanel].
inline void transpose_panel(const float* from, int64_t size, float* to) {
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

// to[i] = from[i] * scale, and zeros up to padded.
template <class T>
void copy_in(const T* from, int64_t size, float scale, float* to, int64_t padded) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(to + i, load(from + i) * scale);
    for (; i < size; ++i) to[i] = widen(from[i]) * scale;
    for (; i < padded; ++i) to[i] = 0;
}

// Of keys [from, to) of the block that begins at position `begin`. Scores become exp(score - top), unseen ones 0; top,
// mass and what is already summed move on to the new maximum.
template <class Panel>
void softmax(const Panel& panel, int64_t from, int64_t to, int64_t begin, float softcap, float* scores, float* top,
             float* mass, float* faded) {
    for (int64_t c = 0; c < panel.columns(); c += kLanes) {
        const Floats before = load(top + c);
        Floats most = before;
        for (int64_t j = from; j < to; ++j) {
            float* const at = scores + j * kPanel + c;
            Floats s = load(at);
            if (softcap > 0) store(at, s = softcap * tanh(s / softcap));
            if (!panel.all_see(begin + j)) s = panel.see(begin + j, c) ? s : broadcast(-kInfinity);
            most = max(s, most);
        }
        const Floats shift = most == -kInfinity ? Floats{} : most, fade = exp_nonpositive(before - shift);
        Floats sum = load(mass + c) * fade;
        for (int64_t j = from; j < to; ++j) {
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

}  // namespace
}  // namespace pmc::PMC_ISA
