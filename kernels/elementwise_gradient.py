"""What a decoder layer does to its rows between the products of a training step, with its gradients, on a GPU.

The same functions as `pmc_fast/native/elementwise.py` has for a CPU. Here rows are of any floating dtype, sums float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.kernels import elementwise
from pmc_fast.kernels.elementwise import ELEMENTS, HEADS_AT_ONCE, activation_gate, warps_of
from pmc_fast.kernels.interpreted import rounded
from pmc_fast.kernels.variant import Variant, absent, present

TILE = 1024  # elements of rows that a program of a norm's gradient takes at once, at least
PROGRAMS = 256  # of a norm's gradient, at most: each has sums over its rows
COLUMNS = 64  # of such sums, per program
SUMS_AT_ONCE = 32


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, centered: bool, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Rows scaled to mean square 1, those that are `centered` to mean 0 and variance 1, times weight + offset, plus bias.

    Args:
        x: [N, S].
        weight, bias: [S].

    Returns:
        The rows, [N, S] of weight's dtype, and for the backward pass float32 [N, 2]: of each row what was subtracted from it,
        and what it was multiplied by.
    """
    y, stats = _results(x, weight)
    options = {"centered": centered, "offset": offset, "out": y, "stats": stats}
    elementwise.normalize(_rows(x), weight, bias, epsilon, **options)
    return y, stats


def add_and_normalize(
    x: Tensor,
    added: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    centered: bool,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """x + added, [N, S] float32 as x is, and what `normalize` returns of that."""
    total, (y, stats) = torch.empty_like(x, memory_format=torch.contiguous_format), _results(x, weight)
    options = {"centered": centered, "offset": offset, "added": _rows(added), "total": total, "out": y, "stats": stats}
    elementwise.normalize(_rows(x), weight, bias, epsilon, **options)
    return total, y, stats


def _results(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, size = x.shape
    return weight.new_empty(rows, size), weight.new_empty(rows, 2, dtype=torch.float32)


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
    grad, x = _rows(grad), _rows(x)
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


def activate(gate: Tensor, activation: str, up: Tensor | None) -> Tensor:
    """`F.silu(gate) * up` ("silu") or `F.gelu(gate, approximate="tanh") * up` ("gelu_tanh"), [N, S] of gate's dtype.

    Args:
        gate: [N, S].
        up: [N, S], or None for 1.
    """
    gate, up = gate.contiguous(), None if up is None else up.contiguous()
    return elementwise.activate(gate, activation, up, out=torch.empty_like(gate))


@triton.jit
def activate_gradient_kernel(
    grad,  # [count], contiguous, as are all
    gate,  # [count]
    up,  # [count] or None
    grad_gate,  # [count]
    grad_up,  # [count]; None as up is
    count,
    GELU: tl.constexpr,  # its approximation by tanh, else SiLU
    ELEMENTS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = index < count
    d = tl.load(grad + index, mask=inside, other=0).to(tl.float32)
    x = tl.load(gate + index, mask=inside, other=0).to(tl.float32)
    s = activation_gate(x, GELU)
    y = x * s
    slope = s
    if GELU:  # beyond this square s is 0 or 1: the slope of its argument no longer counts, and may overflow
        slope += y * (1 - s) * (1.5957691216 * (1 + 0.134145 * tl.minimum(x * x, 128.0)))
    else:
        slope += y * (1 - s)
    of_gate = d * slope
    if up is not None:
        of_gate *= tl.load(up + index, mask=inside, other=0).to(tl.float32)
        tl.store(grad_up + index, rounded(d * y, grad_up.dtype.element_ty), mask=inside)
    tl.store(grad_gate + index, rounded(of_gate, grad_gate.dtype.element_ty), mask=inside)


def activate_backward(grad: Tensor, gate: Tensor, activation: str, up: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of `activate` with respect to gate and, where there is one, up: each [N, S] of gate's dtype.

    Args:
        grad: [N, S], the gradient of what it returned.
        gate, activation, up: as they were given to it.
    """
    grad, gate = grad.contiguous(), gate.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), None
    if up is not None:
        up, grad_up = up.contiguous(), torch.empty_like(gate)
    activate_gradient_kernel[(triton.cdiv(gate.numel(), ELEMENTS),)](
        grad,
        gate,
        up,
        grad_gate,
        grad_up,
        gate.numel(),
        GELU=activation == "gelu_tanh",
        ELEMENTS=ELEMENTS,
        num_warps=4,
    )
    return grad_gate, grad_up


@triton.jit
def turn_kernel(
    x,  # [rows, HEADS, DIM], contiguous
    cosine,  # [rows, ROTATED], contiguous
    sine,
    out,  # [rows, HEADS, DIM], contiguous
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    AT_ONCE: tl.constexpr,  # heads
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside, turns = (head < HEADS) & (column < DIM), (head < HEADS) & (column < ROTATED)
    first = column < ROTATED // 2
    partner = tl.where(first, column + ROTATED // 2, column - ROTATED // 2)
    place = (row * HEADS + head) * DIM
    y = tl.load(x + place + column, mask=inside, other=0).to(tl.float32)
    other = tl.load(x + place + partner, mask=turns, other=0).to(tl.float32)
    angle = tl.load(sine + row * ROTATED + (partner if TRANSPOSED else column), mask=column < ROTATED, other=0)
    y *= tl.load(cosine + row * ROTATED + column, mask=column < ROTATED, other=1)
    y += tl.where(first, -other, other) * (-angle if TRANSPOSED else angle)
    tl.store(out + place + column, rounded(y, out.dtype.element_ty), mask=inside)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding of the first R elements of each head; the others are copied.

    Equivalent, for the first R, to `x * cosine + cat((-x[..., R // 2 :], x[..., : R // 2]), -1) * sine`.

    Args:
        x: [N, H, D].
        cosine, sine: float32 [N, R], R even and at most D; their halves need not be equal.

    Returns:
        [N, H, D], of x's dtype.
    """
    return _turned(x, cosine, sine, transposed=False)


def rotate_backward(grad: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The gradient of `rotate` with respect to x, [N, H, D], from that of what it returned, [N, H, D]."""
    return _turned(grad, cosine, sine, transposed=True)


def _turned(x: Tensor, cosine: Tensor, sine: Tensor, *, transposed: bool) -> Tensor:
    rows, heads, dim = x.shape
    x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
    out = torch.empty_like(x)
    turn_kernel[(rows, triton.cdiv(heads, HEADS_AT_ONCE))](
        x,
        cosine,
        sine,
        out,
        HEADS=heads,
        DIM=dim,
        ROTATED=cosine.shape[1],
        TRANSPOSED=transposed,
        AT_ONCE=HEADS_AT_ONCE,
        COLUMNS=triton.next_power_of_2(dim),
        num_warps=4,
    )
    return out


def _rows(x: Tensor) -> Tensor:
    """x, or a copy unless each row is contiguous."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def variants(capability: int) -> list[Variant]:
    """The kernels at the layers of Llama-3.2-3B and Phi-1.5; none of them depends on the GPU."""
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
    for name, gelu, gated in (("silu times up", False, True), ("gelu times up", True, True), ("gelu", True, False)):
        optional = {"up": "*bf16" if gated else None, "grad_up": "*bf16" if gated else None}
        tensors = dict.fromkeys(("grad", "gate", "grad_gate"), "*bf16") | present(optional)
        listed.append(
            Variant(
                name=f"activate backward, {name}",
                kernel=activate_gradient_kernel,
                signature=tensors | {"count": "i32"},
                constants=absent(optional) | {"GELU": gelu, "ELEMENTS": ELEMENTS},
                num_warps=4,
                num_stages=3,
                aligned=(*tensors, "count"),
            )
        )
    for name, heads, dim, rotated in (("Llama-3.2-3B", 24, 128, 128), ("Phi-1.5", 32, 64, 32)):
        for transposed in (False, True):
            tensors = {"x": "*bf16", "cosine": "*fp32", "sine": "*fp32", "out": "*bf16"}
            constants = {"HEADS": heads, "DIM": dim, "ROTATED": rotated, "TRANSPOSED": transposed}
            listed.append(
                Variant(
                    name=f"rotate{' backward' if transposed else ''}, {name}",
                    kernel=turn_kernel,
                    signature=tensors,
                    constants=constants | {"AT_ONCE": HEADS_AT_ONCE, "COLUMNS": triton.next_power_of_2(dim)},
                    num_warps=4,
                    num_stages=3,
                    aligned=tuple(tensors),
                )
            )
    return listed
