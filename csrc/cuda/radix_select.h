// Where the kept set ends: a radix select over keys of floats whose histograms hold counts or masses, with ties by
// lower token id. All sums are of integers, so the result depends on no order.
#pragma once

#include "common/order.h"
#include "cuda/mass.h"
#include "cuda/team.h"

namespace pmc::cuda {

constexpr int kBins = 2048;

struct Bin {
    uint32_t digit;
    uint64_t before;  // amount in higher bins
    uint64_t amount;  // in this one
    uint64_t target;  // what was asked for, or all there is
};

// In every block's shared memory. 64-bit sums in halves: the GPU adds 32 bits at a time in shared memory by itself.
struct Histogram {
    uint32_t low[kBins], high[kBins];
    Bin found;

    __device__ void clear(const Team& team) {
        for (int bin = team.thread(); bin < kBins; bin += team.threads()) low[bin] = high[bin] = 0;
    }

    __device__ void add(uint32_t bin, uint64_t amount) {
        const auto low_half = static_cast<uint32_t>(amount);
        const uint32_t before = atomicAdd(&low[bin], low_half);
        const uint32_t carry = before + low_half < before;
        const uint32_t high_half = static_cast<uint32_t>(amount >> 32) + carry;
        if (high_half) atomicAdd(&high[bin], high_half);
    }

    __device__ uint64_t amount(int bin) const { return static_cast<uint64_t>(high[bin]) << 32 | low[bin]; }

    // The highest bin with which the total of all blocks reaches `target`; leaves the histograms empty.
    __device__ Bin find(Team& team, uint64_t target) {
        __syncthreads();
        if (team.block() != 0) {
            Histogram* const first = peer(this, 0);
            for (int bin = team.thread(); bin < kBins; bin += team.threads())
                if (const uint64_t mine = amount(bin)) first->add(static_cast<uint32_t>(bin), mine);
            clear(team);
        }
        sync_cluster();
        if (team.block() == 0) {
            find_here(team, target);
            clear(team);
        }
        sync_cluster();
        return peer(this, 0)->found;
    }

  private:
    __device__ void find_here(Team& team, uint64_t target) {
        const int mine = kBins / team.threads(), highest = kBins - 1 - team.thread() * mine;
        uint64_t sum = 0;
        for (int i = 0; i < mine; ++i) sum += amount(highest - i);
        uint64_t before = team.sum_before(sum);
        if (team.thread() == team.threads() - 1) found.target = target < before + sum ? target : before + sum;
        __syncthreads();
        target = found.target;
        if (before < target && before + sum >= target) {
            int bin = highest;
            for (; before + amount(bin) < target; --bin) before += amount(bin);
            found.digit = static_cast<uint32_t>(bin);
            found.before = before;
            found.amount = amount(bin);
        }
        __syncthreads();
    }
};

// Masses of values relative to the row's largest, or 1 for each.
struct Amount {
    bool of_mass;
    float shift;

    __device__ uint64_t of(float value) const { return of_mass ? fixed_mass(expf(value - shift)) : 1; }
};

// The shortest beginning of the elements, in the order of common/order.h, whose amount reaches `target`, at least 1; if
// all do not, the shortest one with all of the amount. for_each(visit) calls visit(value, token) for a thread's
// elements.
template <class ForEach>
__device__ Cut select(Team& team, Histogram& histogram, const ForEach& for_each, const Cut& within,
                      const Amount& amount, uint64_t target) {
    Cut cut;
    uint32_t digits = 0;
    bool by_token = false;  // first by key, then among the last key's elements
#pragma unroll 1
    for (int round = 0; round < 2 * kRadixRounds; ++round) {
        const RadixDigit digit = radix_digit(round % kRadixRounds);
        for_each([&](float value, int token) {
            const uint32_t key = order_key(value);
            if (!within.keeps(key, static_cast<uint32_t>(token)) || (by_token && key != cut.key)) return;
            const uint32_t sorted = by_token ? ~static_cast<uint32_t>(token) : key;
            if (digit.higher_bits(sorted) == digits) histogram.add(digit.of(sorted), by_token ? 1 : amount.of(value));
        });
        const Bin bin = histogram.find(team, target);
        digits |= bin.digit << digit.shift;
        target = bin.target - bin.before;
        if (round == kRadixRounds - 1) {
            cut.key = digits;
            digits = 0;
            by_token = true;
            const uint64_t each = amount.of(from_order_key(cut.key)), elements = bin.amount / each;
            target = (target + each - 1) / each;
            if (target == elements) {
                if (cut.key == within.key) cut.last_token = within.last_token;
                return cut;
            }
        }
    }
    cut.last_token = ~digits;
    return cut;
}

}  // namespace pmc::cuda
