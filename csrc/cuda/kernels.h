// The CUDA kernel's launch: addresses on the GPU, sizes, a device and its stream in. It returns when the work is
// queued; errors of CUDA are thrown with the kernel's name.
#pragma once

#include <cstdint>

#include "common/rows.h"

namespace pmc::cuda {

struct Queue {
    int device;
    void* stream;
};

struct SampleArgs {
    const void* logits;         // [.., vocab], row_stride elements apart
    const int64_t* logits_row;  // [rows], the row of logits that each draw is from; null: its own
    int64_t rows, vocab, row_stride;
    const float* bias;  // [vocab], added to the logits before `head`; null for none
    HeadTransform head;
    float temperature;  // 0 is greedy
    int64_t top_k;      // 0 is off
    double top_p;       // 1 is off
    float log_min_p;    // -inf is off
    uint64_t seed;
    const uint64_t* seed_at;  // where the seed lies when the kernel runs; null: it is `seed`
    const int64_t* sequence;  // [rows]
    const int64_t* position;  // [rows]
    int64_t* token;           // [rows]
    float* logprob;           // [rows]
    float* sampling_logprob;  // [rows]
    float* kept_mass;         // [rows]
    int32_t* bad;             // lowered to the first row that is no distribution
    int room;                 // vectors that a block keeps; the launch fills it in
};

// Sums of masses and numbers of tokens fit as far as this; see cuda/mass.h.
constexpr int64_t kMostVocab = (int64_t{1} << 24) - 1;

void sample(SampleArgs args, Dtype dtype, const Queue& queue);

}  // namespace pmc::cuda
