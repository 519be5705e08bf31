"""What a decoder layer does between its products in a training step, and the gradients of that: float32 on a CPU.

Every function raises ValueError for a tensor of another dtype, device or shape than it says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.native import address, library


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, centered: bool, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Rows scaled to mean square 1, those that are `centered` to mean 0 and variance 1, times a weight.

    Equivalent to `(x - mean) * factor * (weight + offset) + bias` where `mean` is `x.mean(1)` (0 unless centered) and `factor` is
    `((x - mean).square().mean(1) + epsilon).rsqrt()`.

    Args:
        x: [N, S].
        weight, bias: [S], of any floating dtype.

    Returns:
        The rows, [N, S], and for the backward pass [N, 2]: `mean` and `factor`.
    """
    x = _rows("x", x, None, None)
    rows, size = x.shape
    weight = _factors(weight, size, offset)
    bias = None if bias is None else _rows("bias", bias.float(), size)
    y, stats = x.new_empty(rows, size), x.new_empty(rows, 2)
    library().normalize(
        x.data_ptr(),
        rows,
        size,
        x.stride(0),
        weight.data_ptr(),
        address(bias),
        epsilon,
        centered,
        y.data_ptr(),
        size,
        stats.data_ptr(),
        torch.get_num_threads(),
    )
    return y, stats


def add_and_normalize(x: Tensor, added: Tensor, *norm, **options) -> tuple[Tensor, Tensor, Tensor]:
    """x + added, [N, S], and what `normalize` returns of that."""
    total = x + added
    return total, *normalize(total, *norm, **options)


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
    """The gradients of `normalize`; those of weight and bias are the same for any number of threads.

    Args:
        grad: [N, S], the gradient of its rows.
        x, weight, centered, offset: as they were given to it.
        stats: [N, 2], from it.
        need_weight, need_bias: whether these have a gradient.
        out: [N, S], to which the gradient of x is added; None makes a tensor of it.

    Returns:
        The gradients of x ([N, S], which is `out` if that is given), weight and bias (each [S] of weight's dtype, or None).
    """
    x = _rows("x", x, None, None)
    rows, size = x.shape
    grad, stats = _rows("grad", grad, rows, size), _rows("stats", stats, rows, 2).contiguous()
    dtype, weight = weight.dtype, _factors(weight, size, offset)
    grad_x = x.new_empty(rows, size) if out is None else _written("out", out, rows, size)
    grad_weight, grad_bias = (x.new_empty(size) if needed else None for needed in (need_weight, need_bias))
    sums = need_weight + need_bias
    workspace = x.new_empty(sums * library().normalize_gradient_workspace_floats(rows, size)) if sums else None
    library().normalize_gradient(
        grad.data_ptr(),
        x.data_ptr(),
        rows,
        size,
        grad.stride(0),
        x.stride(0),
        stats.data_ptr(),
        weight.data_ptr(),
        centered,
        grad_x.data_ptr(),
        grad_x.stride(0),
        out is not None,
        address(grad_weight),
        address(grad_bias),
        address(workspace),
        torch.get_num_threads(),
    )
    return grad_x, *(None if sums is None else sums.to(dtype) for sums in (grad_weight, grad_bias))


def activate(gate: Tensor, activation: str, up: Tensor | None) -> Tensor:
    """A gated activation.

    Equivalent to `F.silu(gate) * up` ("silu"), `F.gelu(gate) * up` ("gelu"), `F.gelu(gate, approximate="tanh") * up`
    ("gelu_tanh") or `F.relu(gate) * up` ("relu").

    Args:
        gate: [N, S].
        up: [N, S], or None for 1.

    Returns:
        [N, S].
    """
    gate = _rows("gate", gate, None, None)
    up = None if up is None else _rows("up", up, *gate.shape)
    y = gate.new_empty(gate.shape)
    library().activate(
        gate.data_ptr(),
        address(up),
        *gate.shape,
        gate.stride(0),
        0 if up is None else up.stride(0),
        activation,
        y.data_ptr(),
        y.stride(0),
        torch.get_num_threads(),
    )
    return y


def activate_backward(grad: Tensor, gate: Tensor, activation: str, up: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of `activate` with respect to gate and, where there is one, up: each [N, S].

    Args:
        grad: [N, S], the gradient of what it returned.
        gate, activation, up: as they were given to it.
    """
    gate = _rows("gate", gate, None, None)
    grad = _rows("grad", grad, *gate.shape)
    up = None if up is None else _rows("up", up, *gate.shape)
    grad_gate = gate.new_empty(gate.shape)
    grad_up = None if up is None else gate.new_empty(gate.shape)
    library().activate_gradient(
        grad.data_ptr(),
        gate.data_ptr(),
        address(up),
        *gate.shape,
        grad.stride(0),
        gate.stride(0),
        0 if up is None else up.stride(0),
        activation,
        grad_gate.data_ptr(),
        address(grad_up),
        torch.get_num_threads(),
    )
    return grad_gate, grad_up


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding of the first R elements of each head; the others are copied.

    Equivalent, for the first R, to `x * cosine + cat((-x[..., R // 2 :], x[..., : R // 2]), -1) * sine`.

    Args:
        x: [N, H, D].
        cosine, sine: [N, R], R even and at most D; their halves need not be equal.

    Returns:
        [N, H, D].
    """
    return _rotated("x", x, cosine, sine, transposed=False)


def rotate_backward(grad: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The gradient of `rotate` with respect to x, [N, H, D], from that of what it returned, [N, H, D]."""
    return _rotated("grad", grad, cosine, sine, transposed=True)


def _rotated(name: str, x: Tensor, cosine: Tensor, sine: Tensor, *, transposed: bool) -> Tensor:
    x = _rows(name, x, None, None, None)
    rows, heads, dim = x.shape
    cosine = _rows("cosine", cosine, rows, None).contiguous()
    rotated = cosine.shape[1]
    if rotated % 2 or rotated > dim:
        raise ValueError(f"cosine: got {rotated} columns, expected an even number of at most {dim}")
    sine = _rows("sine", sine, rows, rotated).contiguous()
    y = x.new_empty(x.shape)
    library().rotate(
        x.data_ptr(),
        rows,
        heads,
        dim,
        x.stride(0),
        cosine.data_ptr(),
        sine.data_ptr(),
        rotated,
        y.data_ptr(),
        torch.get_num_threads(),
        transposed,
    )
    return y


def _factors(weight: Tensor, size: int, offset: float) -> Tensor:
    weight = _rows("weight", weight.float(), size)
    return weight + offset if offset else weight


def _rows(name: str, x: Tensor, *shape: int | None) -> Tensor:
    """x, or a copy unless each row is contiguous; None in the shape is any size."""
    _check(name, x, shape)
    return x if _has_contiguous_rows(x) else x.contiguous()


def _written(name: str, x: Tensor, *shape: int) -> Tensor:
    _check(name, x, shape)
    if not _has_contiguous_rows(x) or (len(x) > 1 and x.stride(0) < x.shape[1]):
        raise ValueError(f"{name}: got strides {x.stride()}, expected contiguous rows that do not overlap")
    return x


def _has_contiguous_rows(x: Tensor) -> bool:
    return x.ndim > 1 and x[:1].is_contiguous()


def _check(name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    fits = x.ndim == len(shape) and all(want in (None, size) for want, size in zip(shape, x.shape, strict=True))
    if not fits or x.dtype != torch.float32 or x.device.type != "cpu":
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        got = f"{x.dtype} {list(x.shape)} on {x.device}"
        raise ValueError(f"{name}: got {got}, expected torch.float32 [{wanted}] on cpu")
