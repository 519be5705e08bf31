"""Products with a weight that was packed once into the layout the C++ kernel reads, or that lies as torch has it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pmc_fast.native import address, dtype_code, library


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out_features, in_features] in panels, of its dtype; made by `pack`.

    row_stride: of one that was not packed, in elements, made by `in_place`; 0 in panels.
    rounded: whether inputs are rounded to bfloat16, the weight's dtype, before they are multiplied, two at a time.
    """

    memory: Tensor
    out_features: int
    in_features: int
    row_stride: int = 0
    rounded: bool = False

    def rows(self, begin: int, end: int) -> PackedWeight | None:
        """weight[begin:end] of a packed one, in the same memory; None unless a panel begins there."""
        if begin % library().packed_weight_elements(1, 1, False):  # the columns of a panel
            return None
        inputs = self.in_features + (self.in_features % 2 if self.rounded else 0)
        return replace(self, memory=self.memory[begin * inputs :], out_features=end - begin)


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies two pairs of bfloat16 numbers by one instruction, in the instruction set in use."""
    return library().has_dot_product()


def packed_bytes(weight: Tensor, rounded: bool = False) -> int:
    """How much memory `pack(weight, rounded=rounded)` takes."""
    return weight.element_size() * library().packed_weight_elements(*weight.shape, rounded)


def pack(weight: Tensor, memory: Tensor | None = None, rounded: bool = False) -> PackedWeight:
    """Copy a float32 or bfloat16 weight; the copy is valid while the instruction set in use stays the same.

    Args:
        memory: uint8 [packed_bytes(weight, rounded)], where the copy is to lie.
        rounded: of a bfloat16 weight, see `PackedWeight`.
    """
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    if memory is None:
        memory = weight.new_empty(packed_bytes(weight, rounded), dtype=torch.uint8)
    panels = memory.view(weight.dtype)
    library().pack_weight(
        weight.data_ptr(),
        dtype_code(weight.dtype),
        *weight.shape,
        weight.stride(0),
        panels.data_ptr(),
        rounded,
        torch.get_num_threads(),
    )
    return PackedWeight(panels, *weight.shape, rounded=rounded)


def in_place(weight: Tensor, rounded: bool = False) -> PackedWeight | None:
    """A float32 or bfloat16 weight without a copy; None unless each of its rows is contiguous.

    Where it is multiplied, a part of a panel is packed at a time: the same values to the bit, at a cost for each product.
    """
    lies_in_rows = weight.stride(1) == 1 and weight.stride(0)
    return PackedWeight(weight, *weight.shape, weight.stride(0), rounded) if lies_in_rows else None


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    *,
    accumulate: bool = False,
) -> Tensor:
    """x @ weight.T + bias in float32, without gradients; of a `rounded` weight, with x rounded to bfloat16.

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
        weight.rounded,
        torch.get_num_threads(),
    )
    return y.view(*x.shape[:-1], weight.out_features) if out is None else out
