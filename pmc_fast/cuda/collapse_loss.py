"""`collapse_loss`: products by torch, rows by csrc/cuda/cross_entropy.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.cuda.cross_entropy import cross_entropy
from pmc_fast.gpu.cross_entropy import labelled_rows


def collapse_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, token_weight: Tensor, *, ignore_index: int | None, **options
) -> tuple[Tensor, ...]:
    rows = labelled_rows(target, ignore_index)
    token_nll, gradients = cross_entropy(
        "collapse_loss", hidden, weight, target, token_weight, rows=rows, temperature=1.0, **options
    )
    return torch.dot(token_weight, token_nll), token_nll, *gradients
