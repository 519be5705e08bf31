"""`linear_sample` with a head whose vocabulary is shared out among ranks.

Of a truncated draw a rank first finds the few tokens that could be kept: all that follows, noise too, is about these alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pmc_fast import backend
from pmc_fast.ops import Sample, _checks
from pmc_fast.ops._autocast import outside_autocast
from pmc_fast.ops.sample import coordinates
from pmc_fast.parallel_head.head import check_finite, local_head
from pmc_fast.parallel_head.shards import VocabShards, shards_of
from pmc_fast.philox import gumbel, gumbel_of
from pmc_fast.reference import head

_DIGIT = 8  # bits of a float's order that one histogram settles
_FEW = 2**_DIGIT  # candidates of a rank's row that are exchanged as they are: more are counted in histograms as large
_BLOCK = 32  # tokens


@torch.no_grad()
def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    shards: VocabShards | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    sequence: Tensor | None = None,
    position: Tensor | None = None,
    hidden_row: Tensor | None = None,
) -> Sample:
    """Draw one token per hidden state under an output head of which each rank holds a part.

    Equivalent to ``pmc_fast.linear_sample(hidden, torch.cat(weights of all ranks), ...)``: the same tokens, since noise
    belongs to token ids (near-ties of floating point aside). Ranks exchange maxima, masses, winners and, to truncate, up to 256
    candidates of a row each, or histograms of 256 buckets. All ranks of the group call it with the same arguments but for
    weight and bias. No gradients, as of ``pmc_fast.linear_sample``.

    Args:
        hidden: float32, bfloat16 or float16 [N, D], the same on every rank; with hidden_row, [R, D].
        weight: this rank's rows of the head, [V_r, D], dtype of hidden; or a DTensor [V, D] sharded on dimension 0.
        shards: which rows these are, ``VocabShards.of(weight, group)``; may be left out for a DTensor.
        bias: this rank's part [V_r], or a DTensor [V] sharded like weight, dtype of hidden; or None.
        softcap, logit_scale: as in ``pmc_fast.linear_sample``.
        temperature, top_k, top_p, min_p, seed, sequence, position: as in ``pmc_fast.sample``.
        hidden_row: int64 [N] in [0, R), the hidden state that each draw is from, or None; the same on every rank.

    Returns:
        The same on every rank.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or range; logits that are NaN or +inf, on any rank.

    Source: arXiv 2507.04219, section 4 (sampling); Philox noise as in ``pmc_fast.philox.gumbel``.
    """
    shards = shards_of(weight, shards)
    weight, bias = local_head(shards, hidden, weight, bias, softcap, logit_scale)
    _checks.sampling(temperature, top_k, top_p, min_p, seed)
    seed = int(seed)  # one of NumPy's overflows where its bits are masked
    rows = hidden if hidden_row is None else hidden_row
    if hidden_row is not None:
        _checks.tensor("hidden_row", hidden_row)
        _checks.vector("hidden_row", hidden_row, hidden_row.numel(), torch.int64, hidden)
        _checks.within("hidden_row", hidden_row, len(hidden))
    _checks.coordinates(sequence, position, rows)
    sequence, position = coordinates(rows, sequence, position)

    logits = outside_autocast(head.logits)(hidden, weight, bias, softcap, logit_scale).float()
    logits = logits if hidden_row is None else logits[hidden_row]
    top = shards.gather(logits.amax(-1)).amax(0)
    shift = top if temperature == 0 else top / temperature
    check_finite("linear_sample", shift)
    mass = _mass(shards, logits, top)
    normalizer = top.double() + mass.log()
    if temperature == 0:
        token = _first_of(logits, logits.amax(-1, keepdim=True))
        token, logit = _winner(shards, token, *[logits.gather(1, token)] * 2)
        ones = torch.ones_like(mass)
        return Sample(token, (logit - normalizer).float(), (0 * ones).float(), ones.float())

    scaled = logits if temperature == 1 else logits / temperature
    total = mass if temperature == 1 else _mass(shards, scaled, shift)
    if top_k is None and top_p == 1 and min_p == 0:
        kept_mass = total
        token, score = _best(shards, logits, scaled, temperature, seed, sequence, position)
    else:
        token, candidate = _candidates(shards, scaled, shift, total, top_k, top_p, min_p)
        token, candidate, holders = _exchanged(shards, token, candidate)
        kept = candidate > -math.inf
        if top_k is not None:
            kept &= _largest(holders, candidate, kept.double(), torch.full_like(total, top_k))
        masses = (candidate.double() - shift[:, None]).exp()
        if top_p < 1:
            remaining = masses * kept
            left = total if top_k is None else _total(holders, remaining)
            kept &= _largest(holders, candidate, remaining, top_p * left)
        if min_p > 0:
            kept &= candidate >= _floor(shift, min_p)[:, None]
        kept_mass = _total(holders, masses * kept)
        noise = gumbel_of(seed, sequence, position, token)
        score = (candidate + noise).masked_fill(~kept, -math.inf)
        winner = _first_of(score, score.amax(-1, keepdim=True))
        token, score = token.gather(1, winner), score.gather(1, winner)
        mine = (token >= shards.begin) & (token < shards.end)
        token, score = torch.where(mine, token - shards.begin, 0), score.masked_fill(~mine, -math.inf)
    token, logit, scaled_logit = _winner(shards, token, score, logits.gather(1, token), scaled.gather(1, token))
    sampling_logprob = scaled_logit - shift.double() - kept_mass.log()
    kept_share = (kept_mass / total).clamp(max=1)
    return Sample(token, (logit - normalizer).float(), sampling_logprob.float(), kept_share.float())


def _mass(shards: VocabShards, values: Tensor, top: Tensor) -> Tensor:
    """Each row's sum of exp(values - top) over the whole vocabulary, float64 [N]."""
    return _total(shards, (values - top[:, None]).exp_())


def _total(shards: VocabShards | type[_Alone], values: Tensor) -> Tensor:
    """Each row's sum over the whole vocabulary, float64 [N]."""
    return shards.gather(values.sum(-1).double()).sum(0)


def _floor(shift: Tensor, min_p: float) -> Tensor:
    """What a token reaches at least that min-p keeps, float32 [N]."""
    return shift + torch.tensor(math.log(min_p), dtype=torch.float32)


def _candidates(
    shards: VocabShards,
    scaled: Tensor,
    shift: Tensor,
    total: Tensor,
    top_k: int | None,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor]:
    """This rank's tokens that truncation might keep, in order, and their scaled logits, -inf after the last: [N, C]."""
    if top_k is not None:
        floor = _reached(scaled, min(top_k, scaled.shape[1]))
    elif top_p < 1:  # what lies below holds less than 1 - top_p of the mass together, all ranks' tokens included
        floor = (shift + ((1 - top_p) / shards.vocab * total).log()).float() - 1e-3
    else:
        floor = _floor(shift, min_p)
    row, index = (scaled >= floor[:, None]).nonzero().unbind(1)
    count = row.bincount(minlength=len(scaled))
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    size = len(scaled), max([1, *count.tolist()])
    token, candidate = index.new_zeros(size), scaled.new_full(size, -math.inf)
    token[row, place], candidate[row, place] = index, scaled[row, index]
    return token + shards.begin, candidate


def _reached(values: Tensor, count: int) -> Tensor:
    """A number for each row that at least `count` of its values reach, and not many more."""
    blocks = values.shape[1] // _BLOCK
    if blocks >= count:  # their maxima are so many values, and quickly searched
        values = values[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK)).amax(-1)
    return values.topk(count).values[:, -1]


class _Alone:
    """In the place of shards, once every rank holds all ranks' candidates."""

    rank = 0

    @staticmethod
    def gather(values: Tensor) -> Tensor:
        return values[None]


def _exchanged(
    shards: VocabShards, token: Tensor, candidate: Tensor
) -> tuple[Tensor, Tensor, VocabShards | type[_Alone]]:
    """All ranks' candidates, in order, and _Alone, if each rank has few; otherwise this rank's, and shards."""
    width = int(shards.gather(torch.tensor(token.shape[1], device=token.device)).amax())
    if width > _FEW:
        return token, candidate, shards
    missing = (0, width - token.shape[1])
    both = torch.stack([F.pad(token, missing).double(), F.pad(candidate.double(), missing, value=-math.inf)])
    token, candidate = shards.gather(both).permute(1, 2, 0, 3).flatten(2)  # [2, N, ranks * width]
    return token.long(), candidate.float(), _Alone


def _best(
    shards: VocabShards,
    logits: Tensor,
    scaled: Tensor,
    temperature: float,
    seed: int,
    sequence: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    """This rank's token of the highest score among all, and the score: [N, 1]."""
    if backend.choose("sample", None, logits.device.type, logits.dtype) != "native":
        score = scaled + gumbel(seed, sequence, position, logits.shape[1], begin=shards.begin)
        best = score.amax(-1, keepdim=True)
        return _first_of(score, best), best
    from pmc_fast.native.sample import sample

    nothing = scaled.amax(-1, keepdim=True) == -math.inf  # a row of which other ranks hold the likely tokens
    logits = torch.where(nothing, 0.0, logits) if nothing.any() else logits
    before = shards.begin % 4  # the kernel makes noise for four tokens at a time
    token = sample(
        F.pad(logits, (before, 0), value=-math.inf) if before else logits,
        temperature=temperature,
        top_k=None,
        top_p=1.0,
        min_p=0.0,
        seed=seed,
        sequence=sequence,
        position=position,
        op="linear_sample",
        first_token=shards.begin - before,
    )[0][:, None]
    token -= before
    score = scaled.gather(1, token) + gumbel_of(seed, sequence, position, token + shards.begin)
    return token, score


def _first_of(values: Tensor, wanted: Tensor) -> Tensor:
    """The first place in each row of the value wanted [N, 1], [N, 1]."""
    return (values == wanted).int().argmax(-1, keepdim=True)


def _winner(shards: VocabShards, token: Tensor, score: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Of the ranks' tokens [N, 1] that of the highest score, the lowest id on ties, and its values as float64: [N] each."""
    parts = [score, token + shards.begin, *values]
    ranks = shards.gather(torch.cat([part.double() for part in parts], 1))  # [ranks, N, 2 + values]
    best = ranks[:, :, 0].amax(0)
    rank = (ranks[:, :, 0] == best).int().argmax(0)  # the first that has it
    token, *picked = ranks[rank, torch.arange(len(rank), device=rank.device), 1:].unbind(-1)
    return token.long(), *picked


def _largest(shards: VocabShards | type[_Alone], values: Tensor, weights: Tensor, quota: Tensor) -> Tensor:
    """Marks each row's largest values, ties by lower token id, until their weights reach the quota.

    A token is kept if the weights of those before it in that order sum to less than the quota. The value at which the
    sum gets there is found a digit at a time, as in a radix sort, from histograms that the ranks add up.

    Args:
        values: float32 [N, V_r].
        weights: float64 [N, V_r], at least 0.
        quota: float64 [N].
    """
    key = _ordered(values)
    edge = torch.zeros(len(values), 1, dtype=torch.int64, device=values.device)
    above = torch.zeros(
        len(values), dtype=torch.float64, device=values.device
    )  # the weight of all values above the edge
    for shift in range(32 - _DIGIT, -1, -_DIGIT):
        undecided = key >> (shift + _DIGIT) == edge >> (shift + _DIGIT)
        digit = key >> shift & 2**_DIGIT - 1
        histogram = torch.zeros(len(values), 2**_DIGIT, dtype=torch.float64, device=values.device)
        histogram = shards.gather(histogram.scatter_add_(1, digit, weights * undecided)).sum(0)
        higher = histogram.flip(1).cumsum(1).flip(1) - histogram + above[:, None]
        # The lowest digit that is not past the quota; the sums only grow towards lower digits.
        lowest = (higher < quota[:, None]).int().argmax(1, keepdim=True)
        above = higher.gather(1, lowest)[:, 0]
        edge += lowest << shift
    tied = key == edge
    tied_weights = weights * tied
    ranks = shards.gather(tied_weights.sum(-1))
    before = (above + ranks[: shards.rank].sum(0))[:, None] + tied_weights.cumsum(1) - tied_weights
    return (key > edge) | (tied & (before < quota[:, None]))


def _ordered(values: Tensor) -> Tensor:
    """int64 in [0, 2^32) in the order of the float32 values; -0 and 0 are the same."""
    bits = (values + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, ~bits & 0xFFFFFFFF, bits + 2**31)
