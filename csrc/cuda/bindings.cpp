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

    m.attr("MOST_LINEAR_SAMPLE_ROWS") = pmc::cuda::kMostLinearSampleRows;

    py::class_<pmc::cuda::SampleArgs>(m, "Draw", py::module_local())
        .def(py::init([](uintptr_t logits_row, int64_t rows, int64_t vocab, uintptr_t bias, float logit_scale,
                         float softcap, float temperature, int64_t top_k, double top_p, float log_min_p, uint64_t seed,
                         uintptr_t sequence, uintptr_t position, uintptr_t token, uintptr_t logprob,
                         uintptr_t sampling_logprob, uintptr_t kept_mass, uintptr_t bad) {
            return pmc::cuda::SampleArgs{nullptr,
                                         pointer<const int64_t>(logits_row),
                                         rows,
                                         vocab,
                                         0,
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
                                         0};
        }));
    m.def(
        "sample",
        [](int device, uintptr_t stream, uintptr_t logits, int dtype, int64_t row_stride, pmc::cuda::SampleArgs draw) {
            draw.logits = pointer<const void>(logits);
            draw.row_stride = row_stride;
            pmc::cuda::sample(draw, static_cast<pmc::Dtype>(dtype), {device, pointer<void>(stream)});
        },
        release());
    m.def(
        "linear_sample_scratch",
        [](int device, uintptr_t stream, int64_t rows, int64_t vocab) {
            return pmc::cuda::linear_sample_scratch(rows, vocab, {device, pointer<void>(stream)});
        },
        release());
    m.def(
        "linear_sample",
        [](int device, uintptr_t stream, uintptr_t hidden, int64_t hidden_stride, uintptr_t weight,
           int64_t weight_stride, int64_t size, uintptr_t logits, int64_t row_stride, uintptr_t parts,
           pmc::cuda::SampleArgs draw) {
            draw.row_stride = row_stride;
            pmc::cuda::linear_sample({pointer<const void>(hidden), pointer<const void>(weight), size, hidden_stride,
                                      weight_stride, pointer<float>(logits), pointer<void>(parts), draw},
                                     {device, pointer<void>(stream)});
        },
        release());
}
