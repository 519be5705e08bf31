"""Defines `collapse_loss`."""

from __future__ import annotations

from torch import Tensor

from pmc_fast.reference.linear_logprob import linear_logprob, linear_logprob_backward


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
    head = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index}
    logprob, normalizer = linear_logprob(hidden, weight, target, temperature=1.0, **head)
    token_nll = -logprob
    gradients: tuple = (None, None, None)
    if any(needs):
        gradients = linear_logprob_backward(
            -token_weight, hidden, weight, target, normalizer, temperature=1.0, needs=needs, **head
        )
    return (token_weight * token_nll).sum(), token_nll, *gradients
