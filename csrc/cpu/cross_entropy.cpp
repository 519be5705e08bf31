// Negative log-likelihood of each row's target, and in the same visit the gradient written over the logits.
#include <cmath>

#include "common/parallel.h"
#include "cpu/gradient.h"
#include "cpu/kernels.h"

namespace pmc::PMC_ISA {
namespace {

template <class Logit>
bool cross_entropy_row(const CrossEntropyArgs& args, int64_t r, float* scratch) {
    Logit* const row = static_cast<Logit*>(args.logits) + r * args.row_stride;
    const float* const y = as_logits(row, args.vocab, args.head, scratch);
    float top;
    if (!finite_max(y, args.vocab, &top)) return false;
    const double mass = sum_exp(y, args.vocab, 1, top);
    const int64_t target = args.target[r];
    args.nll[r] = static_cast<float>(static_cast<double>(top) - y[target] + std::log(mass));
    if (args.weight)
        write_gradient(y, args.vocab, args.head, 1, top, static_cast<float>(mass), target, args.weight[r], row);
    return true;
}

}  // namespace

int64_t cross_entropy(const CrossEntropyArgs& args) {
    int64_t bad_row = kAllRowsFinite;
    const int64_t slice = head_workspace_bytes(args.vocab) / static_cast<int64_t>(sizeof(float));
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
