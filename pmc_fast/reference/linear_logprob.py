"""Defines `linear_logprob`."""

from __future__ import annotations

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
    rows = _scored(target, ignore_index)
    logits = head.logits(hidden[rows], weight, bias, softcap, logit_scale)
    scaled = logits / temperature
    head.check_finite("linear_logprob", scaled, rows)
    picked = scaled.log_softmax(-1).gather(1, target[rows, None])[:, 0]
    return torch.zeros(target.shape, dtype=picked.dtype, device=picked.device).index_copy(0, rows, picked), None


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
    d_used, d_weight, d_bias = head.gradients(grad_logits, logits, used, weight, bias, softcap, logit_scale)
    d_hidden = torch.zeros_like(hidden).index_copy(0, rows, d_used.to(hidden.dtype))
    return (
        d_hidden if needs[0] else None,
        d_weight.to(weight.dtype) if needs[1] else None,
        d_bias.to(bias.dtype) if needs[2] else None,
    )


def _scored(target: Tensor, ignore_index: int | None) -> Tensor:
    """The numbers of the rows that are not left out."""
    if ignore_index is None:
        return torch.arange(len(target), device=target.device)
    return (target != ignore_index).nonzero()[:, 0]
