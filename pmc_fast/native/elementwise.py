"""What a decoder layer does to its rows between the products, in float32 on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.native import dtype_code, library


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, *, centered: bool, out: Tensor | None = None
) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last dimension of x [N, D].

    Args:
        centered: whether the mean is taken away: a layer norm, else an RMS norm.
        out: where the result goes, which may be x; default a new tensor.
    """
    y = torch.empty_like(x) if out is None else out
    library().normalize(
        x.data_ptr(),
        *x.shape,
        x.stride(0),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        epsilon,
        centered,
        y.data_ptr(),
        y.stride(0),
        torch.get_num_threads(),
    )
    return y


def activate(x: Tensor, activation: str, up: Tensor | None = None) -> Tensor:
    """x = activation(x) * up in place, for contiguous [N, D]; activation is "silu" or "gelu_tanh"."""
    library().activate(
        x.data_ptr(),
        0 if up is None else up.data_ptr(),
        *x.shape,
        getattr(library(), activation.upper()),
        torch.get_num_threads(),
    )
    return x


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, out: Tensor) -> Tensor:
    """Rotary position embedding: out = x * cosine + rotate_half(x) * sine, on the first R elements of each head.

    Args:
        x: [N, H, D], the rows any distance apart.
        cosine, sine: contiguous [N, R], R even; R = 0 only copies.
        out: [N, H, D], float32 or bfloat16, each head contiguous; not x.
    """
    library().rotate(
        x.data_ptr(),
        *x.shape,
        x.stride(0),
        cosine.data_ptr(),
        sine.data_ptr(),
        cosine.shape[1],
        out.data_ptr(),
        out.stride(0),
        out.stride(1),
        dtype_code(out.dtype),
        torch.get_num_threads(),
    )
    return out
