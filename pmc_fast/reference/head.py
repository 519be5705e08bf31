"""The output head of a language model: logits from hidden states, and gradients back through it."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.errors import not_finite


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float) -> Tensor:
    """z = logit_scale * (hidden @ weight.T + bias), then softcap * tanh(z / softcap), in float32 or wider."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    z = torch.nn.functional.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    z = z if logit_scale == 1 else z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def gradients(
    grad_logits: Tensor,
    values: Tensor,
    hidden: Tensor,
    weight: Tensor,
    softcap: float | None,
    logit_scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, as needed, from that of the logits, whose values are `values`; in the wide dtype."""
    grad_z = grad_logits if logit_scale == 1 else grad_logits * logit_scale
    if softcap is not None:
        grad_z = grad_z * (1 - (values / softcap) ** 2)
    wide = grad_z.dtype
    return (
        grad_z @ weight.to(wide) if needs[0] else None,
        grad_z.T @ hidden.to(wide) if needs[1] else None,
        grad_z.sum(0) if needs[2] else None,
    )


def check_finite(op: str, values: Tensor, rows: Tensor | None = None) -> None:
    """Raises ValueError if a row of logits holds NaN or +inf, or nothing but -inf; `rows` are its rows' numbers."""
    top = values.amax(dim=-1)  # NaN wins a maximum
    bad = ~torch.isfinite(top)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise not_finite(op, row if rows is None else int(rows[row]))
