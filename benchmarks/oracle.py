"""Float64 answers that contestants are judged by, a slice of the vocabulary at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_SLICE = 8192


@dataclass(frozen=True)
class HeadGradients:
    """Of sum_i token_weight_i * nll_i: `nll` and `hidden` in float64; `weight`, which is large, rounded to float32."""

    nll: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


def head_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    token_weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> HeadGradients:
    """nll = cross_entropy(linear(hidden, weight, bias), target, reduction="none"), and the gradients of its weighted sum.

    hidden [N, D], weight [V, D], target [N], token_weight [N], bias [V] or None; computed in float64.
    """
    x = hidden.detach().double()
    rows = torch.arange(len(x), device=x.device)
    token_weight = token_weight.double()

    def logits(start: int) -> tuple[torch.Tensor, torch.Tensor]:
        part = weight.detach()[start : start + _SLICE].double()
        out = x @ part.T
        return part, out if bias is None else out + bias.detach()[start : start + _SLICE].double()

    starts = range(0, len(weight), _SLICE)
    total = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    chosen = torch.zeros_like(total)
    for start in starts:
        _, part = logits(start)
        total = torch.logaddexp(total, part.logsumexp(dim=1))
        here = (target >= start) & (target < start + part.shape[1])
        chosen[here] = part[rows[here], target[here] - start]

    d_hidden = torch.zeros_like(x)
    d_weight = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
    d_bias = None if bias is None else torch.empty(bias.shape, dtype=torch.float32, device=x.device)
    for start in starts:
        matrix, part = logits(start)
        gradient = (part - total[:, None]).exp_()
        here = (target >= start) & (target < start + part.shape[1])
        gradient[rows[here], target[here] - start] -= 1
        gradient *= token_weight[:, None]
        d_hidden += gradient @ matrix
        d_weight[start : start + _SLICE] = gradient.T @ x
        if d_bias is not None:
            d_bias[start : start + _SLICE] = gradient.sum(dim=0)
    return HeadGradients(total - chosen, d_hidden, d_weight, d_bias)


def head_logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """linear(hidden, weight, bias) in float64 [N, V]."""
    x = hidden.double()
    parts = [x @ part.double().T for part in weight.split(_SLICE)]
    logits = torch.cat(parts, dim=1)
    return logits if bias is None else logits + bias.double()


@dataclass(frozen=True)
class Truncated:
    """The distribution really drawn from, float64 [N, V], 0 outside the kept set; and the kept set with its edge blurred."""

    probability: torch.Tensor
    allowed: torch.Tensor


def truncated(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    logit_slack: float = 1e-4,
) -> Truncated:
    """softmax(logits / temperature), cut by top-k, top-p and min-p in that order, renormalised at the end.

    top-p keeps a token while the mass of the more probable ones is below p. A token at the very edge may fall on either
    side in another arithmetic: `allowed` has those up to `logit_slack` below the least logit kept, and those up to as
    great a share of mass above p. Temperature 0 is the most probable token alone, the first of several.
    """
    if temperature == 0:
        temperature, top_k = 1.0, 1
    order = logits.double().sort(dim=1, descending=True, stable=True)
    probability = (order.values / temperature).softmax(dim=1)
    if top_k is not None:
        probability[:, top_k:] = 0
        probability /= probability.sum(dim=1, keepdim=True)
    before = probability.cumsum(dim=1) - probability

    def cut(top_p: float) -> torch.Tensor:
        return (probability > 0) & (before < top_p) & (probability >= min_p * probability[:, :1])

    kept = torch.where(cut(top_p), probability, 0.0)
    kept /= kept.sum(dim=1, keepdim=True)
    least = torch.where(cut(top_p + logit_slack), order.values, math.inf).amin(dim=1, keepdim=True)
    return Truncated(torch.zeros_like(kept).scatter_(1, order.indices, kept), logits.double() >= least - logit_slack)


def surprise_of_counts(counts: torch.Tensor, probability: torch.Tensor, allowed: torch.Tensor) -> float:
    """How many standard deviations the chi-squared statistic of `counts` [V] lies above what `probability` [V] predicts.

    Tokens expected fewer than 5 times are taken together, with the least likely of the others where that is not yet 5,
    for one draw of a cell that hardly expects any is no large deviation. Infinite when a token was drawn that is not `allowed` [V];
    draws of one allowed at the blurred edge, of probability 0, are left out.
    """
    if bool((counts[~allowed] > 0).any()):
        return math.inf
    counts = torch.where(probability > 0, counts, 0)
    expected, order = (probability * counts.sum()).sort()
    counts = counts[order].double()
    rare = max(int((expected < 5).sum()), int((expected.cumsum(0) < 5).sum()) + 1)
    want, got = (torch.cat([x[:rare].sum()[None], x[rare:]]) for x in (expected, counts))
    free = len(want) - 1
    if free < 1:
        return 0.0
    statistic = float(((got - want) ** 2 / want).sum())
    # Wilson and Hilferty: the cube root of chi-squared over its degrees of freedom is nearly normal
    return ((statistic / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))
