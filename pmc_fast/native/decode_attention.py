"""`decode_attention` on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.errors import scores_not_finite
from pmc_fast.native import dtype_code, library


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, *, scale: float, softcap: float | None
) -> Tensor:
    lib, threads = library(), torch.get_num_threads()
    query, first = query.contiguous(), first.contiguous()
    key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
    rows, heads, dim = query.shape
    kv_heads, length = key.shape[1:3]
    out = torch.empty_like(query)
    workspace = torch.empty(threads * lib.decode_attention_workspace_floats(length, dim), dtype=torch.float32)
    bad = lib.decode_attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        dtype_code(query.dtype),
        rows,
        heads,
        kv_heads,
        length,
        dim,
        key.stride()[:3],
        value.stride()[:3],
        first.data_ptr(),
        scale,
        softcap or 0.0,
        out.data_ptr(),
        workspace.data_ptr(),
        threads,
    )
    if bad >= 0:
        raise scores_not_finite(bad)
    return out
