// The layers of a decoder, run for one token per row by the kernels in use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/prefix_sharers.h"

namespace pmc {

struct NormWeights {
    const float *weight, *bias;  // [size]; bias may be null
    int64_t size;
    float epsilon;
    bool centered;
};

// x W^T + bias, and (x down^T) up^T for each adapter, whose weights are packed.
struct LinearWeights {
    struct Adapter {
        const float *down, *up;  // float32
        int64_t rank;
    };
    const void* weight;
    Dtype dtype;
    int64_t row_stride;  // or kPacked
    bool rounded;        // as in PackedLinearArgs
    const float* bias;   // may be null
    int64_t out_features, in_features;
    std::vector<Adapter> adapters;
};

// h += output_norm(output(attention(x))) with x = norm(h), then h += down_norm(down(activation(gate(y)) * up(y))) with
// y = mlp_norm(h). In a parallel layer y is made of the h that x is made of, and is x where there is no mlp_norm.
// Another norm that is not there changes nothing; without a gate it is activation(up(y)).
struct DecoderLayer {
    std::optional<NormWeights> norm;
    LinearWeights query;  // without key and value, of each head the query, then its key, then its value
    std::optional<LinearWeights> key, value;
    float clip;                                       // what these make is kept within it, either way; may be infinite
    std::optional<NormWeights> query_norm, key_norm;  // as wide as a head or as all of them; not without key and value
    LinearWeights output;
    std::optional<NormWeights> output_norm;
    bool parallel;
    std::optional<NormWeights> mlp_norm;
    std::optional<LinearWeights> gate;
    LinearWeights up;
    Activation activation;
    LinearWeights down;
    std::optional<NormWeights> down_norm;
    int64_t rotary;  // which of the angles of a step
    int64_t window;  // positions that a token sees, its own included; 0: all
    float scale, softcap;

    int64_t heads(int64_t dim) const { return query.out_features / (key ? dim : 3 * dim); }
    int64_t kv_heads(int64_t dim) const { return key ? key->out_features / dim : heads(dim); }
};

struct DecoderStep {
    float* hidden;  // [rows, size], the embedded tokens, which become the last hidden states
    int64_t rows;
    const float* cosine;  // [kinds of angles, rows, rotated]
    const float* sine;    // [kinds of angles, rows, rotated]
    int64_t rotated;
    Dtype dtype;                               // of all keys and values
    std::vector<CachedPositions> own, prefix;  // of each layer; the last of `own`'s positions are written
    const int64_t* prefix_row;                 // [rows]
    const int64_t* first;                      // [rows], the first position that a row sees but for the window
    int threads;
};

class Decoder {
  public:
    Decoder(std::vector<DecoderLayer> layers, const NormWeights& final_norm, int64_t head_dim);

    // Returns the first row whose attention scores are not finite, in the first layer that has one, or kAllRowsFinite.
    int64_t step(const DecoderStep& step);

  private:
    struct Rows;  // as many rows of floats as a step has

    void normalize(const NormWeights& norm, const Rows& x, const Rows& y, bool accumulate) const;
    void normalize(const std::optional<NormWeights>& norm, const Rows& x, const Rows& y) const;
    void multiply(const LinearWeights& linear, const Rows& x, const Rows& y, bool accumulate);
    void add(const LinearWeights& linear, const std::optional<NormWeights>& norm, const Rows& x, const Rows& to);
    int64_t attend(const DecoderStep& step, size_t layer);

    Rows rows_of(std::vector<float>& buffer, int64_t size, int64_t padding) const;

    std::vector<DecoderLayer> layers_;
    NormWeights final_norm_;
    int64_t head_dim_, rows_ = 0;
    int threads_ = 1;
    std::vector<float> normed_, mlp_normed_, query_, key_, value_, attended_, gate_, up_, added_, low_rank_, workspace_;
    // In the cache's dtype: queries, and what comes of them where that is not float32.
    std::vector<std::byte> turned_, narrow_;
    std::vector<int64_t> first_;
    PrefixSharers sharers_;
};

}  // namespace pmc
