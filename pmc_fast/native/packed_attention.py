"""`packed_attention` on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pmc_fast.native import dtype_code, library

if TYPE_CHECKING:
    from pmc_fast import _C


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Also the log of each token's and head's sum of exp(score), float32 [T, H]."""
    out = query.new_empty(query.shape)
    log_mass = torch.empty(query.shape[:2], dtype=torch.float32)
    sizes = torch.tensor(lengths)
    query, key, value = (_within_heads(x) for x in (query, key, value))
    call = _call(query, key, value, sizes, out, log_mass, scale, softcap, window)
    workspace = torch.empty(call.workspace_floats, dtype=torch.float32)
    call.forward(workspace.data_ptr())
    return out, log_mass


def packed_attention_backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_mass: Tensor,
    lengths: list[int],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of sum(upstream * packed_attention(...)): query, key, value."""
    sizes = torch.tensor(lengths)
    gradients = tuple(x.new_empty(x.shape) for x in (query, key, value))
    query, key, value, upstream = (_within_heads(x) for x in (query, key, value, upstream))
    call = _call(query, key, value, sizes, out, log_mass, scale, softcap, window)
    workspace = torch.empty(call.backward_workspace_floats, dtype=torch.float32)
    call.backward(_tokens(upstream), *(x.data_ptr() for x in gradients), workspace.data_ptr())
    return gradients


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Tensor,
    out: Tensor,
    log_mass: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> _C.PackedAttention:
    """Holds addresses: the tensors must outlive it."""
    tokens, heads, dim = query.shape
    return library().PackedAttention(
        _tokens(query),
        _tokens(key),
        _tokens(value),
        dtype_code(query.dtype),
        heads,
        key.shape[1],
        dim,
        sizes.data_ptr(),
        len(sizes),
        tokens if window is None else min(window, tokens),
        scale,
        softcap or 0.0,
        out.data_ptr(),
        log_mass.data_ptr(),
        torch.get_num_threads(),
    )


def _within_heads(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _tokens(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)
