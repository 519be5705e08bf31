// Negative log-likelihood of each row's target, and in the same visit the gradient written over the logits.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/row.h"

namespace pmc::PMC_ISA {
namespace {

// d(sum weight * nll)/dz where y = logits after the head's transform and l = y / T:
// weight * (softmax(l) - onehot) / T * (1 - (y / softcap)^2) * logit_scale.
template <class Logit>
void write_gradient(const CrossEntropyArgs& args, const float* y, float shift, float mass, int64_t target, float weight,
                    Logit* row) {
    const float temperature = args.temperature, inverse_mass = 1 / mass;
    const float scale = weight / temperature * args.head.logit_scale;
    const float inverse_cap = args.head.softcap > 0 ? 1 / args.head.softcap : 0;
    const float lowest = std::numeric_limits<float>::lowest();  // in place of -inf, whose product with 0 is NaN
    const auto slope = [&](float logit) {
        const float capped = std::max(logit, lowest) * inverse_cap;
        return 1 - capped * capped;
    };
    const float target_logit = y[target];
    int64_t i = 0;
    for (; i + kLanes <= args.vocab; i += kLanes) {
        const Floats logit = load(y + i), capped = max(logit, broadcast(lowest)) * inverse_cap;
        const Floats p = exp_nonpositive(logit / temperature - shift) * inverse_mass;
        store(row + i, p * scale * (1 - capped * capped));
    }
    for (; i < args.vocab; ++i)
        from_float(row + i, std::exp(y[i] / temperature - shift) * inverse_mass * scale * slope(y[i]));
    const float p = std::exp(target_logit / temperature - shift) * inverse_mass;
    from_float(row + target, (p - 1) * scale * slope(target_logit));
}

template <class Logit>
bool cross_entropy_row(const CrossEntropyArgs& args, int64_t r, float* scratch) {
    Logit* const row = static_cast<Logit*>(args.logits) + r * args.row_stride;
    const float* const y = as_logits(row, args.vocab, args.head, scratch);
    float top;
    if (!finite_max(y, args.vocab, &top)) return false;
    const float temperature = args.temperature, shift = top / temperature;
    if (!std::isfinite(shift)) return false;
    const double mass = sum_exp(y, args.vocab, temperature, shift);
    const int64_t target = args.target[r];
    args.nll[r] = static_cast<float>(static_cast<double>(shift) - y[target] / temperature + std::log(mass));
    if (args.weight) write_gradient(args, y, shift, static_cast<float>(mass), target, args.weight[r], row);
    return true;
}

}  // namespace

int64_t cross_entropy(const CrossEntropyArgs& args) {
    int64_t bad_row = kAllRowsFinite;
    const int64_t slice = cross_entropy_workspace_bytes(args.vocab) / static_cast<int64_t>(sizeof(float));
    parallel_for(args.rows, args.threads, [&](int64_t r, int thread) {
        float* const scratch = static_cast<float*>(args.workspace) + thread * slice;
        const bool ok = args.dtype == Dtype::kFloat32 ? cross_entropy_row<float>(args, r, scratch)
                                                      : cross_entropy_row<uint16_t>(args, r, scratch);
        if (!ok) {
#pragma omp critical
            if (bad_row == kAllRowsFinite || r < bad_row) bad_row = r;
        }
    });
    return bad_row;
}

}  // namespace pmc::PMC_ISA
