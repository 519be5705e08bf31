"""One product instead of several of the same rows, for a step of few rows on a GPU, whose time goes into reading weights.

Its weights lie below one another: in the model, where they are parts of one, or in a copy. Decoders of the same weights share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from pmc_fast.layer_parts import LinearParts

# Tokens of an answer for which weights are copied. On an H200 copying Llama-3.2-3B's takes 1.89 ms, which 6 steps of 160 rows gain,
# and 18 of 16 rows.
LEAST_STEPS = 18
# Of the memory that is free once there is room for keys and values, how much the copies that a decoder makes take at most.
COPY_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class JointLinear:
    """x @ weight.T + bias of some parts at once. What is a copy has no values before the first `refresh`."""

    weight: Tensor
    bias: Tensor | None
    _copies: tuple[tuple[Tensor, tuple[Tensor, ...]], ...]  # and what they are copies of
    columns: tuple[tuple[Tensor, ...], ...]  # the parts' weights, and their biases if they have any

    @property
    def copied_bytes(self) -> int:
        return sum(copy.nbytes for copy, _ in self._copies)

    def refresh(self) -> None:
        """Copy anew what may have changed."""
        for copy, sources in self._copies:
            torch.cat(sources, out=copy)


# Those that somebody uses, by where the weights and biases that they are made of lay then.
_in_use: WeakValueDictionary[tuple, JointLinear] = WeakValueDictionary()


class JointLinears:
    """Makes them until their copies have taken `room` bytes."""

    def __init__(self, room: int) -> None:
        self._room = room

    def of(self, parts: Sequence[LinearParts]) -> JointLinear | None:
        """None of a single part, and where it takes a copy for which there is no room, or dtypes or biases differ."""
        if len(parts) == 1:
            return None
        columns = [[part.weight for part in parts]]
        if any(part.bias is not None for part in parts):
            columns.append([part.bias for part in parts])
        if any(x is None or x.dtype != column[0].dtype for column in columns for x in column):
            return None
        name = _name(columns)
        joint = _in_use.get(name)
        if joint is not None and _name(joint.columns) != name:  # `model.to` moved those, and others lie there now
            joint = None
        if joint is None and (joint := self._make(columns)) is not None:
            _in_use[name] = joint
        return joint

    def _make(self, columns: Sequence[Sequence[Tensor]]) -> JointLinear | None:
        whole = [_below_one_another(column) for column in columns]
        apart = [place for place, found in enumerate(whole) if found is None]
        needed = sum(x.nbytes for place in apart for x in columns[place])
        if needed > self._room:
            return None
        self._room -= needed
        copies = []
        for place in apart:
            first = columns[place][0]
            whole[place] = first.new_empty(sum(map(len, columns[place])), *first.shape[1:])
            copies.append((whole[place], tuple(columns[place])))
        return JointLinear(whole[0], whole[1] if len(whole) > 1 else None, tuple(copies), tuple(map(tuple, columns)))


def _name(columns: Sequence[Sequence[Tensor]]) -> tuple:
    return tuple((x.data_ptr(), x.shape, x.stride(), x.dtype) for column in columns for x in column)


def _below_one_another(tensors: Sequence[Tensor]) -> Tensor | None:
    """A view of all of them, if each begins where the one before it ends; else None."""
    first, end = tensors[0], tensors[0].data_ptr()
    for x in tensors:
        same = x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and x.stride() == first.stride()
        if not same or x.data_ptr() != end:
            return None
        end += len(x) * x.stride(0) * x.element_size()
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())
