#include "cpu/decoder.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/host_device.h"
#include "cpu/isa.h"

namespace pmc {

namespace {

// Between the rows that products read: rows a multiple of 4 KiB apart would compete for the same lines of the cache.
constexpr int64_t kPadding = 16;

void grow(std::vector<float>& buffer, int64_t floats) {
    if (buffer.size() < static_cast<size_t>(floats)) buffer.resize(static_cast<size_t>(floats));
}

}  // namespace

struct Decoder::Rows {
    float* at;
    int64_t size, stride;
};

Decoder::Decoder(std::vector<DecoderLayer> layers, const NormWeights& final_norm, int64_t head_dim)
    : layers_(std::move(layers)), final_norm_(final_norm), head_dim_(head_dim) {}

Decoder::Rows Decoder::rows_of(std::vector<float>& buffer, int64_t size, int64_t padding) const {
    grow(buffer, rows_ * (size + padding));
    return {buffer.data(), size, size + padding};
}

void Decoder::normalize(const NormWeights& norm, const Rows& x, const Rows& y, bool accumulate) const {
    kernels().normalize({x.at, rows_, x.size, x.stride, norm.weight, norm.bias, norm.epsilon, norm.centered, y.at,
                         y.stride, accumulate, threads_});
}

// y = norm(x), or x where there is none.
void Decoder::normalize(const std::optional<NormWeights>& norm, const Rows& x, const Rows& y) const {
    if (norm) return normalize(*norm, x, y, false);
    for (int64_t r = 0; r < rows_; ++r) std::copy_n(x.at + r * x.stride, x.size, y.at + r * y.stride);
}

void Decoder::multiply(const LinearWeights& linear, const Rows& x, const Rows& y, bool accumulate) {
    kernels().packed_linear({x.at, rows_, x.stride, linear.weight, linear.dtype, linear.row_stride, linear.bias,
                             linear.out_features, linear.in_features, y.at, y.stride, accumulate, linear.rounded,
                             threads_});
    for (const LinearWeights::Adapter& adapter : linear.adapters) {
        const Rows low = rows_of(low_rank_, adapter.rank, kPadding);
        kernels().packed_linear({x.at, rows_, x.stride, adapter.down, Dtype::kFloat32, kPacked, nullptr, adapter.rank,
                                 linear.in_features, low.at, low.stride, false, false, threads_});
        kernels().packed_linear({low.at, rows_, low.stride, adapter.up, Dtype::kFloat32, kPacked, nullptr,
                                 linear.out_features, adapter.rank, y.at, y.stride, true, false, threads_});
    }
}

// to += norm(linear(x)).
void Decoder::add(const LinearWeights& linear, const std::optional<NormWeights>& norm, const Rows& x, const Rows& to) {
    if (!norm) return multiply(linear, x, to, true);
    const Rows y = rows_of(added_, to.size, 0);
    multiply(linear, x, y, false);
    normalize(*norm, y, to, true);
}

// query_, key_ and value_, already multiplied, to attended_.
int64_t Decoder::attend(const DecoderStep& step, size_t index) {
    const DecoderLayer& layer = layers_[index];
    const int64_t heads = layer.heads(head_dim_), kv_heads = layer.kv_heads(head_dim_);
    const auto clip = [&](std::vector<float>& states, int64_t size) {
        std::for_each_n(states.begin(), rows_ * size, [&](float& x) { x = std::clamp(x, -layer.clip, layer.clip); });
    };
    if (std::isfinite(layer.clip)) {
        clip(query_, layer.query.out_features);
        if (layer.key) clip(key_, layer.key->out_features);
        if (layer.value) clip(value_, layer.value->out_features);
    }
    const auto normalize_heads = [&](const std::optional<NormWeights>& norm, std::vector<float>& states, int64_t of) {
        if (norm)
            kernels().normalize({states.data(), rows_ * of * head_dim_ / norm->size, norm->size, norm->size,
                                 norm->weight, norm->bias, norm->epsilon, norm->centered, states.data(), norm->size,
                                 false, threads_});
    };
    normalize_heads(layer.query_norm, query_, heads);
    normalize_heads(layer.key_norm, key_, kv_heads);

    const bool wide = step.dtype == Dtype::kFloat32;
    const int64_t width = heads * head_dim_, bytes = wide ? 4 : 2;
    const CachedPositions &own = step.own[index], &prefix = step.prefix[index];
    // The heads of one product, or every third of a product of all.
    const int64_t apart = layer.key ? head_dim_ : 3 * head_dim_;
    const float* const query_states = query_.data();
    const float* const key_states = layer.key ? key_.data() : query_states + head_dim_;
    const float* const value_states = layer.value ? value_.data() : query_states + 2 * head_dim_;
    // To [rows, of, head_dim], whose rows and heads are so far apart.
    const auto rotate = [&](const float* states, int64_t of, int64_t rotated, void* to, int64_t row_stride,
                            int64_t head_stride) {
        const int64_t angles = layer.rotary * rows_ * step.rotated;
        kernels().rotate({states, rows_, of, head_dim_, of * apart, apart, step.cosine + angles, step.sine + angles,
                          rotated, to, row_stride, head_stride, step.dtype, threads_});
    };
    const auto last = [&](const void* base, const CacheStrides& stride) {
        return static_cast<std::byte*>(const_cast<void*>(base)) + (own.length - 1) * stride.position * bytes;
    };
    rotate(key_states, kv_heads, step.rotated, last(own.key, own.key_stride), own.key_stride.row, own.key_stride.head);
    rotate(value_states, kv_heads, 0, last(own.value, own.value_stride), own.value_stride.row, own.value_stride.head);
    turned_.resize(static_cast<size_t>(rows_ * width * bytes));
    rotate(query_states, heads, step.rotated, turned_.data(), width, head_dim_);

    const int64_t seen = prefix.length + own.length;
    for (int64_t r = 0; r < rows_; ++r)
        first_[static_cast<size_t>(r)] = layer.window ? std::max(step.first[r], seen - layer.window) : step.first[r];
    const int64_t slice = decode_attention_workspace_floats(seen, head_dim_);
    grow(workspace_, threads_ * slice);
    if (!wide) narrow_.resize(turned_.size());
    void* const out = wide ? static_cast<void*>(attended_.data()) : narrow_.data();
    const int64_t bad = kernels().decode_attention({turned_.data(), step.dtype, rows_, heads, kv_heads, head_dim_, own,
                                                    prefix, step.prefix_row, first_.data(), nullptr, layer.scale,
                                                    layer.softcap, out, workspace_.data(), threads_, sharers_.found()});
    if (!wide)
        std::transform(static_cast<uint16_t*>(out), static_cast<uint16_t*>(out) + rows_ * width, attended_.begin(),
                       [](uint16_t x) { return widen(x); });
    return bad;
}

int64_t Decoder::step(const DecoderStep& step) {
    rows_ = step.rows, threads_ = step.threads;
    first_.resize(static_cast<size_t>(rows_));
    sharers_.find(step.prefix_row, step.first, rows_, step.prefix.front().length, layers_.front().heads(head_dim_),
                  layers_.front().kv_heads(head_dim_), threads_);
    const int64_t size = layers_.front().query.in_features;
    const Rows hidden{step.hidden, size, size};
    int64_t bad_row = kAllRowsFinite;
    for (size_t index = 0; index < layers_.size(); ++index) {
        const DecoderLayer& layer = layers_[index];
        const Rows x = rows_of(normed_, size, kPadding);
        const Rows attended = rows_of(attended_, layer.heads(head_dim_) * head_dim_, 0);
        const Rows up = rows_of(up_, layer.up.out_features, kPadding);
        const bool parallel_norm = layer.parallel && layer.mlp_norm;
        const Rows y = parallel_norm ? rows_of(mlp_normed_, size, kPadding) : x;
        normalize(layer.norm, hidden, x);
        if (parallel_norm) normalize(layer.mlp_norm, hidden, y);
        multiply(layer.query, x, rows_of(query_, layer.query.out_features, 0), false);
        if (layer.key) multiply(*layer.key, x, rows_of(key_, layer.key->out_features, 0), false);
        if (layer.value) multiply(*layer.value, x, rows_of(value_, layer.value->out_features, 0), false);
        if (const int64_t bad = attend(step, index); bad_row == kAllRowsFinite) bad_row = bad;
        add(layer.output, layer.output_norm, attended, hidden);
        if (!layer.parallel) normalize(layer.mlp_norm, hidden, y);
        multiply(layer.up, y, up, false);
        if (layer.gate) {
            const Rows gate = rows_of(gate_, layer.gate->out_features, kPadding);
            multiply(*layer.gate, y, gate, false);
            kernels().activate({gate.at, up.at, rows_, gate.size, gate.stride, up.stride, layer.activation, gate.at,
                                gate.stride, threads_});
            add(layer.down, layer.down_norm, gate, hidden);
        } else {
            kernels().activate(
                {up.at, nullptr, rows_, up.size, up.stride, 0, layer.activation, up.at, up.stride, threads_});
            add(layer.down, layer.down_norm, up, hidden);
        }
    }
    normalize(final_norm_, hidden, hidden, false);
    return bad_row;
}

}  // namespace pmc
