// The kernels of one instruction set, as the rest of the library sees them.
#include "cpu/kernels.h"

#define PMC_STRING_OF(name) #name
#define PMC_STRING(name) PMC_STRING_OF(name)

namespace pmc::PMC_ISA {

int64_t sample(const SampleArgs& args);
int64_t cross_entropy(const CrossEntropyArgs& args);
void score_slice(const ScoreSliceArgs& args);
void score_slice_terms(const ScoreSliceTermsArgs& args);
void slice_gradient(const SliceGradientArgs& args);
void gumbel(const GumbelArgs& args);
int64_t decode_attention(const DecodeAttentionArgs& args);
void packed_attention(const PackedAttentionArgs& args);
void packed_attention_backward(const PackedAttentionBackwardArgs& args);
int64_t packed_weight_elements(int64_t out_features, int64_t in_features, bool rounded);
void pack_weight(const PackWeightArgs& args);
void packed_linear(const PackedLinearArgs& args);
bool has_dot_product();
void normalize(const NormalizeArgs& args);
void normalize_gradient(const NormalizeGradientArgs& args);
void activate(const ActivateArgs& args);
void activate_gradient(const ActivateGradientArgs& args);
void rotate(const RotateArgs& args);

extern const Kernels kernels;
const Kernels kernels = {PMC_STRING(PMC_ISA),
                         sample,
                         cross_entropy,
                         score_slice,
                         score_slice_terms,
                         slice_gradient,
                         gumbel,
                         decode_attention,
                         packed_attention,
                         packed_attention_backward,
                         packed_weight_elements,
                         pack_weight,
                         packed_linear,
                         has_dot_product,
                         normalize,
                         normalize_gradient,
                         activate,
                         activate_gradient,
                         rotate};

}  // namespace pmc::PMC_ISA
