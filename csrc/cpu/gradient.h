// The gradient of weighted negative log-likelihoods with respect to a row of products with the head.
#pragma once

#include <algorithm>

#include "cpu/row.h"

namespace pmc::PMC_ISA {
namespace {

// The soft cap's derivative where it made `logit`; inverse_cap is 1 / softcap, or 0 without one.
inline Floats slope(Floats logit, float inverse_cap) {
    const Floats lowest =
        broadcast(std::numeric_limits<float>::lowest());  // in place of -inf, whose product with 0 is NaN
    const Floats capped = max(logit, lowest) * inverse_cap;
    return 1 - capped * capped;
}

inline float slope(float logit, float inverse_cap) {
    const float capped = std::max(logit, std::numeric_limits<float>::lowest()) * inverse_cap;
    return 1 - capped * capped;
}

// d(sum weight * nll)/dz where y = logits after the head's transform, l = y / T and p = exp(l - shift) / mass:
// weight * (p - onehot) / T * (1 - (y / softcap)^2) * logit_scale.
template <class Logit>
void write_gradient(const float* y, int64_t size, const HeadTransform& head, float temperature, float shift, float mass,
                    int64_t target,  // in [0, size), or elsewhere if it is not among these tokens
                    float weight,
                    Logit* row) {  // may be where y is
    const float inverse_mass = 1 / mass, scale = weight / temperature * head.logit_scale;
    const float inverse_cap = head.softcap > 0 ? 1 / head.softcap : 0;
    const bool targeted = target >= 0 && target < size;
    const float target_logit = targeted ? y[target] : 0;
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        const Floats logit = load(y + i);
        const Floats p = exp_nonpositive(logit / temperature - shift) * inverse_mass;
        store(row + i, p * scale * slope(logit, inverse_cap));
    }
    for (; i < size; ++i)
        from_float(row + i, std::exp(y[i] / temperature - shift) * inverse_mass * scale * slope(y[i], inverse_cap));
    if (!targeted) return;
    const float p = std::exp(target_logit / temperature - shift) * inverse_mass;
    from_float(row + target, (p - 1) * scale * slope(target_logit, inverse_cap));
}

}  // namespace
}  // namespace pmc::PMC_ISA
