"""What a decoder layer does to its rows between the products of a training step, with its gradients, on a GPU.

The same functions as `pmc_fast/native/elementwise.py` has for a CPU. Here rows are of any floating dtype, sums float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.kernels import elementwise
from pmc_fast.kernels.elementwise import ACTIVATIONS, ELEMENTS, HEADS_AT_ONCE, activation_gate
from pmc_fast.kernels.interpreted import rounded
from pmc_fast.kernels.norm_gradient import contiguous_rows, normalize_backward
from pmc_fast.kernels.variant import Variant, absent, present

__all__ = [
    "activate",
    "activate_backward",
    "add_and_normalize",
    "normalize",
    "normalize_backward",
    "rotate",
    "rotate_backward",
]


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
    elementwise.normalize(contiguous_rows(x), weight, bias, epsilon, **options)
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
    options = {
        "centered": centered,
        "offset": offset,
        "added": contiguous_rows(added),
        "total": total,
        "out": y,
        "stats": stats,
    }
    elementwise.normalize(contiguous_rows(x), weight, bias, epsilon, **options)
    return total, y, stats


def _results(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, size = x.shape
    return weight.new_empty(rows, size), weight.new_empty(rows, 2, dtype=torch.float32)


def activate(gate: Tensor, activation: str, up: Tensor | None) -> Tensor:
    """activation(gate) * up, [N, S] of gate's dtype.

    Args:
        gate: [N, S].
        activation: "silu", "gelu" (exact), "gelu_tanh" (its approximation) or "relu".
        up: [N, S], or None for 1.
    """
    gate, up = contiguous_rows(gate), None if up is None else contiguous_rows(up)
    return elementwise.activate(gate, activation, up, out=gate.new_empty(gate.shape))


@triton.jit
def activate_gradient_kernel(
    grad,  # [count], contiguous, as are all
    gate,  # [count]
    up,  # [count] or None
    grad_gate,  # [count]
    grad_up,  # [count]; None as up is
    count,
    ACTIVATION: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = index < count
    d = tl.load(grad + index, mask=inside, other=0).to(tl.float32)
    x = tl.load(gate + index, mask=inside, other=0).to(tl.float32)
    if ACTIVATION == "relu":
        y, slope = tl.where(x <= 0, 0, x), tl.where(x <= 0, 0.0, 1.0)
    else:
        s = activation_gate(x, ACTIVATION)
        y, slope = x * s, s
        if ACTIVATION == "silu":
            slope += y * (1 - s)
        elif ACTIVATION == "gelu":
            slope += x * (0.3989422804 * tl.exp(-0.5 * x * x))
        else:  # beyond this square s is 0 or 1: the slope of its argument no longer counts, and may overflow
            slope += y * (1 - s) * (1.5957691216 * (1 + 0.134145 * tl.minimum(x * x, 128.0)))
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
        ACTIVATION=activation,
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


def variants(capability: int) -> list[Variant]:
    """The kernels at the layers of Llama-3.2-3B and Phi-1.5; none of them depends on the GPU."""
    listed = []
    for activation, gated in ((name, gated) for name in ACTIVATIONS for gated in (True, False)):
        optional = {"up": "*bf16" if gated else None, "grad_up": "*bf16" if gated else None}
        tensors = dict.fromkeys(("grad", "gate", "grad_gate"), "*bf16") | present(optional)
        listed.append(
            Variant(
                name=f"activate backward, {activation}{' times up' * gated}",
                kernel=activate_gradient_kernel,
                signature=tensors | {"count": "i32"},
                constants=absent(optional) | {"ACTIVATION": activation, "ELEMENTS": ELEMENTS},
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
