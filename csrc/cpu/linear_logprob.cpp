// The log-probability of each row's target and its gradient, from products with a slice of the head's tokens at a time.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/parallel.h"
#include "cpu/gradient.h"
#include "cpu/kernels.h"

namespace pmc::PMC_ISA {
namespace {

// Calls body(r, products, y) for every row, y being its logits after the head's transform.
template <class Logit, class Body>
void for_each_row(const LogitSlice& slice, const Body& body) {
    const int64_t scratch = head_workspace_bytes(slice.tokens) / static_cast<int64_t>(sizeof(float));
    parallel_for(slice.rows, slice.threads, [&](int64_t r, int thread) {
        Logit* const row = static_cast<Logit*>(slice.logits) + r * slice.row_stride;
        body(r, row, as_logits(row, slice.tokens, slice.head, static_cast<float*>(slice.workspace) + thread * scratch));
    });
}

template <class Body>
void for_each_row(const LogitSlice& slice, const Body& body) {
    slice.dtype == Dtype::kFloat32 ? for_each_row<float>(slice, body) : for_each_row<uint16_t>(slice, body);
}

// What `score` becomes when these logits join those before them, their terms of the mass being visited; false, none
// being visited, if they hold no mass or are no numbers.
template <class Visit>
bool add_logits(const float* y, const LogitSlice& slice, int64_t target, RowScore* score, const Visit& visit) {
    if (target >= 0 && target < slice.tokens) score->target_logit = y[target] / slice.temperature;
    float top;
    const bool ordered = ordered_max(y, slice.tokens, &top);
    const float shift = ordered ? top / slice.temperature : std::numeric_limits<float>::quiet_NaN();
    if (shift == -kInfinity) return false;
    if (!std::isfinite(shift)) {
        score->top = shift;  // for good: nothing is larger
        return false;
    }
    if (shift > score->top) {
        score->mass *= std::exp(score->top - shift);
        score->top = shift;
    }
    score->mass += sum_exp(y, slice.tokens, slice.temperature, static_cast<float>(score->top), visit);
    return true;
}

// Terms of the mass, written over their logits times the soft cap's derivative there.
template <class Logit>
struct WriteTerms {
    const float* y;
    float inverse_cap;
    Logit* row;  // may be where y is

    void operator()(int64_t i, Floats terms) const { store(row + i, terms * slope(load(y + i), inverse_cap)); }
    void operator()(int64_t i, float term) const { from_float(row + i, term * slope(y[i], inverse_cap)); }
};

}  // namespace

void score_slice(const ScoreSliceArgs& args) {
    const LogitSlice& slice = args.slice;
    for_each_row(slice, [&](int64_t r, const void*, const float* y) {
        add_logits(y, slice, slice.target[r] - slice.first_token, args.score + r, [](int64_t, auto) {});
    });
}

void score_slice_terms(const ScoreSliceTermsArgs& args) {
    const LogitSlice& slice = args.slice;
    const float inverse_cap = slice.head.softcap > 0 ? 1 / slice.head.softcap : 0;
    for_each_row(slice, [&](int64_t r, auto* row, const float* y) {
        using Logit = std::remove_pointer_t<decltype(row)>;
        const int64_t target = slice.target[r] - slice.first_token;
        RowScore* const score = args.score + r;
        const double top = score->top;
        if (!add_logits(y, slice, target, score, WriteTerms<Logit>{y, inverse_cap, row})) {
            std::memset(row, 0, slice.tokens * sizeof(Logit));
            return;
        }
        if (target >= 0 && target < slice.tokens) row[target] = Logit{};
        if (top == score->top) return;
        const float fall = static_cast<float>(std::exp(top - score->top));
        for (int64_t i = 0; i < args.size; ++i) args.sums[r * args.size + i] *= fall;
    });
}

void slice_gradient(const SliceGradientArgs& args) {
    const LogitSlice& slice = args.slice;
    for_each_row(slice, [&](int64_t r, auto* row, const float* y) {
        const float top = args.normalizer[2 * r], mass = args.normalizer[2 * r + 1];
        write_gradient(y, slice.tokens, slice.head, slice.temperature, top, mass, slice.target[r] - slice.first_token,
                       args.weight[r], row);
    });
}

}  // namespace pmc::PMC_ISA
