"""Defines `linear_sample`."""

from __future__ import annotations

from torch import Tensor

from pmc_fast.reference import head
from pmc_fast.reference.sample import sample


def linear_sample(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None, softcap: float | None, logit_scale: float, **sampling
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return sample(head.logits(hidden, weight, bias, softcap, logit_scale), **sampling)
