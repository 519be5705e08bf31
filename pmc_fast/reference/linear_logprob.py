"""Defines `linear_logprob`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmc_fast.reference import head


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int | None,
) -> tuple[Tensor, None]:
    return score("linear_logprob", hidden, weight, target, bias, softcap, logit_scale, temperature, ignore_index), None


def score(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int | None,
) -> Tensor:
    """The log-probabilities, for the op that errors name."""
    rows = _scored(target, ignore_index)
    logits = head.logits(hidden[rows], weight, bias, softcap, logit_scale)
    scaled = logits / temperature
    head.check_finite(op, scaled, rows)
    picked = scaled.log_softmax(-1).gather(1, target[rows, None])[:, 0]
    return torch.zeros(target.shape, dtype=picked.dtype, device=picked.device).index_copy(0, rows, picked)


def linear_logprob_ahead(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Also each row's gradient for hidden, [N, D] in the dtype of the log-probabilities; zeros in ignored rows."""
    logprob, _ = linear_logprob(hidden, weight, target, **options)
    gradient, _, _ = linear_logprob_backward(
        torch.ones_like(logprob),
        hidden.to(logprob.dtype),
        weight.to(logprob.dtype),
        target,
        None,
        needs=(True, False, False),
        **options,
    )
    return logprob, gradient


def linear_logprob_backward(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    _normalizer: Tensor | None,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of sum(upstream * linear_logprob(...)) that `needs` asks for: hidden, weight, bias."""
    rows = _scored(target, ignore_index)
    used = hidden[rows]
    logits = head.logits(used, weight, bias, softcap, logit_scale)
    onehot = torch.nn.functional.one_hot(target[rows], weight.shape[0])
    grad_logits = (onehot - (logits / temperature).softmax(-1)) * (upstream[rows, None] / temperature)
    gradients = head.gradients(grad_logits, logits, used, weight, softcap, logit_scale, needs)
    d_used, d_weight, d_bias = (None if g is None else g.to(hidden.dtype) for g in gradients)
    d_hidden = None if d_used is None else torch.zeros_like(hidden).index_copy(0, rows, d_used)
    return d_hidden, d_weight, d_bias


def _scored(target: Tensor, ignore_index: int | None) -> Tensor:
    """The numbers of the rows that are not left out."""
    if ignore_index is None:
        return torch.arange(len(target), device=target.device)
    return (target != ignore_index).nonzero()[:, 0]
