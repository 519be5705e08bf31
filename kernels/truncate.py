"""Draws from the tokens that top-k, top-p and min-p keep of rows of logits."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.kernels.cut import (
    HIGHEST_KEY,
    LOWEST_ORDER,
    MEASURED,
    TOKEN_BITS,
    candidates,
    cut,
    gather,
    lower_bound,
    measure,
    order,
)
from pmc_fast.kernels.draw import NO_TOKEN, tile_for, warps_for
from pmc_fast.kernels.logits import INFINITY, Head, head_logit, is_distribution, mass_below
from pmc_fast.kernels.philox import gumbel, gumbel_bound, halves, token_word
from pmc_fast.kernels.sampling import DRAWS, Draws, Sampling, logits_variants
from pmc_fast.kernels.variant import Variant, absent, present

GROUP = 128  # tokens whose maximum and masses the truncation starts from
MOST_GROUPS = 2048  # of a row; groups are doubled until they are no more
CAPACITY = 4096  # gathered tokens of a row

GROUPS = dict.fromkeys(("tops", "masses", "tempered_masses"), "*fp32") | {"groups": "i32"}  # kinds of `Groups`


class Groups(NamedTuple):
    """What the groups of rows leave: float32 [rows, count] each; and how many groups a row has."""

    top: Tensor
    mass: Tensor
    tempered: Tensor
    count: int


def draw_truncated(logits: Tensor, head: Head, sampling: Sampling, draws: Draws) -> None:
    """`group_kernel` reads the logits once and leaves each group's maximum and masses, 12 bytes for GROUP tokens.

    `truncate_kernel`, a program per draw, finds from these a value that no kept token lies below (the k-th largest of the
    maxima; for top-p, the highest value below which the groups cannot hold 1 - p of the mass), reads only the groups that
    reach it, gathers the tokens at or above it, narrows the place of the cut among them, and draws. So R V s bytes for R
    rows, V tokens and s bytes a logit, and little more: for top-k, some k groups of a row. Gathered tokens beyond the
    buffer's CAPACITY (a flat distribution) are read again from those groups until the cut's bracket fits.
    """
    (rows, vocab), drawn = logits.shape, len(draws.token)
    group = group_size(vocab)
    tile = tile_for(vocab, group)
    tiles = triton.cdiv(vocab, tile)
    count = triton.cdiv(vocab, group)
    groups = Groups(*torch.empty(3, rows, count, dtype=torch.float32, device=logits.device), count)
    group_kernel[(rows * tiles,)](
        logits,
        logits.stride(0),
        vocab,
        *head,
        sampling.inverse_temperature,
        *groups,
        tiles,
        TEMPERED=sampling.tempered,
        TILE=tile,
        GROUP=group,
        num_warps=warps_for(tile),
    )
    by_rank = sampling.cuts_rank(vocab)
    truncate_kernel[(drawn,)](
        logits,
        sampling.logits_row,
        logits.stride(0),
        vocab,
        *head,
        sampling.temperature,
        sampling.top_k if by_rank else vocab,
        *halves(struct.unpack("<Q", struct.pack("<d", sampling.top_p))[0]),
        math.log(sampling.min_p) if sampling.min_p > 0 else 0.0,
        *sampling.noise(),
        *groups,
        torch.empty(drawn, count + CAPACITY, dtype=torch.int32, device=logits.device),
        *draws,
        TEMPERED=sampling.tempered,
        BY_RANK=by_rank,
        BY_MASS=sampling.top_p < 1,
        BY_FLOOR=sampling.min_p > 0,
        GROUP=group,
        GROUPS=triton.next_power_of_2(count),
        CAPACITY=CAPACITY,
        num_warps=row_warps(count),
    )


def group_size(vocab: int) -> int:
    size = GROUP
    while triton.cdiv(vocab, size) > MOST_GROUPS:
        size *= 2
    return size


def row_warps(groups: int) -> int:
    return 8 if groups <= 1024 else 16


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


@triton.jit(do_not_specialize=["k", "top_p_low", "top_p_high", "seed_low", "seed_high", "first_row"])
def truncate_kernel(
    logits,  # [rows, vocab]
    logits_row,  # int64 [draws], or None: of each draw its own
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
    sequence,  # int64 [draws]
    position,
    tops,  # this and the next two: [rows, groups]
    masses,
    tempered_masses,
    groups,
    scratch,  # int32 [draws, groups + CAPACITY]: the active groups, then gathered tokens
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
    its_row = row if logits_row is None else tl.load(logits_row + row)
    group = tl.arange(0, GROUPS)
    part = its_row * groups + group
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
    source = (logits + its_row * stride, vocab, bias, logit_scale, softcap, temperature, shift, active, groups)
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

    product = tl.load(logits + its_row * stride + best)
    logit = head_logit(product, bias, best, best < vocab, logit_scale, softcap)
    drawn = tl.div_rn(logit, temperature)
    tl.store(out_token + row, best.to(tl.int64))
    tl.store(out_logprob + row, ((logit - top).to(tl.float64) - tl.log(mass)).to(tl.float32))
    tl.store(out_sampling_logprob + row, ((drawn - shift).to(tl.float64) - tl.log(kept_mass)).to(tl.float32))
    tl.store(out_kept_mass + row, tl.minimum(kept_mass / total, 1.0).to(tl.float32))


def variants(capability: int) -> list[Variant]:
    """The kernels at the vocabularies of the models that `pmc_fast` is measured on, one of which has cuts of all kinds."""
    listed = []
    for logits in logits_variants():
        group = group_size(logits.vocab)
        tile = tile_for(logits.vocab, group)
        count = triton.cdiv(logits.vocab, group)
        listed.append(
            Variant(
                name=f"groups, {logits.name}",
                kernel=group_kernel,
                signature=logits.signature | {"inverse_temperature": "fp32"} | GROUPS | {"tiles": "i32"},
                constants=logits.constants | {"TEMPERED": True, "TILE": tile, "GROUP": group},
                num_warps=warps_for(tile),
                num_stages=3,
                aligned=logits.aligned,
            )
        )
        cuts = {"k": "i32", "top_p_low": "i32", "top_p_high": "i32", "log_min_p": "fp32"}
        sizes = {"GROUP": group, "GROUPS": triton.next_power_of_2(count), "CAPACITY": CAPACITY}
        used = [(True, True, True)]
        if logits.name.startswith("Llama-3.2-3B"):
            used += [(True, True, False), (True, False, False), (False, True, False), (False, False, True)]
        for by_rank, by_mass, by_floor in used:
            by = {"BY_RANK": by_rank, "BY_MASS": by_mass, "BY_FLOOR": by_floor}
            listed.append(
                Variant(
                    name=f"truncate{' top-k' * by_rank}{' top-p' * by_mass}{' min-p' * by_floor}, {logits.name}",
                    kernel=truncate_kernel,
                    signature=logits.signature
                    | present(logits.logits_row)
                    | {"temperature": "fp32"}
                    | cuts
                    | logits.noise
                    | GROUPS
                    | {"scratch": "*i32"}
                    | DRAWS,
                    constants=logits.constants | absent(logits.logits_row) | {"TEMPERED": True} | by | sizes,
                    num_warps=row_warps(count),
                    num_stages=3,
                    aligned=logits.aligned,
                )
            )
    return listed
