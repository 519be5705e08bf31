"""Defines `decode_attention`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pmc_fast.errors import scores_not_finite


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
    prefix_positions = 0
    if prefix_key is not None:
        prefix_positions = prefix_key.shape[2]
        key = torch.cat([prefix_key[prefix_row], key], dim=2)
        value = torch.cat([prefix_value[prefix_row], value], dim=2)
    rows, heads, dim = query.shape
    kv_heads, positions = key.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).view(rows, kv_heads, heads // kv_heads, dim)
    scores = scale * (grouped @ key.to(wide).transpose(2, 3))
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    position = torch.arange(positions, device=query.device)
    left_out = position < first[:, None]
    if length is not None:
        left_out |= position >= prefix_positions + length[:, None]
    left_out = left_out[:, None, None]
    scores = scores.masked_fill(left_out, -math.inf)
    bad = ~torch.isfinite(scores.amax(-1)).flatten(1).all(1)  # NaN wins a maximum
    if bad.any():
        raise scores_not_finite(int(bad.nonzero()[0]))
    return (scores.softmax(-1) @ value.to(wide).masked_fill(left_out.transpose(2, 3), 0)).view_as(query).to(query.dtype)
