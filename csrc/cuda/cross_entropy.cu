// Negative log-likelihood of each row's target, and in the same visit to memory the gradient written over the logits.
#include <cfloat>

#include "common/mass.h"
#include "common/order.h"
#include "cuda/kernels.h"
#include "cuda/row.h"
#include "cuda/team.h"

namespace pmc::cuda {
namespace {

struct alignas(16) CrossEntropyShared {
    Exchange exchange;
};

template <class Logit>
__global__ void __launch_bounds__(kMostThreads, 2) cross_entropy_kernel(CrossEntropyArgs args) {
    CrossEntropyShared& shared = *reinterpret_cast<CrossEntropyShared*>(shared_memory());
    Team team(&shared.exchange);
    const int64_t r = blockIdx.x / static_cast<unsigned>(team.blocks());
    const int64_t number = args.row ? args.row[r] : args.first_row + r;
    Logit* const row = static_cast<Logit*>(args.logits) + r * args.row_stride;
    RowPart<Logit> part(row, static_cast<int>(args.vocab), team.block(), team.blocks(),
                        reinterpret_cast<uint4*>(shared_memory() + sizeof(CrossEntropyShared)), args.room);
    using Vector = typename RowPart<Logit>::Vector;
    constexpr int kWidth = RowPart<Logit>::kWidth;
    const auto target = static_cast<int>(args.target[number]);
    const float target_logit = transformed(widen(row[target]), args.head);  // before anybody writes over it

    float top = -INFINITY;
    bool numbers = true;  // no NaN so far
    SoftmaxSum sum;
    part.first_visit([&](Vector y, int token) {
        float highest = -INFINITY;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            y.value[i] = part.holds(token + i) ? transformed(y.value[i], args.head) : -INFINITY;
            numbers = numbers && y.value[i] == y.value[i];
            highest = fmaxf(highest, y.value[i]);
        }
        top = fmaxf(top, highest);
        sum.raise(highest / args.temperature);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum.add(y.value[i] / args.temperature);
    });

    const float row_top = from_order_key(static_cast<uint32_t>(team.largest(order_key(numbers ? top : INFINITY))));
    const float shift = row_top / args.temperature;
    if (!(fabsf(row_top) <= FLT_MAX) || !(fabsf(shift) <= FLT_MAX)) {
        if (team.leads()) atomicMin(args.bad, static_cast<int32_t>(number));
        sync_cluster();  // until all have read what this block left for them
        return;
    }
    const double mass = from_fixed_mass(team.sum(fixed_mass(sum.relative_to(shift))));
    if (team.leads())
        args.nll[number] = static_cast<float>(static_cast<double>(shift) - target_logit / args.temperature + log(mass));
    if (args.weight) {
        // weight * (softmax - onehot) / temperature * (1 - (y / softcap)^2) * logit_scale
        const float inverse_mass = 1 / static_cast<float>(mass);
        const float scale = args.weight[number] / args.temperature * args.head.logit_scale;
        part.visit_again([&](Vector z, int token) {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                const float y = transformed(z.value[i], args.head);
                const float capped = args.head.softcap > 0 ? y / args.head.softcap : 0;
                const float p = expf(y / args.temperature - shift) * inverse_mass;
                z.value[i] = (token + i == target ? p - 1 : p) * scale * (1 - capped * capped);
            }
            part.store(row, token, z);
        });
    }
    sync_cluster();
}

template <class Logit>
void launch_cross_entropy(CrossEntropyArgs args, void* stream) {
    constexpr const char* kName = "cross_entropy";
    const Device device = current_device(kName, cross_entropy_kernel<Logit>);
    const RowPlan plan =
        plan_rows(device, args.vocab * static_cast<int64_t>(sizeof(Logit)), sizeof(CrossEntropyShared));
    args.room = plan.room;
    launch(kName, cross_entropy_kernel<Logit>,
           {args.rows * plan.cluster, plan.threads, plan.cluster,
            static_cast<int64_t>(sizeof(CrossEntropyShared)) + 16 * plan.room},
           stream, args);
}

}  // namespace

void cross_entropy(CrossEntropyArgs args, Dtype dtype, const Queue& queue) {
    const CurrentDevice current(queue.device, "cross_entropy");
    dtype == Dtype::kFloat32 ? launch_cross_entropy<float>(args, queue.stream)
                             : launch_cross_entropy<uint16_t>(args, queue.stream);
}

}  // namespace pmc::cuda
