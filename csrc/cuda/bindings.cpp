// pmc_fast._cuda: addresses and sizes in, kernels queued without the GIL.
#include <pybind11/pybind11.h>

#include "cuda/kernels.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(PMC_CUDA_MODULE, m) {
    using release = py::call_guard<py::gil_scoped_release>;

    m.attr("FLOAT32") = static_cast<int>(pmc::Dtype::kFloat32);
    m.attr("BFLOAT16") = static_cast<int>(pmc::Dtype::kBFloat16);
    m.attr("MOST_VOCAB") = pmc::cuda::kMostVocab;
    m.attr("TARGETS") = PMC_CUDA_TARGETS;

    m.def(
        "sample",
        [](int device, uintptr_t stream, uintptr_t logits, int dtype, uintptr_t logits_row, int64_t rows, int64_t vocab,
           int64_t row_stride, uintptr_t bias, float logit_scale, float softcap, float temperature, int64_t top_k,
           double top_p, float log_min_p, uint64_t seed, uintptr_t seed_at, uintptr_t sequence, uintptr_t position,
           uintptr_t token, uintptr_t logprob, uintptr_t sampling_logprob, uintptr_t kept_mass, uintptr_t bad) {
            pmc::cuda::sample({pointer<const void>(logits),
                               pointer<const int64_t>(logits_row),
                               rows,
                               vocab,
                               row_stride,
                               pointer<const float>(bias),
                               {logit_scale, softcap},
                               temperature,
                               top_k,
                               top_p,
                               log_min_p,
                               seed,
                               pointer<const uint64_t>(seed_at),
                               pointer<const int64_t>(sequence),
                               pointer<const int64_t>(position),
                               pointer<int64_t>(token),
                               pointer<float>(logprob),
                               pointer<float>(sampling_logprob),
                               pointer<float>(kept_mass),
                               pointer<int32_t>(bad),
                               0},
                              static_cast<pmc::Dtype>(dtype), {device, pointer<void>(stream)});
        },
        release());
}
