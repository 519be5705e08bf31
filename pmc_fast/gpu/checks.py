"""How a kernel says that a row of logits is no distribution, or that its scores are no numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pmc_fast.errors import NO_DISTRIBUTION, NO_SCORES, not_finite, scores_not_finite


def no_bad_row(rows: int, device: torch.device) -> Tensor:
    """int32 [1]: where kernels leave the lowest bad row's number; `rows` stands for none."""
    return torch.full((1,), rows, dtype=torch.int32, device=device)


def report(op: str, bad: Tensor, rows: int) -> None:
    """Raise if a bad row was found. On a GPU the device raises, when it gets there: the host does not wait to look.

    Raises:
        ValueError: the first bad row, by its number.
    """
    _raise(bad, rows, partial(not_finite, op), f"{op}: the logits of a row {NO_DISTRIBUTION}")


def report_scores(bad: Tensor, rows: int) -> None:
    """Likewise for `decode_attention`, which has scores in the place of logits."""
    _raise(bad, rows, scores_not_finite, f"decode_attention: the scores of a row {NO_SCORES}")


def _raise(bad: Tensor, rows: int, error: Callable[[int], ValueError], message: str) -> None:
    if bad.device.type != "cpu":
        torch._assert_async(bad[0] == rows, message)
    elif int(bad) < rows:
        raise error(int(bad))
