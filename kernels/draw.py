"""Draws from whole rows of logits: a winner for each tile of a row, then of each row's tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.kernels.logits import INFINITY, Head, head_logit, is_distribution, mass_below
from pmc_fast.kernels.philox import gumbel, gumbel_bound, tile_words, token_word
from pmc_fast.kernels.sampling import DRAWS, Draws, Sampling, logits_variants
from pmc_fast.kernels.variant import Variant, absent, present

TILE = 4096  # tokens that a program of a first pass reads
SMALLEST_TILE = 128

LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
NO_TOKEN = tl.constexpr(2**31 - 1)

PARTS = dict.fromkeys(("tops", "masses", "tempered_masses", "winners"), "*fp32")  # the kinds of `Parts`, for variants
PARTS |= {"tokens": "*i32", "tiles": "i32"}


class Parts(NamedTuple):
    """What the tiles of rows leave: float32 [rows, tiles] each, the token int32; and how many tiles a row has."""

    top: Tensor
    mass: Tensor
    tempered: Tensor
    logit: Tensor
    token: Tensor
    tiles: int

    @classmethod
    def empty(cls, rows: int, tiles: int, device: torch.device) -> Parts:
        values = torch.empty(4, rows, tiles, dtype=torch.float32, device=device)
        return cls(*values, torch.empty(rows, tiles, dtype=torch.int32, device=device), tiles)


def draw_from_all(logits: Tensor, head: Head, sampling: Sampling, draws: Draws) -> None:
    """Nothing truncated, or greedy.

    `draw_kernel` reads the logits once, a program per tile of a row, and leaves each tile's maximum, its masses and its
    winner; `finish_draw_kernel` reduces those. R V s bytes for R rows, V tokens and s bytes a logit, and 20 bytes a tile.
    """
    rows, vocab = len(draws.token), logits.shape[1]
    tile = tile_for(vocab, SMALLEST_TILE)
    parts = Parts.empty(rows, triton.cdiv(vocab, tile), logits.device)
    draw_kernel[(rows * parts.tiles,)](
        logits,
        sampling.logits_row,
        logits.stride(0),
        vocab,
        *head,
        sampling.temperature,
        sampling.inverse_temperature,
        *sampling.noise(),
        *parts,
        GREEDY=sampling.greedy,
        TEMPERED=sampling.tempered,
        TILE=tile,
        num_warps=warps_for(tile),
    )
    finish_draw(parts, sampling, draws)


def finish_draw(parts: Parts, sampling: Sampling, draws: Draws) -> None:
    """From each tile's winner the row's, and its log-probabilities."""
    finish_draw_kernel[(len(draws.token),)](
        *parts,
        sampling.temperature,
        *sampling.noise(),
        *draws,
        GREEDY=sampling.greedy,
        TEMPERED=sampling.tempered,
        TILES=triton.next_power_of_2(parts.tiles),
        num_warps=4,
    )


def tile_for(vocab: int, least: int) -> int:
    return min(TILE, max(least, triton.next_power_of_2(vocab)))


def warps_for(tile: int) -> int:
    return min(8, max(1, tile // 512))


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
def store_part(parts, part, inside, values):
    """What `draw_from_tile` returns, to where the tile's and rows' place is; `inside` masks the rows, or is None."""
    for i in tl.static_range(len(values)):
        tl.store(parts[i] + part, values[i], mask=inside)


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
    logits_row,  # int64 [draws], or None: of each draw its own
    stride,  # of its rows
    vocab,
    bias,
    logit_scale,
    softcap,
    temperature,
    inverse_temperature,
    seed_low,
    seed_high,
    sequence,  # int64 [draws]
    position,
    tops,  # this and what follows: [draws, tiles]
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
    its_row = row if logits_row is None else tl.load(logits_row + row)
    product = tl.load(logits + its_row * stride + token, mask=token < vocab, other=0)
    logit = head_logit(product, bias, token, token < vocab, logit_scale, softcap)
    only = tl.zeros([1], tl.int64)
    its_sequence = tl.load(sequence + row + only).to(tl.uint32)
    its_position = tl.load(position + row + only).to(tl.uint32)
    words = None if GREEDY else tile_words(seed_low, seed_high, its_sequence, its_position, first, TILE)
    top, mass, tempered, winner, best = draw_from_tile(
        logit[:, None], token, words, temperature, inverse_temperature, GREEDY, TEMPERED
    )
    parts = (tops, masses, tempered_masses, winners, tokens)
    store_part(parts, tl.program_id(0) + only, None, (top, mass, tempered, winner, best))


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


def variants(capability: int) -> list[Variant]:
    """The kernels at the vocabularies of the models that `pmc_fast` is measured on."""
    listed = []
    for logits in logits_variants():
        tile = tile_for(logits.vocab, SMALLEST_TILE)
        temper = {"temperature": "fp32", "inverse_temperature": "fp32"}
        for greedy in (False, True):
            listed.append(
                Variant(
                    name=f"{'greedy' if greedy else 'draw'}, {logits.name}",
                    kernel=draw_kernel,
                    signature=logits.signature | present(logits.logits_row) | temper | logits.noise | PARTS,
                    constants=logits.constants
                    | absent(logits.logits_row)
                    | {"GREEDY": greedy, "TEMPERED": not greedy, "TILE": tile},
                    num_warps=warps_for(tile),
                    num_stages=3,
                    aligned=logits.aligned,
                )
            )
        tiles = triton.next_power_of_2(triton.cdiv(logits.vocab, tile))
        listed.append(
            Variant(
                name=f"finish the draw, {logits.name}",
                kernel=finish_draw_kernel,
                signature=PARTS | {"temperature": "fp32"} | logits.noise | DRAWS,
                constants={"GREEDY": False, "TEMPERED": True, "TILES": tiles},
                num_warps=4,
                num_stages=3,
            )
        )
    return listed
