"""`collapse_loss` on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.gpu.cross_entropy import labelled_rows
from pmc_fast.kernels.cross_entropy import cross_entropy


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
    token_nll, gradients = cross_entropy(
        "collapse_loss",
        hidden,
        weight,
        target,
        token_weight,
        rows=labelled_rows(target, ignore_index),
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=1.0,
        needs=needs,
    )
    return torch.dot(token_weight, token_nll), token_nll, *gradients
