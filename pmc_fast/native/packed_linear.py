"""Products with a weight that was packed once into the layout the C++ kernel reads, or that lies as torch has it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pmc_fast.native import address, dtype_code, library


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out_features, in_features] in panels, of its dtype; made by `pack`.

    row_stride: of one that was not packed, in elements, made by `in_place`; 0 in panels.
    """

    memory: Tensor
    out_features: int
    in_features: int
    row_stride: int = 0

    def rows(self, begin: int, end: int) -> PackedWeight | None:
        """weight[begin:end] of a packed one, in the same memory; None unless a panel begins there."""
        if begin % library().packed_weight_elements(1, 1):  # the columns of a panel
            return None
        return PackedWeight(self.memory[begin * self.in_features :], end - begin, self.in_features)


def packed_bytes(weight: Tensor) -> int:
    """How much memory `pack(weight)` takes."""
    return weight.element_size() * library().packed_weight_elements(*weight.shape)


def pack(weight: Tensor, memory: Tensor | None = None) -> PackedWeight:
    """Copy a float32 or bfloat16 weight; the copy is valid while the instruction set in use stays the same.

    Args:
        memory: uint8 [packed_bytes(weight)], where the copy is to lie.
    """
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    if memory is None:
        memory = weight.new_empty(packed_bytes(weight), dtype=torch.uint8)
    panels = memory.view(weight.dtype)
    library().pack_weight(
        weight.data_ptr(),
        dtype_code(weight.dtype),
        *weight.shape,
        weight.stride(0),
        panels.data_ptr(),
        torch.get_num_threads(),
    )
    return PackedWeight(panels, *weight.shape)


def in_place(weight: Tensor) -> PackedWeight | None:
    """A float32 or bfloat16 weight without a copy; None unless each of its rows is contiguous.

    Where it is multiplied, a part of a panel is packed at a time: the same values to the bit, at a cost for each product.
    """
    return PackedWeight(weight, *weight.shape, weight.stride(0)) if weight.stride(1) == 1 and weight.stride(0) else None


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    *,
    accumulate: bool = False,
) -> Tensor:
    """x @ weight.T + bias in float32, without gradients.

    `out` [N, out_features] is written if it is given; with `accumulate`, the result is added to it.
    """
    rows = x.reshape(-1, weight.in_features)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = x.new_empty(len(rows), weight.out_features) if out is None else out
    bias = None if bias is None else bias.contiguous()
    library().packed_linear(
        rows.data_ptr(),
        len(rows),
        rows.stride(0),
        weight.memory.data_ptr(),
        dtype_code(weight.memory.dtype),
        weight.row_stride,
        address(bias),
        weight.out_features,
        weight.in_features,
        y.data_ptr(),
        y.stride(0),
        accumulate,
        torch.get_num_threads(),
    )
    return y.view(*x.shape[:-1], weight.out_features) if out is None else out
