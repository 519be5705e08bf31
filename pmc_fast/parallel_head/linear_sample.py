"""`linear_sample` with a head whose vocabulary is shared out among ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pmc_fast.ops import Sample, _checks
from pmc_fast.ops.sample import coordinates
from pmc_fast.parallel_head.head import check_finite, local_head
from pmc_fast.parallel_head.shards import VocabShards, shards_of
from pmc_fast.philox import gumbel
from pmc_fast.reference import head

_DIGIT = 8  # bits of a float's order that one histogram settles


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
) -> Sample:
    """Draw one token per hidden state under an output head of which each rank holds a part.

    Equivalent to ``pmc_fast.linear_sample(hidden, torch.cat(weights of all ranks), ...)``: the same tokens, since noise
    belongs to token ids (near-ties of floating point aside). Ranks exchange maxima, masses, histograms of 256 buckets and
    winners, never logits. All ranks of the group call it with the same arguments but for weight and bias.

    Args:
        hidden: float32, bfloat16 or float16 [N, D], the same on every rank.
        weight: this rank's rows of the head, [V_r, D], dtype of hidden; or a DTensor [V, D] sharded on dimension 0.
        shards: which rows these are, ``VocabShards.of(weight, group)``; may be left out for a DTensor.
        bias: this rank's part [V_r], or a DTensor [V] sharded like weight, dtype of hidden; or None.
        softcap, logit_scale: as in ``pmc_fast.linear_sample``.
        temperature, top_k, top_p, min_p, seed, sequence, position: as in ``pmc_fast.sample``.

    Returns:
        The same on every rank.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or range; logits that are NaN or +inf, on any rank.

    Source: arXiv 2507.04219, section 4 (sampling); Philox noise as in ``pmc_fast.philox.gumbel``.
    """
    shards = shards_of(weight, shards)
    weight, bias = local_head(shards, hidden, weight, bias, softcap, logit_scale)
    _checks.sampling(temperature, top_k, top_p, min_p, seed)
    _checks.coordinates(sequence, position, hidden)
    sequence, position = coordinates(hidden, sequence, position)

    logits = head.logits(hidden, weight, bias, softcap, logit_scale).float()
    mass = shards.gather(logits.double().logsumexp(-1)).logsumexp(0)
    check_finite("linear_sample", mass)
    if temperature == 0:
        token, (logit,) = _winner(shards, logits, logits)
        ones = torch.ones_like(mass)
        return Sample(token, (logit - mass).float(), (0 * ones).float(), ones.float())

    scaled = logits / temperature
    top = shards.gather(scaled.amax(-1)).amax(0)
    check_finite("linear_sample", top)
    masses = (scaled.double() - top[:, None]).exp()
    total = _total(shards, masses)
    kept = torch.ones_like(scaled, dtype=torch.bool)
    if top_k is not None:
        kept = _largest(shards, scaled, kept.double(), torch.full_like(total, top_k))
    if top_p < 1:
        remaining = masses * kept
        kept &= _largest(shards, scaled, remaining, top_p * _total(shards, remaining))
    if min_p > 0:
        kept &= scaled >= top[:, None] + torch.tensor(math.log(min_p), dtype=torch.float32)
    kept_mass = _total(shards, masses * kept)

    noise = gumbel(seed, sequence, position, len(weight), begin=shards.begin)
    score = (scaled + noise).masked_fill(~kept, -math.inf)
    token, (logit, scaled_logit) = _winner(shards, score, logits, scaled)
    sampling_logprob = scaled_logit - top.double() - kept_mass.log()
    return Sample(token, (logit - mass).float(), sampling_logprob.float(), (kept_mass / total).float())


def _total(shards: VocabShards, values: Tensor) -> Tensor:
    """Each row's sum over the whole vocabulary."""
    return shards.gather(values.sum(-1)).sum(0)


def _winner(shards: VocabShards, score: Tensor, *values: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The token of the highest score over the whole vocabulary, the lowest id on ties, and its values as float64."""
    index = torch.arange(score.shape[1], device=score.device)
    local = torch.where(score == score.amax(-1, keepdim=True), index, score.shape[1]).amin(-1)[:, None]
    parts = [score.gather(1, local), local + shards.begin, *(v.gather(1, local) for v in values)]
    ranks = shards.gather(torch.cat([part.double() for part in parts], 1))  # [ranks, N, 2 + values]
    best = ranks[:, :, 0].amax(0)
    rank = (ranks[:, :, 0] == best).int().cumsum(0).eq(0).sum(0)  # the first that has it
    token, *picked = ranks[rank, torch.arange(len(rank), device=rank.device), 1:].unbind(-1)
    return token.long(), tuple(picked)


def _largest(shards: VocabShards, values: Tensor, weights: Tensor, quota: Tensor) -> Tensor:
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
        # The lowest digit with weight that is not past the quota; the sums only grow towards lower digits.
        lowest = ((higher < quota[:, None]) & (histogram > 0)).int().argmax(1, keepdim=True)
        above = higher.gather(1, lowest)[:, 0]
        edge += lowest << shift
    tied = key == edge
    tied_weights = weights * tied
    ranks = shards.gather(tied_weights.sum(-1))
    rank = torch.distributed.get_rank(shards.group)
    before = (above + ranks[:rank].sum(0))[:, None] + tied_weights.cumsum(1) - tied_weights
    return (key > edge) | (tied & (before < quota[:, None]))


def _ordered(values: Tensor) -> Tensor:
    """int64 in [0, 2^32) in the order of the float32 values; -0 and 0 are the same."""
    bits = (values + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, ~bits & 0xFFFFFFFF, bits + 2**31)
