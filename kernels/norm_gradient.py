"""The gradients of a norm: of its rows in one launch, which leaves sums over rows to be added up for its weight and bias."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.kernels.elementwise import warps_of
from pmc_fast.kernels.interpreted import rounded
from pmc_fast.kernels.variant import Variant, absent, present

TILE = 1024  # elements of rows that a program takes at once, at least
PROGRAMS = 256  # at most: each has sums over its rows
COLUMNS = 64  # of such sums, per program
SUMS_AT_ONCE = 32


@triton.jit
def normalize_gradient_kernel(
    grad,  # [rows, size]
    grad_stride,
    x,  # [rows, size]
    x_stride,
    stats,  # [rows, 2], contiguous
    weight,  # [size]
    to,  # [rows, size]
    to_stride,
    weight_sums,  # [programs, size] or None
    bias_sums,  # [programs, size] or None
    rows,
    size,
    offset,
    CENTERED: tl.constexpr,
    ADDS: tl.constexpr,  # to what `to` holds
    ROWS: tl.constexpr,  # at once
    SIZE: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, SIZE)[None, :]
    factors = tl.load(weight + column, mask=column < size, other=0).to(tl.float32) + offset
    weight_sum = tl.zeros([ROWS, SIZE], tl.float32)
    bias_sum = tl.zeros([ROWS, SIZE], tl.float32)
    for first in range(program * ROWS, rows, programs * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & (column < size)
        mean = tl.load(stats + 2 * row, mask=row < rows, other=0)
        factor = tl.load(stats + 2 * row + 1, mask=row < rows, other=0)
        d = tl.load(grad + row * grad_stride + column, mask=inside, other=0).to(tl.float32)
        n = (tl.load(x + row * x_stride + column, mask=inside, other=0).to(tl.float32) - mean) * factor
        n = tl.where(inside, n, 0)
        if weight_sums is not None:
            weight_sum += d * n
        if bias_sums is not None:
            bias_sum += d
        d *= factors
        result = d - n * (tl.sum(d * n, 1)[:, None] / size)
        if CENTERED:
            result -= tl.sum(d, 1)[:, None] / size
        result *= factor
        target = to + row * to_stride + column
        if ADDS:
            result += tl.load(target, mask=inside, other=0).to(tl.float32)
        tl.store(target, rounded(result, to.dtype.element_ty), mask=inside)
    line = program.to(tl.int64) * size + tl.arange(0, SIZE)
    if weight_sums is not None:
        tl.store(weight_sums + line, tl.sum(weight_sum, 0), mask=tl.arange(0, SIZE) < size)
    if bias_sums is not None:
        tl.store(bias_sums + line, tl.sum(bias_sum, 0), mask=tl.arange(0, SIZE) < size)


@triton.jit
def add_up_kernel(
    sums,  # [count, size], contiguous
    out,  # [size]
    count,
    size,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,  # lines
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([AT_ONCE, COLUMNS], tl.float32)
    for first in range(0, count, AT_ONCE):
        line = first + tl.arange(0, AT_ONCE)[:, None]
        total += tl.load(sums + line * size + column, mask=(line < count) & (column < size), other=0)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(out + column, rounded(tl.sum(total, 0), out.dtype.element_ty), mask=column < size)


def normalize_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    *,
    centered: bool,
    offset: float = 0.0,
    need_weight: bool,
    need_bias: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of `normalize`; their bits do not depend on the GPU.

    Args:
        grad: [N, S], the gradient of its rows.
        x, weight, centered, offset: as they were given to it.
        stats: float32 [N, 2], from it.
        need_weight, need_bias: whether these have a gradient.
        out: [N, S], to which the gradient of x is added; None makes a tensor of x's dtype.

    Returns:
        The gradients of x ([N, S], which is `out` if that is given), weight and bias (each [S] of weight's dtype, or None).
    """
    rows, size = x.shape
    grad, x = contiguous_rows(grad), contiguous_rows(x)
    block = triton.next_power_of_2(size)
    at_once = max(1, TILE // block)
    programs = max(1, min(PROGRAMS, triton.cdiv(rows, at_once)))
    to = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    sums = [stats.new_empty(programs, size) if needed else None for needed in (need_weight, need_bias)]
    normalize_gradient_kernel[(programs,)](
        grad,
        grad.stride(0),
        x,
        x.stride(0),
        stats,
        weight,
        to,
        to.stride(0),
        *sums,
        rows,
        size,
        offset,
        CENTERED=centered,
        ADDS=out is not None,
        ROWS=at_once,
        SIZE=block,
        num_warps=warps_of(at_once * block),
    )
    return to, *(part if part is None else _added_up(part, weight) for part in sums)


def _added_up(sums: Tensor, like: Tensor) -> Tensor:
    count, size = sums.shape
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    add_up_kernel[(triton.cdiv(size, COLUMNS),)](
        sums, out, count, size, COLUMNS=COLUMNS, AT_ONCE=SUMS_AT_ONCE, num_warps=4
    )
    return out


def contiguous_rows(x: Tensor) -> Tensor:
    """x, or a copy unless each row is contiguous."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def variants(capability: int) -> list[Variant]:
    """The kernels at the norms of several models; none of them depends on the GPU."""
    listed = []
    for name, rows_of, size, kind, centered, bias in (
        ("Llama-3.2-3B", "*fp32", 3072, "*bf16", False, None),
        ("Qwen3's heads", "*bf16", 128, "*bf16", False, None),
        ("Phi-1.5", "*fp32", 2048, "*fp16", True, "*fp32"),
        ("Llama-3.1-70B", "*fp32", 8192, "*bf16", False, None),
    ):
        block = triton.next_power_of_2(size)
        at_once = max(1, TILE // block)
        adds = rows_of == "*fp32"
        optional = {"weight_sums": "*fp32", "bias_sums": bias}
        tensors = {"grad": kind, "x": rows_of, "stats": "*fp32", "weight": kind, "to": rows_of}
        strides = ("grad_stride", "x_stride", "to_stride")
        listed.append(
            Variant(
                name=f"normalize backward, {name}",
                kernel=normalize_gradient_kernel,
                signature=tensors
                | dict.fromkeys((*strides, "rows", "size"), "i32")
                | {"offset": "fp32"}
                | present(optional),
                constants=absent(optional) | {"CENTERED": centered, "ADDS": adds, "ROWS": at_once, "SIZE": block},
                num_warps=warps_of(at_once * block),
                num_stages=3,
                aligned=(*tensors, *strides, "size", *present(optional)),
            )
        )
    listed.append(
        Variant(
            name="sums of a norm's gradient",
            kernel=add_up_kernel,
            signature={"sums": "*fp32", "out": "*bf16", "count": "i32", "size": "i32"},
            constants={"COLUMNS": COLUMNS, "AT_ONCE": SUMS_AT_ONCE},
            num_warps=4,
            num_stages=3,
            aligned=("sums", "out", "size"),
        )
    )
    return listed
