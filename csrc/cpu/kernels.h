// The SIMD kernels of the CPU, one table per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/rows.h"

namespace pmc {

// A kernel that returns a row returns the first that it cannot use (NaN, +inf, nothing but -inf, or a largest logit
// that overflows when divided by the temperature), or kAllRowsFinite.
constexpr int64_t kAllRowsFinite = -1;

struct SampleArgs {
    const void* logits;  // [rows, vocab], row_stride elements apart
    Dtype dtype;
    int64_t rows, vocab, row_stride;
    HeadTransform head;
    float temperature;  // 0 is greedy
    int64_t top_k;      // 0 is off
    double top_p;       // 1 is off
    float log_min_p;    // -inf is off
    uint64_t seed;
    // Row r makes draws order[begin[r]] ... order[begin[r + 1] - 1]; where these two are null, draw r alone.
    const int64_t *begin, *order;  // [rows + 1], [draws]
    const int64_t* sequence;       // [draws]
    const int64_t* position;       // [draws]
    int64_t* token;                // [draws]
    float* logprob;                // [draws]
    float* sampling_logprob;       // [draws]
    float* kept_mass;              // [draws]
    void* workspace;               // threads * sample_workspace_bytes(vocab)
    int threads;
    int64_t first_token = 0;  // a multiple of 4: what precedes the row's tokens in the vocabulary that noise belongs to
};

struct CrossEntropyArgs {
    void* logits;  // [rows, vocab], row_stride elements apart; the gradient is written over them
    Dtype dtype;
    int64_t rows, vocab, row_stride;
    HeadTransform head;
    const int64_t* target;  // [rows], each in [0, vocab)
    const float* weight;    // [rows] or null: gradient of sum(weight * nll) with respect to z; null writes none
    float* nll;             // [rows]
    void* workspace;        // threads * head_workspace_bytes(vocab)
    int threads;
};

// Products of rows with some tokens of the head.
struct LogitSlice {
    void* logits;  // [rows, tokens], row_stride elements apart
    Dtype dtype;
    int64_t rows, tokens, row_stride, first_token;
    HeadTransform head;
    float temperature;
    const int64_t* target;  // [rows], counted from the head's first token
    void* workspace;        // threads * head_workspace_bytes(tokens)
    int threads;
};

// What the slices so far make of a row, in units of logits / temperature. Before the first: -inf, 0, anything.
struct RowScore {
    double top;           // the largest; in the end not finite if the row cannot be used
    double mass;          // sum of exp(logit - top)
    double target_logit;  // once its slice was there
};

struct ScoreSliceArgs {
    LogitSlice slice;
    RowScore* score;  // [rows]
};

// Also, over each logit but the target's, which becomes 0: exp(logit - top) times the soft cap's derivative. `sums` are
// of such terms of the slices before, and change with top.
struct ScoreSliceTermsArgs {
    LogitSlice slice;
    RowScore* score;  // [rows]
    float* sums;      // [rows, size]
    int64_t size;
};

// The gradient of sum(weight * nll) with respect to the products is written over them.
struct SliceGradientArgs {
    LogitSlice slice;
    const float* normalizer;  // [rows, 2]: top and mass of the whole row
    const float* weight;      // [rows]
};

struct GumbelArgs {
    int64_t rows, vocab;
    uint64_t seed;
    const int64_t* sequence;  // [rows]
    const int64_t* position;  // [rows]
    float* noise;             // [rows, vocab]
    int threads;
};

// In elements; the dimensions of a head are next to one another.
struct CacheStrides {
    int64_t row, head, position;
};

// Keys and values of `length` positions: [rows, kv_heads, length, dim].
struct CachedPositions {
    const void *key, *value;
    CacheStrides key_stride, value_stride;
    int64_t length;
};

// Rows order[begin[i]] ... order[begin[i + 1] - 1], at most kSharingRows, share a prefix and what they see of it.
struct Sharers {
    const int64_t *begin, *order;  // [sets + 1], [rows]
    int64_t sets;                  // of every row; or 0: rows are taken one by one
};

struct DecodeAttentionArgs {
    const void* query;                   // [rows, heads, dim]
    Dtype dtype;                         // of query, out and all keys and values
    int64_t rows, heads, kv_heads, dim;  // kv_heads divides heads
    CachedPositions own;                 // those of each row, which come after
    CachedPositions prefix;              // those that rows share: row r has prefix row prefix_row[r]
    const int64_t* prefix_row;           // [rows], or null if prefix.length is 0
    const int64_t* first;   // [rows], each in [0, prefix.length + length): the positions before it are left out
    const int64_t* length;  // [rows], each in [1, own.length], how many of its own a row has; null: own.length
    float scale;            // scores = scale * query . key, then
    float softcap;          // softcap * tanh(scores / softcap); 0 leaves them
    void* out;              // [rows, heads, dim]
    void* workspace;        // threads * decode_attention_workspace_floats(prefix.length + own.length, dim) floats
    int threads;
    Sharers sharers = {};
};

// [tokens, heads, dim], strides in elements; the dimensions of a head are next to one another.
struct TokenHeads {
    const void* at;
    int64_t token_stride, head_stride;
};

struct PackedAttentionArgs {
    TokenHeads query, key, value;
    Dtype dtype;                   // of these and out
    int64_t heads, kv_heads, dim;  // kv_heads divides heads
    const int64_t* lengths;        // [sequences]: tokens of the shared beginning, then of each sequence beyond it
    int64_t sequences;             // at least 1, the shared beginning
    int64_t window;                // positions that a token sees at most, at least 1
    float scale;                   // scores = scale * query . key, then
    float softcap;                 // softcap * tanh(scores / softcap); 0 leaves them
    void* out;                     // [tokens, heads, dim]
    float* log_mass;               // [tokens, heads], log(sum(exp(scores)))
    void* workspace;               // packed_attention_workspace_floats(), or those of the backward pass, at 64 bytes
    int threads;
};

// The tasks of the backward pass: for each head of keys, of each of some parts of the heads that share it, the
// sequences first + lane, first + lane + lanes, ... in turn. With more than one part a lane has one sequence.
struct PackedAttentionTasks {
    int64_t first;  // 1 if the shared beginning is empty, else 0
    int64_t lanes, parts;
    int64_t heads;      // of a part; the last one may have fewer
    int64_t positions;  // of the longest sequence, the shared beginning included
};

// The gradients of sum(upstream * out), `out` and `log_mass` being what the forward pass wrote.
struct PackedAttentionBackwardArgs {
    PackedAttentionArgs forward;
    TokenHeads upstream;
    void* d_query;          // [tokens, heads, dim]
    void *d_key, *d_value;  // [tokens, kv_heads, dim]
    PackedAttentionTasks tasks;
};

// A weight in the layout that packed_linear reads: packed_weight_elements() of its own dtype.
struct PackWeightArgs {
    const void* weight;  // [out_features, in_features], row_stride elements apart
    Dtype dtype;
    int64_t out_features, in_features, row_stride;
    void* packed;
    bool rounded;  // for products with inputs rounded to bfloat16, the dtype of the weight
    int threads;
};

constexpr int64_t kPacked = 0;  // in place of the stride of a weight's rows

struct PackedLinearArgs {
    const float* x;  // [rows, in_features], x_stride elements apart
    int64_t rows, x_stride;
    const void* weight;  // packed, or [out_features, in_features] as it is
    Dtype dtype;
    int64_t row_stride;  // in elements, or kPacked
    const float* bias;   // [out_features] or null
    int64_t out_features, in_features;
    float* y;  // [rows, out_features], y_stride elements apart
    int64_t y_stride;
    bool accumulate;  // the product is added to what y holds
    bool rounded;     // x is rounded to bfloat16, the dtype of the weight, which was packed for that
    int threads;
};

// y (+)= (x - mean) / sqrt(variance + epsilon) * weight + bias for each row; the mean is 0 unless `centered`.
struct NormalizeArgs {
    const float* x;  // [rows, size], x_stride elements apart
    int64_t rows, size, x_stride;
    const float* weight;  // [size]
    const float* bias;    // [size] or null
    float epsilon;
    bool centered;
    float* y;  // [rows, size], y_stride elements apart; may be x
    int64_t y_stride;
    bool accumulate;  // the result is added to what y holds
    int threads;
    float* stats = nullptr;  // [rows, 2] or null: the mean that is subtracted, and 1 / sqrt(variance + epsilon)
};

struct NormalizeGradientArgs {
    const float* grad;  // [rows, size], of y, grad_stride elements apart
    const float* x;     // [rows, size], x_stride elements apart
    int64_t rows, size, grad_stride, x_stride;
    const float* stats;   // [rows, 2], which normalize wrote
    const float* weight;  // [size]
    bool centered;
    float* grad_x;  // [rows, size], grad_x_stride elements apart
    int64_t grad_x_stride;
    bool accumulate;     // the gradient is added to what grad_x holds
    float* grad_weight;  // [size] or null
    float* grad_bias;    // [size] or null
    float* workspace;    // normalize_gradient_workspace_floats(rows, size) for each of the two that is not null
    int threads;
};

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

// y = activation(x) * up.
struct ActivateArgs {
    const float* x;   // [rows, size], x_stride elements apart
    const float* up;  // [rows, size], up_stride elements apart; or null, which is 1
    int64_t rows, size, x_stride, up_stride;
    Activation activation;
    float* y;  // [rows, size], y_stride elements apart; may be x
    int64_t y_stride;
    int threads;
};

struct ActivateGradientArgs {
    const float* grad;  // [rows, size], of y, grad_stride elements apart
    const float* gate;  // [rows, size], gate_stride elements apart: ActivateArgs' x
    const float* up;    // [rows, size], up_stride elements apart; or null
    int64_t rows, size, grad_stride, gate_stride, up_stride;
    Activation activation;
    float* grad_gate;  // [rows, size]
    float* grad_up;    // [rows, size]; null if up is
    int threads;
};

// Rotary position embedding: element i is paired with element i + rotated / 2 of its head.
struct RotateArgs {
    const float* x;  // [rows, heads, dim] with these strides
    int64_t rows, heads, dim, x_row_stride, x_head_stride;
    const float* cosine;  // [rows, rotated]
    const float* sine;    // [rows, rotated]
    int64_t rotated;      // even, at most dim: the elements after them are only copied; 0 copies all
    void* y;              // [rows, heads, dim] with these strides; not x
    int64_t y_row_stride, y_head_stride;
    Dtype dtype;  // of y
    int threads;
    bool transposed = false;  // the gradient of this map: by the transposes of the pairs' matrices; y is float32
};

struct Kernels {
    const char* name;
    int64_t (*sample)(const SampleArgs&);
    int64_t (*cross_entropy)(const CrossEntropyArgs&);
    void (*score_slice)(const ScoreSliceArgs&);
    void (*score_slice_terms)(const ScoreSliceTermsArgs&);
    void (*slice_gradient)(const SliceGradientArgs&);
    void (*gumbel)(const GumbelArgs&);
    int64_t (*decode_attention)(const DecodeAttentionArgs&);
    void (*packed_attention)(const PackedAttentionArgs&);
    void (*packed_attention_backward)(const PackedAttentionBackwardArgs&);
    int64_t (*packed_weight_elements)(int64_t out_features, int64_t in_features, bool rounded);
    void (*pack_weight)(const PackWeightArgs&);
    void (*packed_linear)(const PackedLinearArgs&);
    bool (*has_dot_product)();  // whether this CPU multiplies pairs in bfloat16 by one instruction
    void (*normalize)(const NormalizeArgs&);
    void (*normalize_gradient)(const NormalizeGradientArgs&);
    void (*activate)(const ActivateArgs&);
    void (*activate_gradient)(const ActivateGradientArgs&);
    void (*rotate)(const RotateArgs&);
};

constexpr int64_t kWorkspaceSlack = 64;  // elements past the end that a vector may touch

inline int64_t sample_workspace_bytes(int64_t vocab) { return (vocab + kWorkspaceSlack) * 16; }
inline int64_t head_workspace_bytes(int64_t tokens) { return (tokens + kWorkspaceSlack) * 4; }

// Sums over rows are taken over so many of them and then over those sums: the same for any number of threads.
constexpr int64_t kNormalizeGradientRows = 32;
inline int64_t normalize_gradient_chunks(int64_t rows) {
    return (rows + kNormalizeGradientRows - 1) / kNormalizeGradientRows;
}
inline int64_t normalize_gradient_workspace_floats(int64_t rows, int64_t size) {
    return normalize_gradient_chunks(rows) * size;
}

// packed_attention takes at most so many rows (queries of a token and head) and keys at a time, and of these a panel of
// rows.
constexpr int64_t kPackedAttentionPanel = 32, kPackedAttentionRows = 256, kPackedAttentionKeys = 128;
constexpr int64_t kPackedSequenceBytes = 4 * sizeof(int64_t);
// The backward pass has at most so many tasks, or one for each head of keys if these are more: each has its own sums.
constexpr int64_t kPackedAttentionTasks = 64;
// Beyond so many positions it divides the heads that share keys while there are fewer, so that threads have work.
constexpr int64_t kPackedAttentionTogether = 512;

inline int64_t packed_attention_padded(int64_t dim) { return (dim + 15) / 16 * 16; }  // to whole vectors

// decode_attention takes heads that share keys a few at a time, of one row or of all that share a prefix.
constexpr int64_t kHeadsAtOnce = 4, kSharingRows = 32, kSharedQueries = kHeadsAtOnce * kSharingRows;
// Whether a prefix of so many positions is read once for so many queries, as measured: from 64 on with AVX-512 it takes
// as long for 8 queries as each row by itself, and more for fewer.
inline bool worth_sharing(int64_t queries, int64_t positions) { return queries >= 8 && positions >= 64; }

// Of one row: a score for each position, and the query. Of rows that share a prefix: what attend_together takes.
inline int64_t decode_attention_workspace_floats(int64_t length, int64_t dim) {
    const int64_t row = kHeadsAtOnce * (length + dim) + kWorkspaceSlack;
    const int64_t blocks = kPackedAttentionPanel + 2 * kSharedQueries + 2 * kPackedAttentionKeys;
    return row + blocks * packed_attention_padded(dim) + kPackedAttentionKeys * kPackedAttentionPanel +
           2 * kSharedQueries + kPackedAttentionPanel + kWorkspaceSlack;  // to begin with a line
}

// Of the sequences and one more; keeps what follows at a multiple of 64 bytes.
inline int64_t packed_sequences_floats(int64_t sequences) {
    return ((sequences + 1) * kPackedSequenceBytes + 63) / 64 * 16;
}

inline int64_t packed_attention_thread_floats(int64_t dim) {
    const int64_t padded = packed_attention_padded(dim);
    return (kPackedAttentionPanel + 2 * kPackedAttentionRows + 2 * kPackedAttentionKeys) * padded +
           2 * kPackedAttentionRows + kPackedAttentionPanel + kPackedAttentionKeys * kPackedAttentionPanel;
}

inline int64_t packed_attention_backward_thread_floats(int64_t dim) {
    return (5 * kPackedAttentionRows + 2 * kPackedAttentionKeys) * packed_attention_padded(dim) +
           2 * kPackedAttentionRows + 2 * kPackedAttentionKeys * kPackedAttentionPanel;
}

inline int64_t packed_attention_workspace_floats(int64_t sequences, int64_t dim, int threads) {
    return packed_sequences_floats(sequences) + threads * packed_attention_thread_floats(dim);
}

inline PackedAttentionTasks packed_attention_tasks(const int64_t* lengths, int64_t sequences, int64_t heads,
                                                   int64_t kv_heads) {
    const int64_t longest = sequences > 1 ? *std::max_element(lengths + 1, lengths + sequences) : 0;
    const int64_t positions = lengths[0] + longest, group = heads / kv_heads;
    const int64_t most = std::max<int64_t>(1, kPackedAttentionTasks / kv_heads);
    const int64_t first = lengths[0] > 0 ? 0 : 1, count = sequences - first;
    const bool together = positions <= kPackedAttentionTogether;
    const int64_t wanted = together ? 1 : std::clamp<int64_t>(most / count, 1, group);
    const int64_t each = (group + wanted - 1) / wanted, parts = (group + each - 1) / each;
    return {first, std::min(count, most / parts), parts, each, positions};
}

// Each task has gradients of the keys and values of the shared beginning, and of one sequence beyond it at a time.
inline int64_t packed_attention_backward_workspace_floats(const PackedAttentionTasks& tasks, int64_t sequences,
                                                          int64_t kv_heads, int64_t dim, int threads) {
    return packed_sequences_floats(sequences) + threads * packed_attention_backward_thread_floats(dim) +
           2 * tasks.lanes * tasks.parts * kv_heads * tasks.positions * packed_attention_padded(dim);
}

}  // namespace pmc
