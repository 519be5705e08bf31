// Sums of exponentials: relative to a maximum that may still rise, and as integers, whose sum no order changes.
#pragma once

#include <cfloat>
#include <cmath>

#include "common/host_device.h"

namespace pmc::cuda {

// sum of exp(x - top), top being the largest x so far. Starts from the lowest float, which unlike -inf can be
// subtracted from -inf.
struct SoftmaxSum {
    float top = -FLT_MAX;
    float sum = 0;

    PMC_HD void raise(float higher) {
        if (!(higher > top)) return;
        sum *= expf(top - higher);
        top = higher;
    }
    PMC_HD void add(float x) { sum += expf(x - top); }  // x <= top
    PMC_HD float relative_to(float highest) const { return sum * expf(top - highest); }
};

// Masses relative to a row's maximum in units of 2^-40; the sum of fewer than 2^24 of them, each at most 1, fits.
PMC_HD uint64_t fixed_mass(float mass) { return static_cast<uint64_t>(mass * 0x1p40f); }
PMC_HD double from_fixed_mass(uint64_t mass) { return static_cast<double>(mass) * 0x1p-40; }

}  // namespace pmc::cuda
