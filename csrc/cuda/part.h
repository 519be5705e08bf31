// What is known of a row from the tokens that one thread has seen: maximum, masses, and who leads the Gumbel race.
#pragma once

#include "cuda/kernels.h"
#include "cuda/mass.h"
#include "cuda/noise.h"

namespace pmc::cuda {

// Masses are relative to the maximum. The leader's score, logit / temperature + noise, lies in [least, most].
struct alignas(16) Part {
    float top = -INFINITY;
    float mass = 0, tempered_mass = 0;
    float logit = -INFINITY;  // the leader's
    float least = -INFINITY, most = -INFINITY;
    int32_t token = 0;
    uint32_t word = 0;
};

// Four neighbouring logits.
struct alignas(16) Four {
    float of[4];

    __device__ float at(int i) const { return i < 2 ? i == 0 ? of[0] : of[1] : i == 2 ? of[2] : of[3]; }
};

// Adds tokens, in ascending order, to a part.
class PartOfRow {
  public:
    // `inverse` is 1 / temperature, whatever where that is 0.
    __device__ PartOfRow(const Part& part, const Draw& draw, float temperature, float inverse)
        : part_(part), draw_(draw), temperature_(temperature), inverse_(inverse) {}

    __device__ const Part& part() const { return part_; }

    // Tokens from a multiple of 4 on; those that must not be drawn, or are none, are -inf.
    __device__ void add(const Four& y, int32_t token) {
        const float highest = fmaxf(fmaxf(y.of[0], y.of[1]), fmaxf(y.of[2], y.of[3]));
        const float sum = y.of[0] + y.of[1] + y.of[2] + y.of[3];
        if (sum != sum) part_.top = INFINITY;  // NaN, or infinities of both signs: no distribution
        if (highest > part_.top) raise(highest, y, token);
        const float base = fmaxf(part_.top, -FLT_MAX);  // unlike -inf, it can be subtracted from -inf
        Four share;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            share.of[i] = __expf(y.of[i] - base);
            part_.mass += share.of[i];
        }
        if (greedy()) return;
        if (temperature_ != 1) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                share.of[i] = __expf((y.of[i] - base) * inverse_);
                part_.tempered_mass += share.of[i];
            }
        }
        race(y, share, base, token);
    }

  private:
    __device__ bool greedy() const { return temperature_ == 0; }
    __device__ float scaled(float y) const { return temperature_ == 1 ? y : y / temperature_; }

    __device__ void raise(float highest, const Four& y, int32_t token) {
        const float drop = fmaxf(part_.top, -FLT_MAX) - highest;
        part_.mass *= __expf(drop);
        part_.tempered_mass *= __expf(drop * inverse_);
        part_.top = highest;
        if (!greedy()) return;
        part_.logit = part_.least = part_.most = highest;
        part_.token = token + (y.of[0] == highest ? 0 : y.of[1] == highest ? 1 : y.of[2] == highest ? 2 : 3);
    }

    // Noise is at most -log(u), so a token can lead only if u <= exp(its scaled logit - the leader's score). Its share
    // is one factor of that; the other has room for what rounding adds, the largest part of it from scaled logits.
    __device__ void race(const Four& y, const Four& share, float base, int32_t token) {
        const float shift = scaled(base);
        const float limit = 0x1p32f * __expf(shift - part_.least + (1e-3f + 0x1p-21f * fabsf(shift)));
        uint32_t w0, w1, w2, w3;
        noise_words({each_time(draw_.seed), draw_.sequence, draw_.position}, token / 4, &w0, &w1, &w2, &w3);
        unsigned can = 0;  // a bit for each
        const uint32_t words[4] = {w0, w1, w2, w3};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bool behind = static_cast<float>(words[i]) > share.of[i] * limit;  // not if that is no number
            if (y.of[i] > -INFINITY && !behind) can |= 1u << i;
        }
#pragma unroll 1
        while (can) {
            const int i = can & 1 ? 0 : can & 2 ? 1 : can & 4 ? 2 : 3;
            can &= can - 1;
            compete(y.at(i), token + i, i < 2 ? i == 0 ? w0 : w1 : i == 2 ? w2 : w3);
        }
    }

    __device__ void compete(float y, int32_t token, uint32_t word) {
        const float x = scaled(y), noise = about_gumbel(word);
        float least = x + (noise - kNoiseError), most = x + (noise + kNoiseError);
        if (most <= part_.least) return;  // a tie is the lower token's
        if (!(least > part_.most)) {
            const float leaders = scaled(part_.logit) + gumbel_from_word(part_.word);
            least = most = x + gumbel_from_word(word);
            if (least <= leaders) {
                part_.least = part_.most = leaders;
                return;
            }
        }
        part_.least = least;
        part_.most = most;
        part_.logit = y;
        part_.token = token;
        part_.word = word;
    }

    Part part_;
    Draw draw_;
    float temperature_, inverse_;
};

}  // namespace pmc::cuda
