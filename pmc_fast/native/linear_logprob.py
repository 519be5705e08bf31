"""`linear_logprob` on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.native.cross_entropy import Gradients, cross_entropy


def linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor, **options) -> tuple[Tensor, None]:
    unused = torch.zeros(target.shape, dtype=torch.float32)
    token_nll, _ = cross_entropy(
        "linear_logprob", hidden, weight, target, unused, needs=(False, False, False), **options
    )
    return -token_nll, None


def linear_logprob_backward(
    upstream: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, _normalizer: Tensor, **options
) -> Gradients:
    """The gradients of sum(upstream * linear_logprob(...)); the logits are computed again."""
    _, gradients = cross_entropy("linear_logprob", hidden, weight, target, -upstream.float(), **options)
    return gradients
