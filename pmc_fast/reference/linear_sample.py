"""Defines `linear_sample`."""

from __future__ import annotations

from torch import Tensor

from pmc_fast.phases import phase
from pmc_fast.reference import head
from pmc_fast.reference.sample import draw


def linear_sample(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None, softcap: float | None, logit_scale: float, **sampling
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with phase("head"):
        logits = head.logits(hidden, weight, bias, softcap, logit_scale)
    with phase("sample"):
        return draw("linear_sample", logits, **sampling)
