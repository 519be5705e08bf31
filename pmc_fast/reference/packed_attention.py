"""Defines `packed_attention`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, None]:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for s in _sequences(query, key, value, lengths, scale, softcap, window):
        out[s.own] = torch.einsum("kgts,skd->tkgd", s.weight, s.value).flatten(1, 2).to(query.dtype)
    return out, None


def packed_attention_backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _out: Tensor,
    _log_mass: Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of sum(upstream * packed_attention(...)): query, key, value."""
    wide = torch.promote_types(query.dtype, torch.float32)
    d_query, d_key, d_value = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (query, key, value))
    for s in _sequences(query, key, value, lengths, scale, softcap, window):
        above = upstream[s.own].to(wide).view_as(s.query)
        d_value.index_add_(0, s.seen, torch.einsum("kgts,tkgd->skd", s.weight, above))
        d_weight = torch.einsum("tkgd,skd->kgts", above, s.value)
        d_score = s.weight * (d_weight - (s.weight * d_weight).sum(-1, keepdim=True))
        d_score = scale * (d_score if softcap is None else d_score * (1 - (s.score / softcap) ** 2))
        d_query[s.own] = torch.einsum("kgts,skd->tkgd", d_score, s.key).flatten(1, 2)
        d_key.index_add_(0, s.seen, torch.einsum("kgts,tkgd->skd", d_score, s.query))
    return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype)


class _Sequence(NamedTuple):
    """A sequence's own tokens t, all that it sees s, and what t makes of s; heads k of keys, g of queries for each."""

    own: slice
    seen: Tensor
    query: Tensor  # [t, k, g, d]
    key: Tensor  # [s, k, d]
    value: Tensor
    score: Tensor  # [k, g, t, s]
    weight: Tensor


def _sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Iterator[_Sequence]:
    wide = torch.promote_types(query.dtype, torch.float32)
    token, end = torch.arange(query.shape[0], device=query.device), 0
    for number, length in enumerate(lengths):
        start, end, shared = end, end + length, lengths[0] if number else 0
        own, seen = slice(start, end), torch.cat([token[:shared], token[start:end]])
        q = query[own].to(wide).unflatten(1, (key.shape[1], -1))
        k, v = (x[seen].to(wide) for x in (key, value))
        score = scale * torch.einsum("tkgd,skd->kgts", q, k)
        score = score if softcap is None else softcap * torch.tanh(score / softcap)
        ahead = (shared + token[:length, None]) - token[: shared + length]
        visible = (ahead >= 0) if window is None else (ahead >= 0) & (ahead < window)
        yield _Sequence(own, seen, q, k, v, score, score.masked_fill(~visible, -math.inf).softmax(-1))
