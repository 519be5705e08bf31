// Gradients of the norms and gated activations between a decoder layer's products.
#include "cpu/elementwise.h"

namespace pmc::PMC_ISA {
namespace {

// Columns of the sums over rows that one thread adds up.
constexpr int64_t kColumnsAtOnce = 1024;

// With n = (x - mean) * factor and g = grad * weight: grad_x = factor * (g - mean(g) - n * mean(g * n)), without
// mean(g) unless centered. grad * n and grad are added to the sums that are wanted.
void normalize_gradient_row(const NormalizeGradientArgs& args, int64_t row, float* weight_sum, float* bias_sum) {
    const float *grad = args.grad + row * args.grad_stride, *x = args.x + row * args.x_stride;
    const float mean = args.stats[2 * row], factor = args.stats[2 * row + 1];
    Floats sums{}, products{};  // of g and of g * n
    for_lanes(args.size, [&](int64_t i, auto count) {
        const Floats d = load(grad + i, count), n = (load(x + i, count) - mean) * factor;
        const Floats g = d * load(args.weight + i, count), scaled = d * n;
        sums += g;
        products += g * n;
        if (weight_sum) store(weight_sum + i, load(weight_sum + i, count) + scaled, count);
        if (bias_sum) store(bias_sum + i, load(bias_sum + i, count) + d, count);
    });
    const float size = static_cast<float>(args.size);
    const float level = args.centered ? horizontal_sum_float(sums) / size : 0;
    const float slope = horizontal_sum_float(products) / size;
    float* to = args.grad_x + row * args.grad_x_stride;
    for_lanes(args.size, [&](int64_t i, auto count) {
        const Floats n = (load(x + i, count) - mean) * factor;
        const Floats g = load(grad + i, count) * load(args.weight + i, count);
        const Floats result = factor * (g - level - n * slope);
        store(to + i, args.accumulate ? load(to + i, count) + result : result, count);
    });
}

// to = the sum of `count` rows, in their order.
void add_up(const float* rows, int64_t count, int64_t size, float* to, int threads) {
    parallel_for((size + kColumnsAtOnce - 1) / kColumnsAtOnce, threads, [&](int64_t part, int) {
        const int64_t begin = part * kColumnsAtOnce, columns = std::min(kColumnsAtOnce, size - begin);
        std::fill_n(to + begin, columns, 0.0f);
        for (int64_t row = 0; row < count; ++row) {
            const float* from = rows + row * size + begin;
            for (int64_t i = 0; i < columns; ++i) to[begin + i] += from[i];
        }
    });
}

template <Activation Kind>
void activate_gradient_row(const ActivateGradientArgs& args, int64_t row) {
    const float *grad = args.grad + row * args.grad_stride, *gate = args.gate + row * args.gate_stride;
    const float* up = args.up ? args.up + row * args.up_stride : nullptr;
    float *grad_gate = args.grad_gate + row * args.size, *grad_up = args.grad_up + row * args.size;
    for_lanes(args.size, [&](int64_t i, auto count) {
        const Floats d = load(grad + i, count);
        const auto [y, slope] = activated<Kind>(load(gate + i, count));
        const Floats of_gate = d * slope;
        store(grad_gate + i, up ? of_gate * load(up + i, count) : of_gate, count);
        if (up) store(grad_up + i, d * y, count);
    });
}

}  // namespace

void normalize_gradient(const NormalizeGradientArgs& args) {
    const int64_t chunks = normalize_gradient_chunks(args.rows), size = args.size;
    float* const weight_sums = args.grad_weight ? args.workspace : nullptr;  // [chunks, size], as bias_sums
    float* const bias_sums = args.grad_bias ? args.workspace + (weight_sums ? chunks * size : 0) : nullptr;
    parallel_for(chunks, args.threads, [&](int64_t chunk, int) {
        float* const weight_sum = weight_sums ? weight_sums + chunk * size : nullptr;
        float* const bias_sum = bias_sums ? bias_sums + chunk * size : nullptr;
        if (weight_sum) std::fill_n(weight_sum, size, 0.0f);
        if (bias_sum) std::fill_n(bias_sum, size, 0.0f);
        const int64_t end = std::min(args.rows, (chunk + 1) * kNormalizeGradientRows);
        for (int64_t row = chunk * kNormalizeGradientRows; row < end; ++row)
            normalize_gradient_row(args, row, weight_sum, bias_sum);
    });
    if (args.grad_weight) add_up(weight_sums, chunks, size, args.grad_weight, args.threads);
    if (args.grad_bias) add_up(bias_sums, chunks, size, args.grad_bias, args.threads);
}

void activate_gradient(const ActivateGradientArgs& args) {
    for_activation(args.activation, [&](auto kind) {
        for_rows(args.rows, args.threads,
                 [&](int64_t row) { activate_gradient_row<decltype(kind)::value>(args, row); });
    });
}

}  // namespace pmc::PMC_ISA
