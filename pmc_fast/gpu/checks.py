"""How a kernel says that a row of logits is no distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.errors import NO_DISTRIBUTION, not_finite


def no_bad_row(rows: int, device: torch.device) -> Tensor:
    """int32 [1]: where kernels leave the lowest bad row's number; `rows` stands for none."""
    return torch.full((1,), rows, dtype=torch.int32, device=device)


def report(op: str, bad: Tensor, rows: int) -> None:
    """Raise if a bad row was found. On a GPU the device raises, when it gets there: the host does not wait to look.

    Raises:
        ValueError: the first bad row, by its number.
    """
    if bad.device.type == "cpu":
        if int(bad) < rows:
            raise not_finite(op, int(bad))
        return
    torch._assert_async(bad[0] == rows, f"{op}: the logits of a row {NO_DISTRIBUTION}")
