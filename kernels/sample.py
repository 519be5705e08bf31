"""Draws one token per row of logits: exact, deterministic, without a sort and without waiting for the GPU.

Nothing truncated (or greedy): `draw_kernel` reads the logits once, a program per tile of a row, and leaves each tile's maximum,
its masses and its winner; `finish_draw_kernel` reduces those. R V s bytes for R rows, V tokens and s bytes a logit, and
20 bytes a tile.

Truncated: `group_kernel` reads the logits once and leaves each group's maximum and masses, 12 bytes for GROUP tokens.
`truncate_kernel`, a program per row, finds from these a value that no kept token lies below (the k-th largest of the maxima;
for top-p, the highest value below which the groups cannot hold 1 - p of the mass), reads only the groups that reach it,
gathers the tokens at or above it, narrows the place of the cut among them, and draws. So R V s bytes and little more: for
top-k, some k groups of a row. Gathered tokens beyond the buffer's CAPACITY (a flat distribution) are read again from those
groups until the cut's bracket fits.

A cut is a key: the scaled logit's order, then the lower token id. Keys are distinct, so ties need no care. Masses are
float32 exponentials summed in a fixed order: the same row gives the same bits in any company.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.kernels.checks import no_bad_row, report
from pmc_fast.kernels.cross_entropy import tanh
from pmc_fast.kernels.gemm import row_major
from pmc_fast.kernels.philox import gumbel, gumbel_bound, halves, tile_words, token_word
from pmc_fast.kernels.variant import Variant

TILE = 4096  # tokens that a program of a first pass reads
SMALLEST_TILE = 128
GROUP = 128  # tokens whose maximum and masses the truncation starts from
MOST_GROUPS = 2048  # of a row; groups are doubled until they are no more
CAPACITY = 4096  # gathered tokens of a row

INFINITY = tl.constexpr(math.inf)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
NO_TOKEN = tl.constexpr(2**31 - 1)
LOWEST_ORDER = tl.constexpr(-0x7F800001)  # that of -inf
TOKEN_BITS = tl.constexpr(30)
LAST_TOKEN = tl.constexpr(2**30 - 1)
LOWEST_KEY = tl.constexpr(-(2**62))
HIGHEST_KEY = tl.constexpr(2**62)
GATHERED = tl.constexpr(2048)  # tokens looked at together while gathering
MEASURED = tl.constexpr(1024)  # and afterwards
WAYS = tl.constexpr(4)  # thresholds tried together
WAYS_BITS = tl.constexpr(2)


class Sampling(NamedTuple):
    """The options of a draw, as `pmc_fast.sample` takes them."""

    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    seed: int

    def truncates(self, vocab: int) -> bool:
        by_rank = self.top_k is not None and self.top_k < vocab
        return self.temperature > 0 and (by_rank or self.top_p < 1 or self.min_p > 0)

    def key(self) -> tuple[int, int]:
        return halves(self.seed)


class Head(NamedTuple):
    """What is still to be done to a product with the head to make it a logit."""

    bias: Tensor | None = None
    logit_scale: float | None = None
    softcap: float | None = None


class Draws(NamedTuple):
    """The outputs."""

    token: Tensor
    logprob: Tensor
    sampling_logprob: Tensor
    kept_mass: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Draws:
        token = torch.empty(rows, dtype=torch.int64, device=device)
        return cls(token, *(torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3)))

    def rows(self, rows: slice) -> Draws:
        return Draws(*(column[rows] for column in self))


def sample(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float,
    min_p: float,
    seed: int,
    sequence: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = len(logits)
    draws, bad = Draws.empty(rows, logits.device), no_bad_row(rows, logits.device)
    sampling = Sampling(temperature, top_k, top_p, min_p, seed)
    draw(logits, Head(), sampling, sequence, position, draws, bad, 0)
    report("sample", bad, rows)
    return tuple(draws)


def draw(
    logits: Tensor,
    head: Head,
    sampling: Sampling,
    sequence: Tensor,
    position: Tensor,
    draws: Draws,
    bad: Tensor,
    first_row: int,
) -> None:
    """Fills `draws`, whose row 0 the caller knows as `first_row`."""
    logits, sequence, position = row_major(logits), sequence.contiguous(), position.contiguous()
    if sampling.truncates(logits.shape[1]):
        _draw_truncated(logits, head, sampling, sequence, position, draws, bad, first_row)
    else:
        _draw_from_all(logits, head, sampling, sequence, position, draws, bad, first_row)


class Parts(NamedTuple):
    """What the tiles of rows leave: float32 [rows, tiles] each, the token int32."""

    top: Tensor
    mass: Tensor
    tempered: Tensor
    logit: Tensor
    token: Tensor

    @classmethod
    def empty(cls, rows: int, tiles: int, device: torch.device) -> Parts:
        values = torch.empty(4, rows, tiles, dtype=torch.float32, device=device)
        return cls(*values, torch.empty(rows, tiles, dtype=torch.int32, device=device))


def _draw_from_all(logits, head, sampling, sequence, position, draws, bad, first_row) -> None:
    rows, vocab = logits.shape
    tile = min(TILE, max(SMALLEST_TILE, triton.next_power_of_2(vocab)))
    parts = Parts.empty(rows, triton.cdiv(vocab, tile), logits.device)
    draw_kernel[(parts.top.numel(),)](
        logits,
        logits.stride(0),
        vocab,
        head.bias,
        head.logit_scale,
        head.softcap,
        sampling.temperature,
        inverse(sampling.temperature),
        *sampling.key(),
        sequence,
        position,
        *parts,
        parts.top.shape[1],
        GREEDY=sampling.temperature == 0,
        TEMPERED=sampling.temperature not in (0, 1),
        TILE=tile,
        num_warps=warps_for(tile),
    )
    finish_draw(parts, sampling, sequence, position, draws, bad, first_row)


def finish_draw(
    parts: Parts, sampling: Sampling, sequence: Tensor, position: Tensor, draws: Draws, bad: Tensor, first_row: int
) -> None:
    """From each tile's winner the row's, and its log-probabilities."""
    rows, tiles = parts.top.shape
    finish_draw_kernel[(rows,)](
        *parts,
        tiles,
        sampling.temperature,
        *sampling.key(),
        sequence,
        position,
        *draws,
        bad,
        first_row,
        GREEDY=sampling.temperature == 0,
        TEMPERED=sampling.temperature not in (0, 1),
        TILES=triton.next_power_of_2(tiles),
        num_warps=4,
    )


def _draw_truncated(logits, head, sampling, sequence, position, draws, bad, first_row) -> None:
    rows, vocab = logits.shape
    group = group_size(vocab)
    groups = triton.cdiv(vocab, group)
    tile = min(TILE, max(group, triton.next_power_of_2(vocab)))
    tiles = triton.cdiv(vocab, tile)
    tempered = sampling.temperature != 1
    top, mass, tempered_mass = torch.empty(3, rows, groups, dtype=torch.float32, device=logits.device)
    group_kernel[(rows * tiles,)](
        logits,
        logits.stride(0),
        vocab,
        head.bias,
        head.logit_scale,
        head.softcap,
        inverse(sampling.temperature),
        top,
        mass,
        tempered_mass,
        groups,
        tiles,
        TEMPERED=tempered,
        TILE=tile,
        GROUP=group,
        num_warps=warps_for(tile),
    )
    by_rank = sampling.top_k is not None and sampling.top_k < vocab
    scratch = torch.empty(rows, groups + CAPACITY, dtype=torch.int32, device=logits.device)
    truncate_kernel[(rows,)](
        logits,
        logits.stride(0),
        vocab,
        head.bias,
        head.logit_scale,
        head.softcap,
        sampling.temperature,
        sampling.top_k if by_rank else vocab,
        *halves(struct.unpack("<Q", struct.pack("<d", sampling.top_p))[0]),
        math.log(sampling.min_p) if sampling.min_p > 0 else 0.0,
        *sampling.key(),
        sequence,
        position,
        top,
        mass,
        tempered_mass,
        groups,
        scratch,
        *draws,
        bad,
        first_row,
        TEMPERED=tempered,
        BY_RANK=by_rank,
        BY_MASS=sampling.top_p < 1,
        BY_FLOOR=sampling.min_p > 0,
        GROUP=group,
        GROUPS=triton.next_power_of_2(groups),
        CAPACITY=CAPACITY,
        num_warps=8 if groups <= 1024 else 16,
    )


def group_size(vocab: int) -> int:
    size = GROUP
    while triton.cdiv(vocab, size) > MOST_GROUPS:
        size *= 2
    return size


def warps_for(tile: int) -> int:
    return min(8, max(1, tile // 512))


def inverse(temperature: float) -> float:
    return 1 / temperature if temperature else 1.0


@triton.jit
def head_logit(product, bias, token, inside, logit_scale, softcap):
    """The logits, in float32, of products with the head; -inf outside."""
    logit = product.to(tl.float32)
    if bias is not None:
        logit += tl.load(bias + token, mask=inside, other=0).to(tl.float32)
    if logit_scale is not None:
        logit *= logit_scale
    if softcap is not None:
        logit = softcap * tanh(logit / softcap)
    return tl.where(inside, logit, -INFINITY)


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
def mass_below(logit, top):
    """The exponentials of `logit` relative to `top`, of which some are all -inf."""
    return tl.exp(logit - tl.where(top == -INFINITY, 0.0, top))


@triton.jit
def maximum(x):
    """Of a vector. As a matrix of one row: for sm_100 Triton cannot reduce a vector made of a product."""
    return tl.max(x[None, :])


@triton.jit
def minimum(x):
    return tl.min(x[None, :])


@triton.jit
def draw_from_tile(
    logit,  # float32 [tokens, rows], -inf outside
    token,  # int32 [tokens]
    words,  # uint32 [tokens, rows], for the noise; None when greedy
    temperature,
    inverse_temperature,
    GREEDY: tl.constexpr,
    TEMPERED: tl.constexpr,
):
    """What a tile leaves of each row: top, mass, tempered mass, and the winner's logit and token."""
    top = tl.max(logit, 0)
    mass = tl.sum(mass_below(logit, top[None, :]), 0)
    tempered = mass
    if TEMPERED:
        reference = tl.where(top == -INFINITY, 0.0, top)
        tempered = tl.sum(tl.exp((logit - reference[None, :]) * inverse_temperature), 0)
    if GREEDY:
        winner = top
        best = tl.min(tl.where(logit == top[None, :], token[:, None], NO_TOKEN), 0)
    else:
        scaled = logit * inverse_temperature
        # the last term covers the rounding of the product and of the sums
        bound = scaled + (gumbel_bound(words) + tl.minimum(tl.abs(scaled), LARGEST) * 1e-6)
        highest = tl.max(bound, 0)
        best = tl.min(tl.where(bound == highest[None, :], token[:, None], NO_TOKEN), 0)
        winner = tl.max(tl.where(token[:, None] == best[None, :], logit, -INFINITY), 0)
        rest = tl.max(tl.where(token[:, None] == best[None, :], -INFINITY, bound), 0)
        row = tl.arange(0, logit.shape[1])
        unsure = (rest >= highest - gap(highest, winner * inverse_temperature)).to(tl.int32)
        while maximum(unsure) > 0:  # hardly ever
            this = row == minimum(tl.where(unsure > 0, row, logit.shape[1]))
            its_logit = tl.max(tl.where(this[None, :], logit, -INFINITY), 1)
            score = tl.div_rn(its_logit, temperature) + gumbel(tl.max(tl.where(this[None, :], words, 0), 1))
            first = minimum(tl.where(score == maximum(score), token, NO_TOKEN))
            best = tl.where(this, first, best)
            winner = tl.where(this, maximum(tl.where(token == first, its_logit, -INFINITY)), winner)
            unsure = tl.where(this, 0, unsure)
    return top, mass, tempered, winner, best


@triton.jit
def gap(bound, scaled):
    """By how much the bound of a score lies above it, at most: see `gumbel_bound`, and `draw_from_tile` for rounding."""
    size = tl.abs(scaled)
    noise = bound - scaled
    fitted = tl.where((noise > -0.17) & (size < 1000), 0.003, 2.2)
    return tl.where(noise < 14, fitted, 100.0) + size * 4e-6


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def draw_kernel(
    logits,  # [rows, vocab]
    stride,  # of its rows
    vocab,
    bias,
    logit_scale,
    softcap,
    temperature,
    inverse_temperature,
    seed_low,
    seed_high,
    sequence,  # int64 [rows]
    position,
    tops,  # this and what follows: [rows, tiles]
    masses,
    tempered_masses,
    winners,
    tokens,
    tiles,
    GREEDY: tl.constexpr,
    TEMPERED: tl.constexpr,
    TILE: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * TILE
    token = first + tl.arange(0, TILE)
    product = tl.load(logits + row * stride + token, mask=token < vocab, other=0)
    logit = head_logit(product, bias, token, token < vocab, logit_scale, softcap)
    only = tl.zeros([1], tl.int64)
    its_sequence = tl.load(sequence + row + only).to(tl.uint32)
    its_position = tl.load(position + row + only).to(tl.uint32)
    words = None if GREEDY else tile_words(seed_low, seed_high, its_sequence, its_position, first, TILE)
    top, mass, tempered, winner, best = draw_from_tile(
        logit[:, None], token, words, temperature, inverse_temperature, GREEDY, TEMPERED
    )
    part = tl.program_id(0) + only
    tl.store(tops + part, top)
    tl.store(masses + part, mass)
    tl.store(tempered_masses + part, tempered)
    tl.store(winners + part, winner)
    tl.store(tokens + part, best)


@triton.jit
def is_distribution(top, shift, mass):
    """Of NaN or +inf the mass is NaN; of nothing but -inf, the top -inf."""
    return (tl.abs(top) < INFINITY) & (tl.abs(shift) < INFINITY) & (mass < INFINITY)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "first_row"])
def finish_draw_kernel(
    tops,
    masses,
    tempered_masses,
    winners,
    tokens,
    tiles,
    temperature,
    seed_low,
    seed_high,
    sequence,  # int64 [rows]
    position,
    out_token,
    out_logprob,
    out_sampling_logprob,
    out_kept_mass,
    bad,
    first_row,
    GREEDY: tl.constexpr,
    TEMPERED: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    inside = tile < tiles
    part = row * tiles + tile
    its_tops = tl.load(tops + part, mask=inside, other=-INFINITY)
    top = tl.max(its_tops, 0)
    mass = tl.sum((tl.load(masses + part, mask=inside, other=0) * mass_below(its_tops, top)).to(tl.float64), 0)
    its_tokens = tl.load(tokens + part, mask=inside, other=NO_TOKEN)
    its_winners = tl.load(winners + part, mask=inside, other=-INFINITY)
    score = its_winners
    if not GREEDY:
        its_sequence = tl.load(sequence + row).to(tl.uint32)
        its_position = tl.load(position + row).to(tl.uint32)
        word = token_word(seed_low, seed_high, its_sequence, its_position, its_tokens)
        score = tl.div_rn(its_winners, temperature) + gumbel(word)
    best = tl.min(tl.where(score == tl.max(score, 0), its_tokens, NO_TOKEN), 0)
    logit = tl.max(tl.where(its_tokens == best, its_winners, -INFINITY), 0)
    shift = top
    sampling_logprob = mass * 0
    if not GREEDY:
        tempered = mass
        drawn = logit
        if TEMPERED:
            shift = tl.div_rn(top, temperature)
            drawn = tl.div_rn(logit, temperature)
            below = mass_below(tl.div_rn(its_tops, temperature), shift)
            tempered = tl.sum((tl.load(tempered_masses + part, mask=inside, other=0) * below).to(tl.float64), 0)
        sampling_logprob = (drawn - shift).to(tl.float64) - tl.log(tempered)
    if not is_distribution(top, shift, mass):
        tl.atomic_min(bad, (first_row + row).to(tl.int32))
    tl.store(out_token + row, best.to(tl.int64))
    tl.store(out_logprob + row, ((logit - top).to(tl.float64) - tl.log(mass)).to(tl.float32))
    tl.store(out_sampling_logprob + row, sampling_logprob.to(tl.float32))
    tl.store(out_kept_mass + row, 1.0)


@triton.jit
def group_kernel(
    logits,  # [rows, vocab]
    stride,  # of its rows
    vocab,
    bias,
    logit_scale,
    softcap,
    inverse_temperature,
    tops,  # this and the next two: [rows, groups]
    masses,
    tempered_masses,
    groups,
    tiles,
    TEMPERED: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    group = tl.program_id(0) % tiles * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    product = tl.load(logits + row * stride + token, mask=token < vocab, other=0)
    logit = head_logit(product, bias, token, token < vocab, logit_scale, softcap)
    top = tl.max(logit, 1)
    part = row * groups + group
    tl.store(tops + part, top, mask=group < groups)
    tl.store(masses + part, tl.sum(mass_below(logit, top[:, None]), 1), mask=group < groups)
    if TEMPERED:
        reference = tl.where(top == -INFINITY, 0.0, top)
        tempered = tl.sum(tl.exp((logit - reference[:, None]) * inverse_temperature), 1)
        tl.store(tempered_masses + part, tempered, mask=group < groups)


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
        low = tl.min(tl.where(peak > -INFINITY, order(peak), NO_TOKEN), 0).to(tl.int64)
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


@triton.jit(do_not_specialize=["k", "top_p_low", "top_p_high", "seed_low", "seed_high", "first_row"])
def truncate_kernel(
    logits,  # [rows, vocab]
    stride,  # of its rows
    vocab,
    bias,
    logit_scale,
    softcap,
    temperature,
    k,
    top_p_low,  # the halves of a float64's bits
    top_p_high,
    log_min_p,
    seed_low,
    seed_high,
    sequence,  # int64 [rows]
    position,
    tops,  # this and the next two: [rows, groups]
    masses,
    tempered_masses,
    groups,
    scratch,  # int32 [rows, groups + CAPACITY]: the active groups, then gathered tokens
    out_token,
    out_logprob,
    out_sampling_logprob,
    out_kept_mass,
    bad,
    first_row,
    TEMPERED: tl.constexpr,
    BY_RANK: tl.constexpr,
    BY_MASS: tl.constexpr,
    BY_FLOOR: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    part = row * groups + group
    peak = tl.load(tops + part, mask=group < groups, other=-INFINITY)
    group_mass = tl.load(masses + part, mask=group < groups, other=0)
    top = tl.max(peak, 0)
    mass = tl.sum((group_mass * mass_below(peak, top)).to(tl.float64), 0)
    shift = top
    if TEMPERED:
        peak = tl.div_rn(peak, temperature)
        shift = tl.div_rn(top, temperature)
        group_mass = tl.load(tempered_masses + part, mask=group < groups, other=0)
    if not is_distribution(top, shift, mass):
        tl.atomic_min(bad, (first_row + row).to(tl.int32))
        return
    total = tl.sum((group_mass * mass_below(peak, shift)).to(tl.float64), 0)

    # nothing below `reach` is kept
    floor = order(shift + log_min_p).to(tl.int64)
    reach = floor * 0 + LOWEST_ORDER
    top_p = ((top_p_high.to(tl.int64) << 32) | (top_p_low.to(tl.int64) & 0xFFFFFFFF)).to(tl.float64, bitcast=True)
    if BY_RANK or BY_MASS:
        spare = ((1 - top_p) * 0.9999 - 1e-6) * total  # with room for the rounding of float32 sums
        reach = lower_bound(peak, shift, group_mass, k, spare.to(tl.float32), BY_RANK, GROUP)
    if BY_FLOOR and not (BY_RANK and BY_MASS):  # top-p is a share of all that top-k keeps
        reach = tl.maximum(reach, floor)

    active = scratch + row * (groups + CAPACITY)
    is_active = ((order(peak) >= reach) & (peak > -INFINITY)).to(tl.int32)
    tl.store(active + tl.cumsum(is_active, 0) - is_active, group, mask=is_active != 0)
    all_length = tl.sum(is_active, 0) * GROUP
    tl.debug_barrier()  # other threads read what was written

    low = reach << TOKEN_BITS
    source = (logits + row * stride, vocab, bias, logit_scale, softcap, temperature, shift, active, groups)
    count = gather(source, all_length, low, HIGHEST_KEY, GROUP, CAPACITY)
    complete = count <= CAPACITY
    length = tl.where(complete, count, all_length)
    if BY_RANK:
        low, length, complete = cut(source, low, k, total + INFINITY, length, complete, count, GROUP, CAPACITY)
        length = tl.where(complete, length, all_length)
    if BY_MASS:
        kept = total
        if BY_RANK:
            counts, kept_masses = measure(source, length, complete, low + tl.zeros([1], tl.int64), GROUP)
            count = tl.sum(counts, 0)
            kept = tl.sum(kept_masses, 0)
        low, length, complete = cut(source, low, NO_TOKEN, top_p * kept, length, complete, count, GROUP, CAPACITY)
        length = tl.where(complete, length, all_length)
    if BY_FLOOR:
        low = tl.maximum(low, floor << TOKEN_BITS)

    its_sequence = tl.load(sequence + row).to(tl.uint32)
    its_position = tl.load(position + row).to(tl.uint32)
    kept_mass = total * 0
    score = shift * 0 - INFINITY
    best = count * 0
    for start in range(0, length, MEASURED):
        token, scaled, key, token_mass = candidates(source, start, length, complete, GROUP, MEASURED)
        kept_mass += tl.sum(tl.where(key >= low, token_mass, 0.0).to(tl.float64), 0)
        word = token_word(seed_low, seed_high, its_sequence, its_position, token)
        if tl.max(tl.where(key >= low, scaled + gumbel_bound(word), -INFINITY), 0) >= score:
            scores = tl.where(key >= low, scaled + gumbel(word), -INFINITY)
            highest = tl.max(scores, 0)
            first = tl.min(tl.where(scores == highest, token, NO_TOKEN), 0)
            wins = (highest > score) | ((highest == score) & (first < best))
            score = tl.where(wins, highest, score)
            best = tl.where(wins, first, best)

    product = tl.load(logits + row * stride + best)
    logit = head_logit(product, bias, best, best < vocab, logit_scale, softcap)
    drawn = tl.div_rn(logit, temperature)
    tl.store(out_token + row, best.to(tl.int64))
    tl.store(out_logprob + row, ((logit - top).to(tl.float64) - tl.log(mass)).to(tl.float32))
    tl.store(out_sampling_logprob + row, ((drawn - shift).to(tl.float64) - tl.log(kept_mass)).to(tl.float32))
    tl.store(out_kept_mass + row, tl.minimum(kept_mass / total, 1.0).to(tl.float32))


def variants(capability: int) -> list[Variant]:
    """The kernels at the vocabularies of the models that `pmc_fast` is measured on."""
    listed = []
    for model, vocab in {"SmolLM2": 49152, "Phi-1.5": 51200, "Llama-3.2-3B": 128256, "Gemma-3": 262208}.items():
        for dtype in ("fp32", "bf16", "fp16"):
            listed += _variants(f"{model}, {dtype}", vocab, dtype, {"bias": None, "logit_scale": None, "softcap": None})
    head = {"bias": "*bf16", "logit_scale": "fp32", "softcap": "fp32"}
    listed += _variants("Gemma-3's head with bias and scale, fp32 products", 262208, "fp32", head)
    return listed


def _variants(name: str, vocab: int, dtype: str, head: dict[str, str | None]) -> list[Variant]:
    given = {argument: kind for argument, kind in head.items() if kind is not None}
    absent = {argument: None for argument, kind in head.items() if kind is None}
    logits = {"logits": "*" + dtype, "stride": "i32", "vocab": "i32", **given}
    seed = {"seed_low": "i32", "seed_high": "i32", "sequence": "*i64", "position": "*i64"}
    parts = dict.fromkeys(("tops", "masses", "tempered_masses", "winners"), "*fp32") | {"tokens": "*i32"}
    out = {"out_token": "*i64"} | dict.fromkeys(("out_logprob", "out_sampling_logprob", "out_kept_mass"), "*fp32")
    out |= {"bad": "*i32", "first_row": "i32"}
    temper = {"temperature": "fp32", "inverse_temperature": "fp32"}
    group = group_size(vocab)
    groups = dict.fromkeys(("tops", "masses", "tempered_masses"), "*fp32") | {"groups": "i32"}
    aligned = ("logits", "stride", "vocab", *(argument for argument, kind in given.items() if kind.startswith("*")))
    listed = []
    for greedy in (False, True):
        listed.append(
            Variant(
                name=f"{'greedy' if greedy else 'draw'}, {name}",
                kernel=draw_kernel,
                signature=logits | temper | seed | parts | {"tiles": "i32"},
                constants=absent | {"GREEDY": greedy, "TEMPERED": not greedy, "TILE": TILE},
                num_warps=warps_for(TILE),
                num_stages=3,
                aligned=aligned,
            )
        )
    listed.append(
        Variant(
            name=f"finish the draw, {name}",
            kernel=finish_draw_kernel,
            signature=parts | {"tiles": "i32", "temperature": "fp32"} | seed | out,
            constants={"GREEDY": False, "TEMPERED": True, "TILES": triton.next_power_of_2(triton.cdiv(vocab, TILE))},
            num_warps=4,
            num_stages=3,
        )
    )
    listed.append(
        Variant(
            name=f"groups, {name}",
            kernel=group_kernel,
            signature=logits | {"inverse_temperature": "fp32"} | groups | {"tiles": "i32"},
            constants=absent | {"TEMPERED": True, "TILE": TILE, "GROUP": group},
            num_warps=warps_for(TILE),
            num_stages=3,
            aligned=aligned,
        )
    )
    for by_rank, by_mass, by_floor in (
        (True, True, True),
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ):
        listed.append(
            Variant(
                name=f"truncate{' top-k' * by_rank}{' top-p' * by_mass}{' min-p' * by_floor}, {name}",
                kernel=truncate_kernel,
                signature=logits
                | {"temperature": "fp32", "k": "i32", "top_p_low": "i32", "top_p_high": "i32", "log_min_p": "fp32"}
                | seed
                | groups
                | {"scratch": "*i32"}
                | out,
                constants=absent
                | {"TEMPERED": True, "BY_RANK": by_rank, "BY_MASS": by_mass, "BY_FLOOR": by_floor}
                | {"GROUP": group, "GROUPS": triton.next_power_of_2(triton.cdiv(vocab, group)), "CAPACITY": CAPACITY},
                num_warps=8 if triton.cdiv(vocab, group) <= 1024 else 16,
                num_stages=3,
                aligned=aligned,
            )
        )
    return listed
