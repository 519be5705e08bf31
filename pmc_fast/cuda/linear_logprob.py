"""`linear_logprob`: products by torch, rows by csrc/cuda/cross_entropy.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.cuda.cross_entropy import cross_entropy
from pmc_fast.gpu.cross_entropy import Gradients, labelled_rows


def linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor, *, ignore_index: int | None, **options) -> Tensor:
    unused = torch.zeros(target.shape, dtype=torch.float32, device=target.device)
    rows = labelled_rows(target, ignore_index)
    token_nll, _ = cross_entropy(
        "linear_logprob", hidden, weight, target, unused, rows=rows, needs=(False, False, False), **options
    )
    return -token_nll


def linear_logprob_backward(
    upstream: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, *, ignore_index: int | None, **options
) -> Gradients:
    """The gradients of sum(upstream * linear_logprob(...)); the logits are computed again."""
    rows = labelled_rows(target, ignore_index)
    _, gradients = cross_entropy("linear_logprob", hidden, weight, target, -upstream.float(), rows=rows, **options)
    return gradients
