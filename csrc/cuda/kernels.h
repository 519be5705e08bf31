// The CUDA kernels' launches: addresses on the GPU, sizes, a device and its stream in. They return when the work is
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
    const void* logits;  // [rows, vocab], row_stride elements apart
    int64_t rows, vocab, row_stride;
    const float* bias;  // [vocab], added to the logits before `head`; null for none
    HeadTransform head;
    float temperature;  // 0 is greedy
    int64_t top_k;      // 0 is off
    double top_p;       // 1 is off
    float log_min_p;    // -inf is off
    uint64_t seed;
    const int64_t* sequence;  // [rows]
    const int64_t* position;  // [rows]
    int64_t* token;           // [rows]
    float* logprob;           // [rows]
    float* sampling_logprob;  // [rows]
    float* kept_mass;         // [rows]
    int32_t* bad;             // lowered to the first row that is no distribution
    int room;                 // vectors that a block keeps; the launch fills it in
};

struct CrossEntropyArgs {
    void* logits;  // [rows, vocab], row_stride elements apart; the gradient is written over them
    int64_t rows, vocab, row_stride;
    HeadTransform head;
    float temperature;
    const int64_t* row;     // [rows], what the caller calls these rows: where the following hold what belongs to them
    int64_t first_row;      // without `row` (null) they count from here
    const int64_t* target;  // each in [0, vocab)
    const float* weight;    // or null: gradient of sum(weight * nll) with respect to z; null writes none
    float* nll;
    int32_t* bad;  // lowered to the first row that is no distribution
    int room;      // vectors that a block keeps; the launch fills it in
};

struct AppendTokenArgs {
    const int64_t* token;  // [rows], what the running rows drew
    const float* logprob;  // [rows]
    const int64_t* slot;   // [rows], which answer a row writes
    int64_t rows;
    const int64_t* ends;  // [end_count], the tokens that end an answer
    int64_t end_count;
    const int64_t* limit;  // [answers], tokens at most
    int64_t* tokens;       // [answers, width]
    float* logprobs;       // [answers, width]
    int64_t width;         // at least every limit
    int64_t* length;       // [answers], tokens so far
    double* logprob_sum;   // [answers]
    uint8_t* finished;     // [answers], set where a token ended the answer
    int64_t* position;     // [rows], that of the next token
    uint8_t* done;         // [rows], out: whether this was the row's last token
};

// Sums of masses and numbers of tokens fit as far as this; see common/mass.h.
constexpr int64_t kMostVocab = (int64_t{1} << 24) - 1;

void sample(SampleArgs args, Dtype dtype, const Queue& queue);
void cross_entropy(CrossEntropyArgs args, Dtype dtype, const Queue& queue);
void append_token(const AppendTokenArgs& args, const Queue& queue);

}  // namespace pmc::cuda
