"""`collapse_loss` on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.native.cross_entropy import cross_entropy


def collapse_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, token_weight: Tensor, **options
) -> tuple[Tensor, ...]:
    token_nll, gradients = cross_entropy(
        "collapse_loss", hidden, weight, target, token_weight, **options
    )
    return torch.dot(token_weight, token_nll), token_nll, *gradients
