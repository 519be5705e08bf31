"""Finds, without a sort, the lowest key that top-k and top-p keep of a row.

A key is the scaled logit's order, then the lower token id. Keys are distinct, so ties need no care.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pmc_fast.kernels.logits import INFINITY, head_logit, mass_below

LOWEST_ORDER = tl.constexpr(-0x7F800001)  # that of -inf
HIGHEST_ORDER = tl.constexpr(2**31 - 1)
TOKEN_BITS = tl.constexpr(30)
LAST_TOKEN = tl.constexpr(2**30 - 1)
LOWEST_KEY = tl.constexpr(-(2**62))
HIGHEST_KEY = tl.constexpr(2**62)
GATHERED = tl.constexpr(2048)  # tokens looked at together while gathering
MEASURED = tl.constexpr(1024)  # and afterwards
WAYS = tl.constexpr(4)  # thresholds tried together
WAYS_BITS = tl.constexpr(2)


@triton.jit
def order(x):
    """int32 in the order of the floats; 0 and -0 are the same."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def in_order(place):
    """The float32 whose `order` is the int32 `place`."""
    return (place ^ ((place >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def lower_bound(peak, shift, tempered, k, spare, BY_RANK: tl.constexpr, GROUP: tl.constexpr):
    """A scaled logit, by its int32 `order`, below which nothing is kept, from what is known of the row's groups.

    BY_RANK: at least k groups, so k tokens, reach it. Otherwise what lies below it is less than `spare` of the mass: of a
    group that reaches it, at most the mass of all but the peak, and of each token less than its own.
    """
    way = tl.arange(0, WAYS)
    group_mass = tempered * mass_below(peak, shift)
    rest = tl.maximum(group_mass - mass_below(peak, shift), 0.0)
    if BY_RANK:
        low = tl.min(tl.where(peak > -INFINITY, order(peak), HIGHEST_ORDER), 0).to(tl.int64)
    else:
        low = order(shift + tl.log(tl.maximum(0.99 * spare, 1e-30) / (GROUP * peak.shape[0]))).to(tl.int64)
    high = order(shift).to(tl.int64) + 1
    found = low * 0 + LOWEST_ORDER
    while high - low > 1024:  # 0.001 at a logit of 20
        step = (high - low + (WAYS - 1)) >> WAYS_BITS
        place = tl.minimum(low + step * way, high)
        threshold = in_order(place.to(tl.int32))
        reaches = peak[:, None] >= threshold[None, :]
        if BY_RANK:
            holds = tl.sum(reaches.to(tl.int32), 0) >= k
        else:
            most = tl.minimum(rest[:, None], GROUP * tl.exp(threshold - shift)[None, :])
            holds = tl.sum(tl.where(reaches, most, group_mass[:, None]), 0) <= spare
        count = tl.sum(holds.to(tl.int64), 0)
        found = tl.where(count > 0, low + step * (count - 1), found)
        high = tl.where(count > 0, tl.minimum(low + step * count, high), low)
        low = tl.where(count > 0, found, low)
    return found


@triton.jit
def candidates(row, start, length, gathered, GROUP: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tokens from number `start` of the gathered ones, or of those of the active groups.

    Their ids, scaled logits, keys and masses; a token that cannot be drawn has LOWEST_KEY.
    """
    logits, vocab, bias, logit_scale, softcap, temperature, shift, active, buffer = row
    index = start + tl.arange(0, COUNT)
    inside = index < length
    entry = tl.load(active + tl.where(gathered, buffer + index, index // GROUP), mask=inside, other=0)
    token = tl.where(gathered, entry, entry * GROUP + index % GROUP)
    inside &= token < vocab
    product = tl.load(logits + token, mask=inside, other=0)
    scaled = tl.div_rn(head_logit(product, bias, token, inside, logit_scale, softcap), temperature)
    key = (order(scaled).to(tl.int64) << TOKEN_BITS) + (LAST_TOKEN - token)
    key = tl.where(scaled > -INFINITY, key, LOWEST_KEY)
    return token, scaled, key, tl.exp(scaled - shift)


@triton.jit
def gather(row, length, low, high, GROUP: tl.constexpr, CAPACITY: tl.constexpr):
    """Writes the tokens of the active groups with keys in [low, high), as many as fit; how many there are."""
    active, buffer = row[7], row[8]
    count = 0
    for start in range(0, length, GATHERED):
        token, _, key, _ = candidates(row, start, length, False, GROUP, GATHERED)
        chosen = ((key >= low) & (key < high)).to(tl.int32)
        place = count + tl.cumsum(chosen, 0) - chosen
        tl.store(active + buffer + place, token, mask=(chosen != 0) & (place < CAPACITY))
        count += tl.sum(chosen, 0)
    tl.debug_barrier()  # other threads read what was written
    return count


@triton.jit
def measure(row, length, gathered, thresholds, GROUP: tl.constexpr):
    """How many candidates have keys of at least each threshold, and their mass."""
    counts = tl.zeros(thresholds.shape, tl.int32)
    masses = tl.zeros(thresholds.shape, tl.float64)
    for start in range(0, length, MEASURED):
        _, _, key, mass = candidates(row, start, length, gathered, GROUP, MEASURED)
        reaches = key[:, None] >= thresholds[None, :]
        counts += tl.sum(reaches.to(tl.int32), 0)
        masses += tl.sum(tl.where(reaches, mass[:, None], 0.0), 0).to(tl.float64)
    return counts, masses


@triton.jit
def cut(row, low, k, target, length, gathered, count, GROUP: tl.constexpr, CAPACITY: tl.constexpr):
    """The lowest key kept: fewer than k keys lie above a kept one, and less mass than `target`.

    Candidates with keys of at least `low`, `count` in number, are searched: gathered in the buffer, or in the first
    `length` tokens of the active groups. Returns the cut and whether the buffer holds all that is kept.
    """
    way = tl.arange(0, WAYS)
    high = (order(row[6]).to(tl.int64) + 1) << TOKEN_BITS
    # what lies at or above `high`, and at or above where it was when the buffer was filled
    count_above = count * 0
    mass_above = tl.sum(tl.zeros([WAYS], tl.float64), 0)
    count_beyond = count_above
    mass_beyond = mass_above
    while count > 1:
        step = (high - low + (WAYS - 1)) >> WAYS_BITS
        thresholds = tl.minimum(low + step * way, high)
        counts, masses = measure(row, length, gathered, thresholds, GROUP)
        counts += count_beyond
        masses += mass_beyond
        dropped = tl.sum(((counts >= k) | (masses >= target)).to(tl.int32), 0)  # the first ones
        if dropped == 0:
            count = count_above * 0
        else:
            if dropped < WAYS:
                count_above = tl.sum(tl.where(way == dropped, counts, 0), 0)
                mass_above = tl.sum(tl.where(way == dropped, masses, 0.0), 0)
            count = tl.sum(tl.where(way == dropped - 1, counts, 0), 0) - count_above
            high = tl.minimum(low + step * dropped, high)
            low += step * (dropped - 1)
            if (not gathered) & (count <= CAPACITY):
                length = gather(row, length, low, high, GROUP, CAPACITY)
                gathered = length >= 0
                count_beyond = count_above
                mass_beyond = mass_above
    return low, length, gathered & (count_beyond == 0)
