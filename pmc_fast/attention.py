"""Attention as this library runs it: over a packed batch, and of one new token per row over a cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from pmc_fast.errors import UserError
from pmc_fast.ops import decode_attention

NAME = "pmc_fast"

# How many attention calls of the packed forward pass under way have seen its lengths; None outside of one.
_calls: ContextVar[list[int] | None] = ContextVar("pmc_fast_packed_calls", default=None)

# For each attention call of the pass under way, whether `decode_attention` could take its place; None if nobody asks.
_probe: ContextVar[list[bool] | None] = ContextVar("pmc_fast_probe", default=None)

# The first position that each row sees, while rows are decoded one token at a time; None otherwise.
_first: ContextVar[Tensor | None] = ContextVar("pmc_fast_first", default=None)


def install(model: nn.Module) -> None:
    """Make the model's attention understand packed batches; its other calls go to torch's fused attention as before.

    Stays in place, since gradient checkpointing runs attention again in the backward pass.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, _mask)
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)


@contextmanager
def packed() -> Iterator[None]:
    """Around a packed forward pass: no mask is made, and the model must hand the lengths to its attention."""
    count = [0]
    token = _calls.set(count)
    try:
        yield
    finally:
        _calls.reset(token)
    if count[0] == 0:
        raise UserError("model: its attention does not take keyword arguments, so it cannot run a packed batch")


@contextmanager
def replacing_sdpa(model: nn.Module) -> Iterator[list[bool]]:
    """Within a with block, this module's attention in place of torch's; a model with any other is left as it is.

    The list that it gives gets an entry for each attention call that passes through here: whether `decode_attention`
    could do it.
    """
    theirs = model.config._attn_implementation
    calls: list[bool] = []
    if theirs not in ("sdpa", NAME):
        yield calls
        return
    install(model)
    token = _probe.set(calls)
    try:
        yield calls
    finally:
        _probe.reset(token)
        if theirs != NAME:
            model.set_attn_implementation(theirs)


@contextmanager
def decoding(first: Tensor) -> Iterator[None]:
    """Around a pass of one token per row: no mask is made, each row sees its cache from position `first` [N] on."""
    token = _first.set(first)
    try:
        yield
    finally:
        _first.reset(token)


def _mask(*args, **kwargs) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    return None if _calls.get() is not None or _first.get() is not None else sdpa_mask(*args, **kwargs)


def _forward(
    module: nn.Module,
    query: Tensor,  # [batch, heads, tokens, head_dim]
    key: Tensor,  # [batch, kv_heads, keys, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_lengths: tuple[int, ...] | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    if kwargs.get("s_aux") is not None:
        raise UserError("model: its attention has sinks, which this version does not support")
    if (calls := _probe.get()) is not None:
        calls.append(key.shape == value.shape)
    if (first := _first.get()) is not None:
        if sliding_window is not None:
            first = first.clamp(min=key.shape[2] - sliding_window)
        return decode_attention(query[:, :, 0], key, value, first, scale=scaling, softcap=softcap)[:, None], None
    if packed_lengths is None and softcap is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if packed_lengths is None:
        causal = attention_mask is None and query.shape[2] > 1
        out = _attend(query, key, value, attention_mask, causal, None, softcap, dropout, scaling)
        return out.transpose(1, 2).contiguous(), None
    if (count := _calls.get()) is not None:
        count[0] += 1
    pieces = [
        _attend(q, k, v, None, True, sliding_window, softcap, dropout, scaling)
        for q, k, v in zip(*(x.split(packed_lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    tokens, keys = query.shape[2], key.shape[2]
    if causal and (softcap is not None or (window is not None and tokens > window)):
        ahead = torch.arange(tokens, device=query.device)[:, None] - torch.arange(keys, device=query.device)
        mask, causal = (ahead >= 0) & (ahead < (window or keys)), False
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling
        )
    scores = (query @ key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    weights = nn.functional.dropout(scores.float().softmax(-1).to(query.dtype), dropout)
    return weights @ value
