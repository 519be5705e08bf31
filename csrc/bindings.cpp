// pmc_fast._C: addresses and sizes in, kernels called without the GIL. The only file that includes pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/decoder.h"
#include "cpu/isa.h"
#include "cpu/prefix_sharers.h"
#include "cpu/rouge_l_recall.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Addresses of keys and values, how far apart their rows, heads and positions lie, and how many positions they have.
using Strides = std::array<int64_t, 3>;
using Positions = std::tuple<uintptr_t, uintptr_t, Strides, Strides, int64_t>;

pmc::CachedPositions positions(const Positions& from) {
    const auto& [key, value, key_stride, value_stride, length] = from;
    const auto strides = [](const Strides& s) { return pmc::CacheStrides{s[0], s[1], s[2]}; };
    return {pointer<const void>(key), pointer<const void>(value), strides(key_stride), strides(value_stride), length};
}

// Addresses of [tokens, heads, dim] and how far apart tokens and heads lie.
using Tokens = std::tuple<uintptr_t, int64_t, int64_t>;

pmc::TokenHeads tokens(const Tokens& from) {
    const auto& [at, token_stride, head_stride] = from;
    return {pointer<const void>(at), token_stride, head_stride};
}

pmc::PackedAttentionTasks tasks(const pmc::PackedAttentionArgs& args) {
    return pmc::packed_attention_tasks(args.lengths, args.sequences, args.heads, args.kv_heads);
}

// A decoder's weights, as native/decoder.py hands them over.
using Norm = std::tuple<uintptr_t, uintptr_t, int64_t, float, bool>;
using Adapter = std::tuple<uintptr_t, uintptr_t, int64_t>;
using Linear = std::tuple<uintptr_t, int, int64_t, bool, uintptr_t, int64_t, int64_t, std::vector<Adapter>>;

pmc::NormWeights norm(const Norm& from) {
    const auto& [weight, bias, size, epsilon, centered] = from;
    return {pointer<const float>(weight), pointer<const float>(bias), size, epsilon, centered};
}

pmc::LinearWeights linear(const Linear& from) {
    const auto& [weight, dtype, row_stride, rounded, bias, out_features, in_features, adapters] = from;
    pmc::LinearWeights to{pointer<const void>(weight),
                          static_cast<pmc::Dtype>(dtype),
                          row_stride,
                          rounded,
                          pointer<const float>(bias),
                          out_features,
                          in_features,
                          {}};
    for (const auto& [down, up, rank] : adapters)
        to.adapters.push_back({pointer<const float>(down), pointer<const float>(up), rank});
    return to;
}

template <class From, class Read>
auto maybe(const std::optional<From>& from, const Read& read) {
    return from ? std::make_optional(read(*from)) : std::nullopt;
}

pmc::Activation activation(const std::string& name) {
    if (name == "silu") return pmc::Activation::kSilu;
    if (name == "gelu") return pmc::Activation::kGelu;
    if (name == "gelu_tanh") return pmc::Activation::kGeluTanh;
    if (name == "relu") return pmc::Activation::kRelu;
    throw py::value_error("activation: got " + name + ", expected silu, gelu, gelu_tanh or relu");
}

// By the names of its fields.
pmc::DecoderLayer decoder_layer(const py::dict& from) {
    const auto norm_of = [&](const char* name) { return maybe(from[name].cast<std::optional<Norm>>(), norm); };
    const auto linear_of = [&](const char* name) { return linear(from[name].cast<Linear>()); };
    const auto maybe_linear = [&](const char* name) { return maybe(from[name].cast<std::optional<Linear>>(), linear); };
    return {norm_of("norm"),
            linear_of("query"),
            maybe_linear("key"),
            maybe_linear("value"),
            from["clip"].cast<float>(),
            norm_of("query_norm"),
            norm_of("key_norm"),
            linear_of("output"),
            norm_of("output_norm"),
            from["parallel"].cast<bool>(),
            norm_of("mlp_norm"),
            maybe_linear("gate"),
            linear_of("up"),
            activation(from["activation"].cast<std::string>()),
            linear_of("down"),
            norm_of("down_norm"),
            from["rotary"].cast<int64_t>(),
            from["window"].cast<int64_t>(),
            from["scale"].cast<float>(),
            from["softcap"].cast<float>()};
}

#ifdef _OPENMP
constexpr const char* kThreading = "OpenMP";
#else
constexpr const char* kThreading = "one thread (built without OpenMP)";
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    using release = py::call_guard<py::gil_scoped_release>;

    m.attr("FLOAT32") = static_cast<int>(pmc::Dtype::kFloat32);
    m.attr("BFLOAT16") = static_cast<int>(pmc::Dtype::kBFloat16);
    m.attr("THREADING") = kThreading;

    m.def("instruction_sets", &pmc::usable_instruction_sets);
    m.def("use_instruction_set", &pmc::use_instruction_set, py::arg("name"));
    m.def("instruction_set", [] { return pmc::kernels().name; });
    m.def("sample_workspace_bytes", &pmc::sample_workspace_bytes, py::arg("vocab"));
    m.def("head_workspace_bytes", &pmc::head_workspace_bytes, py::arg("tokens"));

    m.def(
        "sample",
        [](uintptr_t logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride, float logit_scale,
           float softcap, float temperature, int64_t top_k, double top_p, float log_min_p, uint64_t seed,
           uintptr_t begin, uintptr_t order, uintptr_t sequence, uintptr_t position, uintptr_t token, uintptr_t logprob,
           uintptr_t sampling_logprob, uintptr_t kept_mass, uintptr_t workspace, int threads, int64_t first_token) {
            return pmc::kernels().sample({pointer<const void>(logits),
                                          static_cast<pmc::Dtype>(dtype),
                                          rows,
                                          vocab,
                                          row_stride,
                                          {logit_scale, softcap},
                                          temperature,
                                          top_k,
                                          top_p,
                                          log_min_p,
                                          seed,
                                          pointer<const int64_t>(begin),
                                          pointer<const int64_t>(order),
                                          pointer<const int64_t>(sequence),
                                          pointer<const int64_t>(position),
                                          pointer<int64_t>(token),
                                          pointer<float>(logprob),
                                          pointer<float>(sampling_logprob),
                                          pointer<float>(kept_mass),
                                          pointer<void>(workspace),
                                          threads,
                                          first_token});
        },
        release());

    m.def(
        "cross_entropy",
        [](uintptr_t logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride, float logit_scale,
           float softcap, uintptr_t target, uintptr_t weight, uintptr_t nll, uintptr_t workspace, int threads) {
            return pmc::kernels().cross_entropy({pointer<void>(logits),
                                                 static_cast<pmc::Dtype>(dtype),
                                                 rows,
                                                 vocab,
                                                 row_stride,
                                                 {logit_scale, softcap},
                                                 pointer<const int64_t>(target),
                                                 pointer<const float>(weight),
                                                 pointer<float>(nll),
                                                 pointer<void>(workspace),
                                                 threads});
        },
        release());

    py::class_<pmc::LogitSlice>(m, "LogitSlice")
        .def(py::init([](uintptr_t logits, int dtype, int64_t rows, int64_t tokens, int64_t row_stride,
                         int64_t first_token, float logit_scale, float softcap, float temperature, uintptr_t target,
                         uintptr_t workspace, int threads) {
            return pmc::LogitSlice{pointer<void>(logits),
                                   static_cast<pmc::Dtype>(dtype),
                                   rows,
                                   tokens,
                                   row_stride,
                                   first_token,
                                   {logit_scale, softcap},
                                   temperature,
                                   pointer<const int64_t>(target),
                                   pointer<void>(workspace),
                                   threads};
        }))
        .def(
            "score",
            [](const pmc::LogitSlice& slice, uintptr_t score) {
                pmc::kernels().score_slice({slice, pointer<pmc::RowScore>(score)});
            },
            release())
        .def(
            "score_terms",
            [](const pmc::LogitSlice& slice, uintptr_t score, uintptr_t sums, int64_t size) {
                pmc::kernels().score_slice_terms({slice, pointer<pmc::RowScore>(score), pointer<float>(sums), size});
            },
            release())
        .def(
            "gradient",
            [](const pmc::LogitSlice& slice, uintptr_t normalizer, uintptr_t weight) {
                pmc::kernels().slice_gradient({slice, pointer<const float>(normalizer), pointer<const float>(weight)});
            },
            release());

    m.def("decode_attention_workspace_floats", &pmc::decode_attention_workspace_floats, py::arg("length"),
          py::arg("dim"));
    m.def(
        "decode_attention",
        [](uintptr_t query, int dtype, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, const Positions& own,
           const Positions& prefix, uintptr_t prefix_row, uintptr_t first, uintptr_t length, float scale, float softcap,
           uintptr_t out, uintptr_t workspace, int threads) {
            pmc::PrefixSharers sharers;
            sharers.find(pointer<const int64_t>(prefix_row), pointer<const int64_t>(first), rows,
                         positions(prefix).length, heads, kv_heads, threads);
            return pmc::kernels().decode_attention({pointer<const void>(query), static_cast<pmc::Dtype>(dtype), rows,
                                                    heads, kv_heads, dim, positions(own), positions(prefix),
                                                    pointer<const int64_t>(prefix_row), pointer<const int64_t>(first),
                                                    pointer<const int64_t>(length), scale, softcap, pointer<void>(out),
                                                    pointer<void>(workspace), threads, sharers.found()});
        },
        release());

    py::class_<pmc::PackedAttentionArgs>(m, "PackedAttention")
        .def(py::init([](const Tokens& query, const Tokens& key, const Tokens& value, int dtype, int64_t heads,
                         int64_t kv_heads, int64_t dim, uintptr_t lengths, int64_t sequences, int64_t window,
                         float scale, float softcap, uintptr_t out, uintptr_t log_mass, int threads) {
            return pmc::PackedAttentionArgs{tokens(query),
                                            tokens(key),
                                            tokens(value),
                                            static_cast<pmc::Dtype>(dtype),
                                            heads,
                                            kv_heads,
                                            dim,
                                            pointer<const int64_t>(lengths),
                                            sequences,
                                            window,
                                            scale,
                                            softcap,
                                            pointer<void>(out),
                                            pointer<float>(log_mass),
                                            nullptr,
                                            threads};
        }))
        .def_property_readonly("workspace_floats",
                               [](const pmc::PackedAttentionArgs& args) {
                                   return pmc::packed_attention_workspace_floats(args.sequences, args.dim,
                                                                                 args.threads);
                               })
        .def_property_readonly("backward_workspace_floats",
                               [](const pmc::PackedAttentionArgs& args) {
                                   return pmc::packed_attention_backward_workspace_floats(
                                       tasks(args), args.sequences, args.kv_heads, args.dim, args.threads);
                               })
        .def(
            "forward",
            [](pmc::PackedAttentionArgs args, uintptr_t workspace) {
                args.workspace = pointer<void>(workspace);
                pmc::kernels().packed_attention(args);
            },
            release())
        .def(
            "backward",
            [](pmc::PackedAttentionArgs args, const Tokens& upstream, uintptr_t d_query, uintptr_t d_key,
               uintptr_t d_value, uintptr_t workspace) {
                args.workspace = pointer<void>(workspace);
                pmc::kernels().packed_attention_backward({args, tokens(upstream), pointer<void>(d_query),
                                                          pointer<void>(d_key), pointer<void>(d_value), tasks(args)});
            },
            release());

    m.def(
        "packed_weight_elements",
        [](int64_t out_features, int64_t in_features, bool rounded) {
            return pmc::kernels().packed_weight_elements(out_features, in_features, rounded);
        },
        py::arg("out_features"), py::arg("in_features"), py::arg("rounded"));
    m.def("has_dot_product", [] { return pmc::kernels().has_dot_product(); });
    m.def(
        "pack_weight",
        [](uintptr_t weight, int dtype, int64_t out_features, int64_t in_features, int64_t row_stride, uintptr_t packed,
           bool rounded, int threads) {
            pmc::kernels().pack_weight({pointer<const void>(weight), static_cast<pmc::Dtype>(dtype), out_features,
                                        in_features, row_stride, pointer<void>(packed), rounded, threads});
        },
        release());
    m.def(
        "packed_linear",
        [](uintptr_t x, int64_t rows, int64_t x_stride, uintptr_t weight, int dtype, int64_t row_stride, uintptr_t bias,
           int64_t out_features, int64_t in_features, uintptr_t y, int64_t y_stride, bool accumulate, bool rounded,
           int threads) {
            pmc::kernels().packed_linear({pointer<const float>(x), rows, x_stride, pointer<const void>(weight),
                                          static_cast<pmc::Dtype>(dtype), row_stride, pointer<const float>(bias),
                                          out_features, in_features, pointer<float>(y), y_stride, accumulate, rounded,
                                          threads});
        },
        release());

    m.def(
        "normalize",
        [](uintptr_t x, int64_t rows, int64_t size, int64_t x_stride, uintptr_t weight, uintptr_t bias, float epsilon,
           bool centered, uintptr_t y, int64_t y_stride, uintptr_t stats, int threads) {
            pmc::kernels().normalize({pointer<const float>(x), rows, size, x_stride, pointer<const float>(weight),
                                      pointer<const float>(bias), epsilon, centered, pointer<float>(y), y_stride, false,
                                      threads, pointer<float>(stats)});
        },
        release());
    m.def("normalize_gradient_workspace_floats", &pmc::normalize_gradient_workspace_floats, py::arg("rows"),
          py::arg("size"));
    m.def(
        "normalize_gradient",
        [](uintptr_t grad, uintptr_t x, int64_t rows, int64_t size, int64_t grad_stride, int64_t x_stride,
           uintptr_t stats, uintptr_t weight, bool centered, uintptr_t grad_x, int64_t grad_x_stride, bool accumulate,
           uintptr_t grad_weight, uintptr_t grad_bias, uintptr_t workspace, int threads) {
            pmc::kernels().normalize_gradient({pointer<const float>(grad), pointer<const float>(x), rows, size,
                                               grad_stride, x_stride, pointer<const float>(stats),
                                               pointer<const float>(weight), centered, pointer<float>(grad_x),
                                               grad_x_stride, accumulate, pointer<float>(grad_weight),
                                               pointer<float>(grad_bias), pointer<float>(workspace), threads});
        },
        release());
    m.def(
        "activate",
        [](uintptr_t x, uintptr_t up, int64_t rows, int64_t size, int64_t x_stride, int64_t up_stride,
           const std::string& name, uintptr_t y, int64_t y_stride, int threads) {
            pmc::kernels().activate({pointer<const float>(x), pointer<const float>(up), rows, size, x_stride, up_stride,
                                     activation(name), pointer<float>(y), y_stride, threads});
        },
        release());
    m.def(
        "activate_gradient",
        [](uintptr_t grad, uintptr_t gate, uintptr_t up, int64_t rows, int64_t size, int64_t grad_stride,
           int64_t gate_stride, int64_t up_stride, const std::string& name, uintptr_t grad_gate, uintptr_t grad_up,
           int threads) {
            pmc::kernels().activate_gradient({pointer<const float>(grad), pointer<const float>(gate),
                                              pointer<const float>(up), rows, size, grad_stride, gate_stride, up_stride,
                                              activation(name), pointer<float>(grad_gate), pointer<float>(grad_up),
                                              threads});
        },
        release());
    m.def(
        "rotate",
        [](uintptr_t x, int64_t rows, int64_t heads, int64_t dim, int64_t x_stride, uintptr_t cosine, uintptr_t sine,
           int64_t rotated, uintptr_t y, int threads, bool transposed) {
            pmc::kernels().rotate({pointer<const float>(x), rows, heads, dim, x_stride, dim,
                                   pointer<const float>(cosine), pointer<const float>(sine), rotated, pointer<void>(y),
                                   heads * dim, dim, pmc::Dtype::kFloat32, threads, transposed});
        },
        release());

    py::class_<pmc::Decoder>(m, "Decoder")
        .def(py::init([](const std::vector<py::dict>& layers, const Norm& final_norm, int64_t head_dim) {
            std::vector<pmc::DecoderLayer> read;
            for (const py::dict& layer : layers) read.push_back(decoder_layer(layer));
            return pmc::Decoder(std::move(read), norm(final_norm), head_dim);
        }))
        .def(
            "step",
            [](pmc::Decoder& decoder, uintptr_t hidden, int64_t rows, uintptr_t cosine, uintptr_t sine, int64_t rotated,
               int dtype, const std::vector<Positions>& own, const std::vector<Positions>& prefix, int64_t filled,
               uintptr_t prefix_row, uintptr_t first, int threads) {
                pmc::DecoderStep step{pointer<float>(hidden),
                                      rows,
                                      pointer<const float>(cosine),
                                      pointer<const float>(sine),
                                      rotated,
                                      static_cast<pmc::Dtype>(dtype),
                                      {},
                                      {},
                                      pointer<const int64_t>(prefix_row),
                                      pointer<const int64_t>(first),
                                      threads};
                for (const Positions& layer : own)
                    step.own.push_back(positions(layer)), step.own.back().length = filled;
                for (const Positions& layer : prefix) step.prefix.push_back(positions(layer));
                return decoder.step(step);
            },
            release());

    m.def(
        "gumbel",
        [](int64_t rows, int64_t vocab, uint64_t seed, uintptr_t sequence, uintptr_t position, uintptr_t noise,
           int threads) {
            pmc::kernels().gumbel({rows, vocab, seed, pointer<const int64_t>(sequence),
                                   pointer<const int64_t>(position), pointer<float>(noise), threads});
        },
        release());

    m.def(
        "rouge_l_lcs",
        [](uintptr_t candidate_ids, uintptr_t candidate_offsets, uintptr_t reference_ids, uintptr_t reference_offsets,
           int64_t pairs, uintptr_t lcs) {
            pmc::rouge_l_lcs(pointer<const int32_t>(candidate_ids), pointer<const int64_t>(candidate_offsets),
                             pointer<const int32_t>(reference_ids), pointer<const int64_t>(reference_offsets), pairs,
                             pointer<int64_t>(lcs));
        },
        release());
}
