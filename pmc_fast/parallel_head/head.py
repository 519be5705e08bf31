"""This rank's part of an output head, and what all ranks check of its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.errors import not_finite
from pmc_fast.ops import _checks
from pmc_fast.parallel_head.shards import VocabShards


def local_head(
    shards: VocabShards, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> tuple[Tensor, Tensor | None]:
    """This rank's weight and bias; checks the arguments of a head."""
    weight = shards.local("weight", weight)
    bias = None if bias is None else shards.local("bias", bias)
    _checks.head(hidden, weight, bias, softcap, logit_scale)
    return weight, bias


def check_finite(name: str, top: Tensor, rows: Tensor | None = None) -> None:
    """Raises on every rank if a row's maximum or log-sum-exp over all ranks is no number; rows: their numbers."""
    if top.device.type != "cpu":
        _checks.finite(f"{name}: the logits", top)
    elif not torch.isfinite(top).all():
        bad = int((~torch.isfinite(top)).nonzero()[0])
        raise not_finite(name, bad if rows is None else int(rows[bad]))
