"""`collapse_loss` on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.gpu.cross_entropy import labelled_rows
from pmc_fast.kernels.cross_entropy import cross_entropy
from pmc_fast.kernels.device import device_of
from pmc_fast.kernels.interpreted import rounded
from pmc_fast.kernels.variant import Variant

ELEMENTS = 4096  # that a program scales at a time
PROGRAMS = 8  # per multiprocessor


def collapse_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int | None,
    needs: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss, each token's nll, and the gradients of the loss that `needs` asks for: hidden, weight, bias."""
    token_nll, gradients = cross_entropy(
        "collapse_loss",
        hidden,
        weight,
        target,
        token_weight,
        rows=labelled_rows(target, ignore_index),
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=1.0,
        needs=needs,
    )
    return torch.dot(token_weight, token_nll), token_nll, *gradients


@triton.jit
def scale_kernel(values, factor, count, ELEMENTS: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1:
        first = tl.program_id(0).to(tl.int64) * ELEMENTS
        for start in range(first, count, tl.num_programs(0) * ELEMENTS):
            index = start + tl.arange(0, ELEMENTS)
            scaled = tl.load(values + index, mask=index < count).to(tl.float32) * by
            tl.store(values + index, rounded(scaled, values.dtype.element_ty), mask=index < count)


def scale(values: Tensor, factor: Tensor) -> Tensor:
    """values *= factor in place, for contiguous values and a factor of one element; a factor of 1 moves no memory."""
    programs = min(triton.cdiv(values.numel(), ELEMENTS), PROGRAMS * device_of(values)[1])
    if programs:
        scale_kernel[(programs,)](values, factor, values.numel(), ELEMENTS=ELEMENTS, num_warps=8)
    return values


def variants(capability: int) -> list[Variant]:
    """The scaling of gradients, 32- and 64-bit sizes."""
    return [
        Variant(
            name=f"scale, {kind}, {count}",
            kernel=scale_kernel,
            signature={"values": "*" + kind, "factor": "*fp32", "count": count},
            constants={"ELEMENTS": ELEMENTS},
            num_warps=8,
            num_stages=3,
            aligned=("values", "count"),
        )
        for kind in ("bf16", "fp16", "fp32")
        for count in ("i32", "i64")
    ]
