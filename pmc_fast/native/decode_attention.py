"""`decode_attention` on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.errors import scores_not_finite
from pmc_fast.native import address, dtype_code, library

_NO_POSITIONS = (0, 0, (0, 0, 0), (0, 0, 0), 0)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    *,
    scale: float,
    softcap: float | None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    prefix_row: Tensor | None = None,
    length: Tensor | None = None,
) -> Tensor:
    lib, threads = library(), torch.get_num_threads()
    query, first = query.contiguous(), first.contiguous()
    key, value = (_within_heads(x) for x in (key, value))
    prefix, positions = _NO_POSITIONS, key.shape[2]
    if length is not None:
        length = length.contiguous()
    if prefix_key is not None:
        prefix_key, prefix_value = (_within_heads(x) for x in (prefix_key, prefix_value))
        prefix_row = prefix_row.contiguous()
        prefix, positions = positions_at(prefix_key, prefix_value), positions + prefix_key.shape[2]
    rows, heads, dim = query.shape
    out = torch.empty_like(query)
    workspace = torch.empty(threads * lib.decode_attention_workspace_floats(positions, dim), dtype=torch.float32)
    bad = lib.decode_attention(
        query.data_ptr(),
        dtype_code(query.dtype),
        rows,
        heads,
        key.shape[1],
        dim,
        positions_at(key, value),
        prefix,
        address(prefix_row),
        first.data_ptr(),
        address(length),
        scale,
        softcap or 0.0,
        out.data_ptr(),
        workspace.data_ptr(),
        threads,
    )
    if bad >= 0:
        raise scores_not_finite(bad)
    return out


def _within_heads(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def positions_at(key: Tensor, value: Tensor) -> tuple:
    """Where cached keys and values [rows, heads, T, D] lie, as the library takes it; each position is contiguous."""
    return key.data_ptr(), value.data_ptr(), key.stride()[:3], value.stride()[:3], key.shape[2]
