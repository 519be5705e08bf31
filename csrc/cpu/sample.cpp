// Draws tokens from rows of logits: temperature, top-k, top-p, min-p, then the Gumbel argmax over what is kept.
#include <algorithm>
#include <cmath>

#include "common/order.h"
#include "common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/noise.h"
#include "cpu/row.h"

namespace pmc::PMC_ISA {

namespace {

struct Candidate {
    float scaled;  // logit / temperature
    int32_t token;
};

// More probable first, then the lower token id: the order that every truncation cuts.
struct Better {
    bool operator()(const Candidate& a, const Candidate& b) const {
        return comes_first(a.scaled, a.token, b.scaled, b.token);
    }
};

struct Winner {
    float score = -kInfinity;
    float scaled = 0;
    int64_t token = -1;

    void offer(float candidate_scaled, int64_t candidate, uint32_t word) {
        const float offered = candidate_scaled + gumbel_from_word(word);
        if (comes_first(offered, candidate, score, token)) {
            score = offered;
            scaled = candidate_scaled;
            token = candidate;
        }
    }
};

// Calls visit(i) for every i with row[i] above *threshold, which visit may raise.
template <class Visit>
inline void for_each_above(const float* row, int64_t size, const float* threshold, const Visit& visit) {
    int64_t i = 0;
    for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
        const Floats a = load(row + i), b = load(row + i + kLanes), c = load(row + i + 2 * kLanes),
                     d = load(row + i + 3 * kLanes);
        if (lanes_true(max(max(a, b), max(c, d)) > *threshold) == 0) continue;
        for (int64_t j = i; j < i + 4 * kLanes; ++j)
            if (row[j] > *threshold) visit(j);
    }
    for (; i < size; ++i)
        if (row[i] > *threshold) visit(i);
}

// Writes the k best candidates, in no order.
int64_t select_top_k(const float* row, int64_t size, float temperature, int64_t k, Candidate* kept) {
    const int64_t capacity = std::min(size, std::max<int64_t>(2 * k, 512));
    int64_t count = 0;
    float threshold = -kInfinity;
    const auto shrink = [&] {
        std::nth_element(kept, kept + (k - 1), kept + count, Better{});
        count = k;
        threshold = row[kept[k - 1].token];  // what comes later and is not above it loses, if only by its higher id
    };
    for_each_above(row, size, &threshold, [&](int64_t i) {
        if (count == capacity) shrink();
        kept[count++] = {row[i] / temperature, static_cast<int32_t>(i)};
    });
    if (count > k) shrink();
    return count;
}

// Writes every candidate above a logit that the nucleus cannot reach: all that lie below it hold less than
// (1 - top_p) of the mass together.
int64_t select_nucleus_candidates(const float* row, int64_t size, float temperature, float shift, double mass,
                                  double top_p, Candidate* kept) {
    const double reachable = shift + std::log((1 - top_p) * mass / static_cast<double>(size));
    const float threshold =
        static_cast<float>((reachable - 1e-3) * temperature - 1e-6 * std::abs(reachable * temperature));
    int64_t count = 0;
    for_each_above(row, size, &threshold,
                   [&](int64_t i) { kept[count++] = {row[i] / temperature, static_cast<int32_t>(i)}; });
    return count;
}

// Keeps the smallest prefix of the candidates in order of probability whose mass reaches `target`.
// Buckets of 1/16 nat find the place; only the bucket it falls into is sorted.
int64_t cut_nucleus(Candidate* candidates, int64_t count, float shift, double target, double* kept_mass) {
    constexpr int kBuckets = 512;
    constexpr float kBucketsPerUnit = 16;
    double mass[kBuckets] = {};
    const auto bucket_of = [&](const Candidate& c) {
        const float below = (shift - c.scaled) * kBucketsPerUnit;
        return below < kBuckets - 1 ? static_cast<int>(below) : kBuckets - 1;
    };
    const auto mass_of = [&](const Candidate& c) { return static_cast<double>(std::exp(c.scaled - shift)); };
    for (int64_t i = 0; i < count; ++i) mass[bucket_of(candidates[i])] += mass_of(candidates[i]);
    int last = 0;
    double before = 0;
    while (last < kBuckets - 1 && before + mass[last] < target) before += mass[last++];

    Candidate* const begin_last =
        std::partition(candidates, candidates + count, [&](const Candidate& c) { return bucket_of(c) < last; });
    Candidate* const end_last =
        std::partition(begin_last, candidates + count, [&](const Candidate& c) { return bucket_of(c) == last; });
    std::sort(begin_last, end_last, Better{});
    Candidate* end = begin_last;
    while (end != end_last && (end == candidates || before < target)) before += mass_of(*end++);
    *kept_mass = before;
    return end - candidates;
}

// The Gumbel argmax over scattered candidates.
Winner draw_from(const Candidate* candidates, int64_t count, const Draw& draw) {
    Winner winner;
    for (int64_t begin = 0; begin < count; begin += kLanes) {
        const int lanes = static_cast<int>(std::min<int64_t>(kLanes, count - begin));
        Floats scaled = broadcast(-kInfinity);
        Words block{};
        for (int lane = 0; lane < lanes; ++lane) {
            scaled[lane] = candidates[begin + lane].scaled;
            block[lane] = static_cast<uint32_t>(candidates[begin + lane].token) / 4;
        }
        if (lanes_true(scaled + kMaxGumbel >= winner.score) == 0) continue;
        const Block noise = philox(draw, block);
        for (int lane = 0; lane < lanes; ++lane) {
            const Candidate& c = candidates[begin + lane];
            const uint32_t word = noise.word[c.token % 4][lane];
            if (c.scaled + gumbel_bound(broadcast_word(word))[0] >= winner.score) winner.offer(c.scaled, c.token, word);
        }
    }
    return winner;
}

// The Gumbel argmax over a whole row. Groups of 4 * kLanes tokens share kLanes Philox blocks.
Winner draw_from_row(const float* row, int64_t size, float temperature, int64_t best, const Draw& draw) {
    const auto visit_group = [&](int64_t begin, Winner* winner) {
        const int64_t end = std::min(size, begin + 4 * kLanes);
        Words block;
        for (int lane = 0; lane < kLanes; ++lane) block[lane] = static_cast<uint32_t>(begin / 4 + lane);
        const Block noise = philox(draw, block);
        const Floats bound[4] = {gumbel_bound(noise.word[0]), gumbel_bound(noise.word[1]), gumbel_bound(noise.word[2]),
                                 gumbel_bound(noise.word[3])};
        for (int64_t i = begin; i < end; ++i) {
            const int lane = static_cast<int>((i - begin) / 4), word = static_cast<int>((i - begin) % 4);
            const float scaled = row[i] / temperature;
            if (scaled + bound[word][lane] >= winner->score) winner->offer(scaled, i, noise.word[word][lane]);
        }
    };
    Winner winner;
    const int64_t group = 4 * kLanes;
    visit_group(best / group * group, &winner);  // the likeliest token first: most others are then out of reach
    for (int64_t begin = 0; begin < size; begin += group) {
        if (begin + group <= size) {
            const Floats high = max(max(load(row + begin), load(row + begin + kLanes)),
                                    max(load(row + begin + 2 * kLanes), load(row + begin + 3 * kLanes)));
            if (lanes_true(high / temperature + kMaxGumbel >= winner.score) == 0) continue;
        }
        visit_group(begin, &winner);
    }
    return winner;
}

int64_t first_index_of(const float* row, int64_t size, float value) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes)
        if (lanes_true(load(row + i) == value)) break;
    while (i < size && row[i] != value) ++i;
    return i;
}

// Calls visit(draw, noise) for every draw from row r.
template <class Visit>
void for_each_draw(const SampleArgs& args, int64_t r, const Visit& visit) {
    const auto one = [&](int64_t i) {
        visit(i, Draw{args.seed, static_cast<uint32_t>(args.sequence[i]), static_cast<uint32_t>(args.position[i]),
                      static_cast<uint32_t>(args.first_token / 4)});
    };
    if (!args.begin) return one(r);
    for (int64_t at = args.begin[r]; at < args.begin[r + 1]; ++at) one(args.order[at]);
}

template <class Logit>
bool sample_row(const SampleArgs& args, int64_t r, char* workspace) {
    const int64_t vocab = args.vocab;
    float* const scratch = reinterpret_cast<float*>(workspace);
    Candidate* const candidates = reinterpret_cast<Candidate*>(workspace + (vocab + kWorkspaceSlack) * sizeof(float));
    const float* const row =
        as_logits(static_cast<const Logit*>(args.logits) + r * args.row_stride, vocab, args.head, scratch);
    float top;
    if (!finite_max(row, vocab, &top)) return false;
    const double mass = sum_exp(row, vocab, 1, top);
    const int64_t best = first_index_of(row, vocab, top);
    const auto write = [&](int64_t i, int64_t token, double sampling_logprob, double kept) {
        args.token[i] = token;
        args.logprob[i] = static_cast<float>(static_cast<double>(row[token]) - top - std::log(mass));
        args.sampling_logprob[i] = static_cast<float>(sampling_logprob);
        args.kept_mass[i] = static_cast<float>(kept);
    };
    if (args.temperature == 0) {
        for_each_draw(args, r, [&](int64_t i, const Draw&) { write(i, best, 0, 1); });
        return true;
    }

    const float temperature = args.temperature, shift = top / temperature;
    if (!std::isfinite(shift)) return false;
    const double tempered_mass = temperature == 1 ? mass : sum_exp(row, vocab, temperature, shift);
    const bool by_rank = args.top_k > 0 && args.top_k < vocab,
               by_mass = args.top_p<1, by_floor = args.log_min_p> - kInfinity;
    if (!by_rank && !by_mass && !by_floor) {
        for_each_draw(args, r, [&](int64_t i, const Draw& draw) {
            const Winner winner = draw_from_row(row, vocab, temperature, best, draw);
            write(i, winner.token, static_cast<double>(winner.scaled) - shift - std::log(tempered_mass), 1);
        });
        return true;
    }

    const auto mass_of = [&](const Candidate* begin, int64_t size) {
        double sum = 0;
        for (int64_t i = 0; i < size; ++i) sum += std::exp(begin[i].scaled - shift);
        return sum;
    };
    int64_t count;
    double kept = tempered_mass;
    if (by_rank) {
        count = select_top_k(row, vocab, temperature, args.top_k, candidates);
        kept = mass_of(candidates, count);
    } else if (by_mass) {
        count = select_nucleus_candidates(row, vocab, temperature, shift, kept, args.top_p, candidates);
    } else {
        count = 0;
        const float floor = std::min((shift + args.log_min_p) * temperature, top);  // rounding may lift it to inf
        const float threshold = floor - 1e-5f * (std::abs(top) + std::abs(floor) + std::min(temperature, 1.0f));
        for_each_above(row, vocab, &threshold,
                       [&](int64_t i) { candidates[count++] = {row[i] / temperature, static_cast<int32_t>(i)}; });
    }
    if (by_mass) count = cut_nucleus(candidates, count, shift, args.top_p * kept, &kept);
    if (by_floor) {
        const float floor = shift + args.log_min_p;
        count = std::partition(candidates, candidates + count, [&](const Candidate& c) { return c.scaled >= floor; }) -
                candidates;
        kept = mass_of(candidates, count);
    }
    for_each_draw(args, r, [&](int64_t i, const Draw& draw) {
        const Winner winner = draw_from(candidates, count, draw);
        write(i, winner.token, static_cast<double>(winner.scaled) - shift - std::log(kept),
              std::min(1.0, kept / tempered_mass));
    });
    return true;
}

}  // namespace

int64_t sample(const SampleArgs& args) {
    int64_t bad_row = kAllRowsFinite;
    const int64_t slice = sample_workspace_bytes(args.vocab);
    parallel_for(args.rows, args.threads, [&](int64_t r, int thread) {
        if (args.begin && args.begin[r] == args.begin[r + 1]) return;
        char* const workspace = static_cast<char*>(args.workspace) + thread * slice;
        const bool ok = args.dtype == Dtype::kFloat32 ? sample_row<float>(args, r, workspace)
                                                      : sample_row<uint16_t>(args, r, workspace);
        if (!ok) {
#pragma omp critical
            if (bad_row == kAllRowsFinite || r < bad_row) bad_row = r;
        }
    });
    return bad_row;
}

void gumbel(const GumbelArgs& args) {
    parallel_for(args.rows, args.threads, [&](int64_t r, int) {
        const Draw draw{args.seed, static_cast<uint32_t>(args.sequence[r]), static_cast<uint32_t>(args.position[r])};
        for (int64_t begin = 0; begin < args.vocab; begin += 4 * kLanes) {
            Words block;
            for (int lane = 0; lane < kLanes; ++lane) block[lane] = static_cast<uint32_t>(begin / 4 + lane);
            const Block noise = philox(draw, block);
            const int64_t end = std::min(args.vocab, begin + 4 * kLanes);
            for (int64_t i = begin; i < end; ++i)
                args.noise[r * args.vocab + i] = gumbel_from_word(noise.word[(i - begin) % 4][(i - begin) / 4]);
        }
    });
}

}  // namespace pmc::PMC_ISA
