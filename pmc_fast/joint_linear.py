"""One product instead of several of the same rows, for a step of few rows on a GPU, whose time goes into reading weights.

Its weights lie below one another: in the model, where they are parts of one, or in a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pmc_fast.layer_parts import LinearParts

# Tokens of an answer for which weights are copied: by bytes a copy of Llama-3.2-3B's takes as long as six steps gain.
LEAST_STEPS = 8
# Of the memory that is free once there is room for keys and values, how much copies of weights take at most.
COPY_SHARE = 0.25


@dataclass(frozen=True)
class JointLinear:
    """x @ weight.T + bias of some parts at once. What is a copy has no values before the first `refresh`."""

    weight: Tensor
    bias: Tensor | None
    _copies: tuple[tuple[Tensor, tuple[Tensor, ...]], ...]  # and what they are copies of

    @property
    def copied_bytes(self) -> int:
        return sum(copy.nbytes for copy, _ in self._copies)

    def refresh(self) -> None:
        """Copy anew what may have changed."""
        for copy, sources in self._copies:
            torch.cat(sources, out=copy)


def joint_linear(parts: Sequence[LinearParts], room: int) -> JointLinear | None:
    """None of a single part, and where it takes a copy of more than `room` bytes, or dtypes or biases differ."""
    if len(parts) == 1:
        return None
    columns = [[part.weight for part in parts]]
    if any(part.bias is not None for part in parts):
        columns.append([part.bias for part in parts])
    if any(x is None or x.dtype != column[0].dtype for column in columns for x in column):
        return None
    whole = [_below_one_another(column) for column in columns]
    needed = sum(x.nbytes for column, found in zip(columns, whole, strict=True) if found is None for x in column)
    if needed > room:
        return None
    copies = []
    for place, column in enumerate(columns):
        if whole[place] is None:
            whole[place] = column[0].new_empty(sum(map(len, column)), *column[0].shape[1:])
            copies.append((whole[place], tuple(column)))
    return JointLinear(whole[0], whole[1] if len(whole) > 1 else None, tuple(copies))


def _below_one_another(tensors: Sequence[Tensor]) -> Tensor | None:
    """A view of all of them, where each begins where the one before it ends."""
    first, end = tensors[0], tensors[0].data_ptr()
    for x in tensors:
        same = x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and x.stride() == first.stride()
        if not same or x.data_ptr() != end:
            return None
        end += len(x) * x.stride(0) * x.element_size()
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())
