// Attention of one query token per row over the row's own keys and values, which are read once.
#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/row.h"

namespace pmc::PMC_ISA {
namespace {

// Heads that share keys and values are taken a few at a time, so that what they sum stays in registers.
constexpr int kHeadsAtOnce = 4;

template <class T>
void to_floats(const T* from, int64_t size, float scale, float* to) {
    for (int64_t i = 0; i < size; ++i) to[i] = widen(from[i]) * scale;
}

// scores[h * score_stride + t] = query[h] . key[t], h < Heads.
template <int Heads, class T>
void dot_products(const float* query, int64_t dim, const T* key, int64_t key_stride, int64_t positions, float* scores,
                  int64_t score_stride) {
    for (int64_t t = 0; t < positions; ++t, key += key_stride) {
        Floats sums[Heads] = {};
        int64_t i = 0;
        for (; i + kLanes <= dim; i += kLanes) {
            const Floats k = load(key + i);
            for (int h = 0; h < Heads; ++h) sums[h] += load(query + h * dim + i) * k;
        }
        for (int h = 0; h < Heads; ++h) {
            float sum = horizontal_sum_float(sums[h]);
            for (int64_t rest = i; rest < dim; ++rest) sum += query[h * dim + rest] * widen(key[rest]);
            scores[h * score_stride + t] = sum;
        }
    }
}

// The scores become probabilities; returns false if one of them is no number.
bool softmax(float* scores, int64_t positions, float softcap) {
    if (softcap > 0) {
        int64_t t = 0;
        for (; t + kLanes <= positions; t += kLanes) store(scores + t, softcap * tanh(load(scores + t) / softcap));
        for (; t < positions; ++t) scores[t] = softcap * std::tanh(scores[t] / softcap);
    }
    float top;
    if (!finite_max(scores, positions, &top)) return false;
    float sum = 0;
    Floats sums{};
    int64_t t = 0;
    for (; t + kLanes <= positions; t += kLanes) {
        const Floats e = exp_nonpositive(load(scores + t) - top);
        sums += e;
        store(scores + t, e);
    }
    for (; t < positions; ++t) sum += scores[t] = std::exp(scores[t] - top);
    const float inverse = 1 / (sum + horizontal_sum_float(sums));
    for (t = 0; t < positions; ++t) scores[t] *= inverse;
    return true;
}

// out[h * dim + i] = sum over t of probability[h * stride + t] * value[t][i], h < Heads.
template <int Heads, class T>
void weighted_sum(const float* probability, int64_t stride, const T* value, int64_t value_stride, int64_t positions,
                  int64_t dim, T* out) {
    int64_t i = 0;
    for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
        Floats low[Heads] = {}, high[Heads] = {};
        const T* v = value + i;
        for (int64_t t = 0; t < positions; ++t, v += value_stride) {
            const Floats a = load(v), b = load(v + kLanes);
            for (int h = 0; h < Heads; ++h) {
                low[h] += probability[h * stride + t] * a;
                high[h] += probability[h * stride + t] * b;
            }
        }
        for (int h = 0; h < Heads; ++h) {
            store(out + h * dim + i, low[h]);
            store(out + h * dim + i + kLanes, high[h]);
        }
    }
    for (; i < dim; ++i) {
        for (int h = 0; h < Heads; ++h) {
            float sum = 0;
            for (int64_t t = 0; t < positions; ++t)
                sum += probability[h * stride + t] * widen(value[t * value_stride + i]);
            from_float(out + h * dim + i, sum);
        }
    }
}

template <int Heads, class T>
bool attend(const DecodeAttentionArgs& args, const T* query, const T* key, const T* value, int64_t positions, T* out,
            float* scratch) {
    float* const q = scratch + Heads * args.length;
    to_floats(query, Heads * args.dim, args.scale, q);
    dot_products<Heads>(q, args.dim, key, args.key_stride.position, positions, scratch, args.length);
    for (int h = 0; h < Heads; ++h)
        if (!softmax(scratch + h * args.length, positions, args.softcap)) return false;
    weighted_sum<Heads>(scratch, args.length, value, args.value_stride.position, positions, args.dim, out);
    return true;
}

template <class T>
bool decode_attention_heads(const DecodeAttentionArgs& args, int64_t row, int64_t kv_head, float* scratch) {
    const int64_t group = args.heads / args.kv_heads, first = args.first[row], positions = args.length - first;
    const auto at = [&](const void* base, const CacheStrides& stride) {
        return static_cast<const T*>(base) + row * stride.row + kv_head * stride.head + first * stride.position;
    };
    const T *key = at(args.key, args.key_stride), *value = at(args.value, args.value_stride);
    const int64_t begin = (row * args.heads + kv_head * group) * args.dim;
    const T* query = static_cast<const T*>(args.query) + begin;
    T* out = static_cast<T*>(args.out) + begin;
    bool finite = true;
    for (int64_t done = 0; done < group && finite;) {
        const int64_t left = group - done;
        const T* q = query + done * args.dim;
        T* o = out + done * args.dim;
        if (left >= kHeadsAtOnce) {
            finite = attend<kHeadsAtOnce>(args, q, key, value, positions, o, scratch);
            done += kHeadsAtOnce;
        } else if (left == 3) {
            finite = attend<3>(args, q, key, value, positions, o, scratch);
            done += 3;
        } else if (left == 2) {
            finite = attend<2>(args, q, key, value, positions, o, scratch);
            done += 2;
        } else {
            finite = attend<1>(args, q, key, value, positions, o, scratch);
            done += 1;
        }
    }
    return finite;
}

}  // namespace

int64_t decode_attention(const DecodeAttentionArgs& args) {
    int64_t bad_row = kAllRowsFinite;
    const int64_t slice = decode_attention_workspace_floats(args.length, args.dim);
    parallel_for(args.rows * args.kv_heads, args.threads, [&](int64_t task, int thread) {
        const int64_t row = task / args.kv_heads, kv_head = task % args.kv_heads;
        float* const scratch = static_cast<float*>(args.workspace) + thread * slice;
        const bool ok = args.dtype == Dtype::kFloat32 ? decode_attention_heads<float>(args, row, kv_head, scratch)
                                                      : decode_attention_heads<uint16_t>(args, row, kv_head, scratch);
        if (!ok) {
#pragma omp critical
            if (bad_row == kAllRowsFinite || row < bad_row) bad_row = row;
        }
    });
    return bad_row;
}

}  // namespace pmc::PMC_ISA
