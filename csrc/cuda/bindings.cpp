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
        [](int device, uintptr_t stream, uintptr_t logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride,
           uintptr_t bias, float logit_scale, float softcap, float temperature, int64_t top_k, double top_p,
           float log_min_p, uint64_t seed, uintptr_t sequence, uintptr_t position, uintptr_t token, uintptr_t logprob,
           uintptr_t sampling_logprob, uintptr_t kept_mass, uintptr_t bad) {
            pmc::cuda::sample({pointer<const void>(logits),
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

    m.def(
        "cross_entropy",
        [](int device, uintptr_t stream, uintptr_t logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride,
           float logit_scale, float softcap, float temperature, uintptr_t row, int64_t first_row, uintptr_t target,
           uintptr_t weight, uintptr_t nll, uintptr_t bad) {
            pmc::cuda::cross_entropy({pointer<void>(logits),
                                      rows,
                                      vocab,
                                      row_stride,
                                      {logit_scale, softcap},
                                      temperature,
                                      pointer<const int64_t>(row),
                                      first_row,
                                      pointer<const int64_t>(target),
                                      pointer<const float>(weight),
                                      pointer<float>(nll),
                                      pointer<int32_t>(bad),
                                      0},
                                     static_cast<pmc::Dtype>(dtype), {device, pointer<void>(stream)});
        },
        release());

    m.def(
        "append_token",
        [](int device, uintptr_t stream, uintptr_t token, uintptr_t logprob, uintptr_t slot, int64_t rows,
           uintptr_t ends, int64_t end_count, uintptr_t limit, uintptr_t tokens, uintptr_t logprobs, int64_t width,
           uintptr_t length, uintptr_t logprob_sum, uintptr_t finished, uintptr_t position, uintptr_t done) {
            pmc::cuda::append_token(
                {pointer<const int64_t>(token), pointer<const float>(logprob), pointer<const int64_t>(slot), rows,
                 pointer<const int64_t>(ends), end_count, pointer<const int64_t>(limit), pointer<int64_t>(tokens),
                 pointer<float>(logprobs), width, pointer<int64_t>(length), pointer<double>(logprob_sum),
                 pointer<uint8_t>(finished), pointer<int64_t>(position), pointer<uint8_t>(done)},
                {device, pointer<void>(stream)});
        },
        release());
}
