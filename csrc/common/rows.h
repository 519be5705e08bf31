// What the kernels of every device are told about rows of logits.
#pragma once

namespace pmc {

enum class Dtype { kFloat32 = 0, kBFloat16 = 1 };

struct HeadTransform {
    float logit_scale;  // logits = logit_scale * z, then
    float softcap;      // softcap * tanh(logits / softcap); 0 leaves them
};

}  // namespace pmc
