// The kernels of one instruction set, as the rest of the library sees them.
#include "cpu/kernels.h"

#define PMC_STRING_OF(name) #name
#define PMC_STRING(name) PMC_STRING_OF(name)

namespace pmc::PMC_ISA {

int64_t sample(const SampleArgs& args);
int64_t cross_entropy(const CrossEntropyArgs& args);
void gumbel(const GumbelArgs& args);
int64_t decode_attention(const DecodeAttentionArgs& args);

extern const Kernels kernels;
const Kernels kernels = {PMC_STRING(PMC_ISA), sample, cross_entropy, gumbel, decode_attention};

}  // namespace pmc::PMC_ISA
