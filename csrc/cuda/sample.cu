// Draws tokens from rows of logits: temperature, top-k, top-p, min-p, then the Gumbel argmax over what is kept.
//
// A cluster of blocks makes a draw. One visit of its row finds the maximum, the masses and, if nothing is truncated,
// the winner. Else a value is found that nothing kept lies below; what reaches it, hardly ever more than fits into a
// list, is all that the radix selects and the draw look at. Where the list is too short they visit the row again.
#include <cfloat>

#include "common/order.h"
#include "common/philox.h"
#include "cuda/kernels.h"
#include "cuda/mass.h"
#include "cuda/radix_select.h"
#include "cuda/row.h"
#include "cuda/team.h"

namespace pmc::cuda {
namespace {

constexpr int kCandidates = 1024;  // of a block

struct Candidate {
    float scaled;  // logit / temperature
    int32_t token;
};

struct alignas(16) SampleShared {
    Exchange exchange;
    Histogram histogram;
    uint32_t best_score;  // of this block, as a key
    int32_t candidates;   // found, which may be more than there is room for
    Candidate candidate[kCandidates];
};

// The Gumbel argmax: exact noise only for tokens that could still beat their block's best.
class Race {
  public:
    __device__ Race(const Draw& draw, uint32_t* best_score) : draw_(draw), best_score_(best_score) {}

    // The winner so far of this thread, as common/order.h ranks scores.
    __device__ uint64_t winner() const { return winner_; }

    __device__ void offer(float scaled, int32_t token) {
        if (!in_reach(scaled + kMaxGumbel)) return;
        uint32_t w0, w1, w2, w3;
        words(token / 4, &w0, &w1, &w2, &w3);
        const int which = token % 4;
        offer(scaled, token, which < 2 ? which == 0 ? w0 : w1 : which == 2 ? w2 : w3);
    }

    // Four neighbours, the first at a multiple of 4.
    __device__ void offer(float s0, float s1, float s2, float s3, int32_t token) {
        if (!in_reach(fmaxf(fmaxf(s0, s1), fmaxf(s2, s3)) + kMaxGumbel)) return;
        uint32_t w0, w1, w2, w3;
        words(token / 4, &w0, &w1, &w2, &w3);
        offer(s0, token, w0);
        offer(s1, token + 1, w1);
        offer(s2, token + 2, w2);
        offer(s3, token + 3, w3);
    }

  private:
    __device__ bool in_reach(float bound) const {
        return bound >= from_order_key(*static_cast<volatile uint32_t*>(best_score_));
    }

    __device__ void words(int32_t block, uint32_t* w0, uint32_t* w1, uint32_t* w2, uint32_t* w3) const {
        *w0 = static_cast<uint32_t>(block), *w1 = draw_.position, *w2 = draw_.sequence, *w3 = Draw::stream;
        philox_rounds(draw_.seed, *w0, *w1, *w2, *w3, [](uint32_t a, uint32_t b, uint32_t* high, uint32_t* low) {
            const uint64_t product = static_cast<uint64_t>(a) * b;
            *high = static_cast<uint32_t>(product >> 32);
            *low = static_cast<uint32_t>(product);
        });
    }

    __device__ void offer(float scaled, int32_t token, uint32_t word) {
        const auto log2 = static_cast<float>(static_cast<int32_t>(float_bits(static_cast<float>(word))) - kBitsOfOne);
        if (!in_reach(scaled + (kBoundOffset - log2 * kBoundSlope))) return;
        const uint64_t offered = ranked(scaled + gumbel_from_word(word), token);
        if (offered <= winner_) return;
        winner_ = offered;
        atomicMax(best_score_, static_cast<uint32_t>(offered >> 32));
    }

    Draw draw_;
    uint32_t* best_score_;
    uint64_t winner_ = 0;
};

__device__ bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }

// Whatever lies below it is no part of the nucleus: all such tokens hold less than (1 - top_p) of the mass together.
__device__ float nucleus_floor(const SampleArgs& args, float shift, double mass) {
    const double floor = shift + log((1 - args.top_p) * mass / static_cast<double>(args.vocab));
    return static_cast<float>(floor - 1e-3 - 1e-6 * fabs(floor));
}

template <class Logit>
__global__ void __launch_bounds__(kMostThreads, 2) sample_kernel(SampleArgs args) {
    SampleShared& shared = *reinterpret_cast<SampleShared*>(shared_memory());
    Team team(&shared.exchange);
    const int64_t r = blockIdx.x / static_cast<unsigned>(team.blocks());
    const int vocab = static_cast<int>(args.vocab);
    const int64_t from = args.logits_row ? args.logits_row[r] : r;
    const Logit* const row = static_cast<const Logit*>(args.logits) + from * args.row_stride;
    RowPart<Logit> part(row, vocab, team.block(), team.blocks(),
                        reinterpret_cast<uint4*>(shared_memory() + sizeof(SampleShared)), args.room);
    const float temperature = args.temperature;
    const bool greedy = temperature == 0, tempered = !greedy && temperature != 1;
    const bool by_rank = !greedy && args.top_k > 0 && args.top_k < vocab, by_mass = !greedy && args.top_p < 1,
               by_floor = !greedy && args.log_min_p > -INFINITY;
    const bool truncates = by_rank || by_mass || by_floor;

    if (team.thread() == 0) {
        shared.best_score = order_key(-FLT_MAX);
        shared.candidates = 0;
    }
    shared.histogram.clear(team);
    __syncthreads();
    const uint64_t seed = args.seed_at ? *args.seed_at : args.seed;
    Race race({seed, static_cast<uint32_t>(args.sequence[r]), static_cast<uint32_t>(args.position[r])},
              &shared.best_score);

    const auto logit = [&](float z, int token) { return transformed(args.bias ? z + args.bias[token] : z, args.head); };
    const auto scale = [&](float y) { return tempered ? y / temperature : y; };

    float top = -INFINITY;
    bool numbers = true;  // no NaN so far
    int top_token = 0;
    SoftmaxSum plain, hot;
    using Vector = typename RowPart<Logit>::Vector;
    constexpr int kWidth = RowPart<Logit>::kWidth;
    part.first_visit([&](Vector y, int token) {
        float highest = -INFINITY;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            y.value[i] = part.holds(token + i) ? logit(y.value[i], token + i) : -INFINITY;
            numbers = numbers && y.value[i] == y.value[i];
            highest = fmaxf(highest, y.value[i]);
        }
        if (highest > top) {
            top = highest;
#pragma unroll
            for (int i = kWidth - 1; i >= 0; --i)
                if (y.value[i] == highest) top_token = token + i;
        }
        plain.raise(highest);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) plain.add(y.value[i]);
        if (greedy || (truncates && !tempered)) return;
        if (tempered) {
            hot.raise(scale(highest));
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                y.value[i] = scale(y.value[i]);
                hot.add(y.value[i]);
            }
        }
        if (truncates) return;
#pragma unroll
        for (int i = 0; i < kWidth; i += 4)
            race.offer(y.value[i], y.value[i + 1], y.value[i + 2], y.value[i + 3], token + i);
    });

    const float row_top = from_order_key(static_cast<uint32_t>(team.largest(order_key(numbers ? top : INFINITY))));
    const float shift = scale(row_top);
    if (!is_finite(row_top) || !is_finite(shift)) {
        if (team.leads()) atomicMin(args.bad, static_cast<int32_t>(r));
        sync_cluster();  // until all have read what this block left for them
        return;
    }
    const uint64_t mass = team.sum(fixed_mass(plain.relative_to(row_top)));
    const uint64_t tempered_mass = tempered ? team.sum(fixed_mass(hot.relative_to(shift))) : mass;

    uint64_t kept = tempered_mass, winner = race.winner();
    if (greedy) winner = ranked(top, top_token);
    if (truncates) {
        float floor = -INFINITY;
        bool tops_only = true, listed = false;
        const float own_top = scale(top);
        // The elements that are still in question, as (scaled logit, token): the threads' own tops, then what reaches
        // `floor`.
        const auto for_each = [&](const auto& visit) {
            if (tops_only) {
                visit(own_top, team.thread());
            } else if (listed) {
                for (int i = team.thread(); i < shared.candidates; i += team.threads())
                    visit(shared.candidate[i].scaled, shared.candidate[i].token);
            } else {
                part.visit_again([&](const Vector& z, int token) {
#pragma unroll
                    for (int i = 0; i < kWidth; ++i) {
                        if (!part.holds(token + i)) continue;
                        const float scaled = scale(logit(z.value[i], token + i));
                        if (scaled >= floor) visit(scaled, token + i);
                    }
                });
            }
        };
        const Amount ones{false, shift}, masses{true, shift};
        if (by_rank) {  // the k-th of the threads' tops bounds the k-th of all
            if (args.top_k <= static_cast<int64_t>(team.threads()) * team.blocks())
                floor = from_order_key(
                    select(team, shared.histogram, for_each, Cut{}, ones, static_cast<uint64_t>(args.top_k)).key);
        } else {
            floor = by_mass ? nucleus_floor(args, shift, from_fixed_mass(tempered_mass)) : shift + args.log_min_p;
        }
        tops_only = false;
        for_each([&](float scaled, int token) {
            const int at = atomicAdd(&shared.candidates, 1);
            if (at < kCandidates) shared.candidate[at] = {scaled, token};
        });
        __syncthreads();
        listed = shared.candidates <= kCandidates;

        Cut cut;
        if (by_rank) cut = select(team, shared.histogram, for_each, Cut{}, ones, static_cast<uint64_t>(args.top_k));
        if (by_mass) {
            if (by_rank) {
                kept = 0;
                for_each([&](float scaled, int token) {
                    if (cut.keeps(order_key(scaled), static_cast<uint32_t>(token))) kept += masses.of(scaled);
                });
                kept = team.sum(kept);
            }
            const auto target = static_cast<uint64_t>(ceil(args.top_p * static_cast<double>(kept)));
            cut = select(team, shared.histogram, for_each, cut, masses, target > 0 ? target : 1);
        }
        const float least = by_floor ? shift + args.log_min_p : -INFINITY;
        kept = 0;
        for_each([&](float scaled, int token) {
            if (!(scaled >= least) || !cut.keeps(order_key(scaled), static_cast<uint32_t>(token))) return;
            kept += masses.of(scaled);
            race.offer(scaled, token);
        });
        kept = team.sum(kept);
        winner = race.winner();
    }
    winner = team.largest(winner);

    if (team.leads()) {
        const int32_t token = token_of(winner);
        const float y = logit(widen(row[token]), token);
        args.token[r] = token;
        args.logprob[r] = static_cast<float>(static_cast<double>(y) - row_top - log(from_fixed_mass(mass)));
        args.sampling_logprob[r] =
            greedy ? 0 : static_cast<float>(static_cast<double>(scale(y)) - shift - log(from_fixed_mass(kept)));
        args.kept_mass[r] =
            truncates ? fminf(1, static_cast<float>(from_fixed_mass(kept) / from_fixed_mass(tempered_mass))) : 1;
    }
    sync_cluster();
}

template <class Logit>
void launch_sample(SampleArgs args, void* stream) {
    constexpr const char* kName = "sample";
    const Device device = current_device(kName, sample_kernel<Logit>);
    const RowPlan plan = plan_rows(device, args.vocab * static_cast<int64_t>(sizeof(Logit)), sizeof(SampleShared));
    args.room = plan.room;
    launch(kName, sample_kernel<Logit>,
           {args.rows * plan.cluster, plan.threads, plan.cluster,
            static_cast<int64_t>(sizeof(SampleShared)) + 16 * plan.room},
           stream, args);
}

}  // namespace

void sample(SampleArgs args, Dtype dtype, const Queue& queue) {
    const CurrentDevice current(queue.device, "sample");
    dtype == Dtype::kFloat32 ? launch_sample<float>(args, queue.stream) : launch_sample<uint16_t>(args, queue.stream);
}

}  // namespace pmc::cuda
