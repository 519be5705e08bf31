"""Defines `collapse_loss`."""

from __future__ import annotations

from torch import Tensor

from pmc_fast.reference.linear_logprob import linear_logprob_backward, score


def collapse_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int | None,
    needs: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss, each token's nll, and the gradients of the loss that `needs` asks for: hidden, weight, bias."""
    options = {
        "bias": bias,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": 1.0,
        "ignore_index": ignore_index,
    }
    token_nll = -score("collapse_loss", hidden, weight, target, **options)
    gradients: tuple = (None, None, None)
    if any(needs):
        gradients = linear_logprob_backward(-token_weight, hidden, weight, target, None, needs=needs, **options)
    return (token_weight * token_nll).sum(), token_nll, *gradients
