"""`collapse_loss` with a head whose vocabulary is shared out among ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.ops import CollapseLoss, _checks
from pmc_fast.parallel_head.linear_logprob import score
from pmc_fast.parallel_head.shards import VocabShards


def collapse_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    *,
    shards: VocabShards | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
) -> CollapseLoss:
    """Weighted sum of the targets' negative log-likelihoods, under an output head of which each rank holds a part.

    Equivalent to ``pmc_fast.collapse_loss(hidden, torch.cat(weights of all ranks), target, token_weight, ...)``. Here
    no gradient is known before all ranks' masses are: a rank keeps its logits for the backward pass, or makes them again where
    they are more than 2^25.

    Args:
        token_weight: float32 (float64 if hidden is) [N], the same on every rank.
        The others: as in ``pmc_fast.parallel.linear_logprob``.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or range; weights or logits that are not finite.

    Source: arXiv 2507.04219, equation 1.
    """
    _checks.matrix("hidden", hidden)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    _checks.vector("token_weight", token_weight, hidden.shape[0], wide, hidden)
    _checks.finite("token_weight", token_weight)
    options = shards, bias, softcap, logit_scale, 1.0, ignore_index
    token_nll = -score("collapse_loss", hidden, weight, target, *options)
    return CollapseLoss((token_weight * token_nll).sum(), token_nll.detach())
