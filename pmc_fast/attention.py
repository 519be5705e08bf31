"""Attention as this library runs it: over a packed batch, and of one new token per row over a cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pmc_fast import backend, varlen
from pmc_fast.cache import SampleCache
from pmc_fast.errors import UserError
from pmc_fast.ops import decode_attention, packed_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NAME = "pmc_fast"

# Tensors that attention is given and may do without.
_HARMLESS = {"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k"}

# The packed forward pass under way; None outside of one.
_packing: ContextVar[Packing | None] = ContextVar("pmc_fast_packing", default=None)

# What passed through here of the pass under way; None if nobody asks.
_watched: ContextVar[Watched | None] = ContextVar("pmc_fast_watched", default=None)

# The rows that are decoded one token at a time; None otherwise.
_decoding: ContextVar[Decoding | None] = ContextVar("pmc_fast_decoding", default=None)


class PackedLengths(NamedTuple):
    """Tokens of a packed batch: of the beginning that all sequences share, and of each sequence beyond it."""

    shared: int
    own: tuple[int, ...]


@dataclass
class Packing:
    """A packed forward pass, and how many attention calls have seen its lengths."""

    lengths: PackedLengths
    calls: int = 0


@dataclass(frozen=True)
class AttentionCall:
    """What one attention call was given."""

    layer: int | None
    packed: bool  # the lengths of a packed batch
    keys_at: int  # the address of its keys
    same_shape: bool  # its keys and values have one shape
    head_dim: int
    scaling: float | None
    softcap: float | None
    window: int | None
    sinks: bool  # a logit for each head that weighs in the softmax and has no value


@dataclass
class Watched:
    """The attention calls of a pass, and the windows of the masks that were asked for.

    other_masks: whether some were asked for that are not causal, or more than that and a window.
    """

    calls: list[AttentionCall] = field(default_factory=list)
    windows: set[int] = field(default_factory=set)
    other_masks: bool = False


class Decoding(Protocol):
    """Rows that are decoded one token at a time."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        window: int | None,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        """[N, H, D] of one query [N, H, D] each, over the layer's keys and values, which those [N, K, D] of the token join."""
        ...


@dataclass(frozen=True)
class SharedPrompts:
    """Rows over a cache that holds prompts once.

    first: int64 [N], the first position that each row sees; prefix_row: int64 [N], the row of its prompt.
    """

    cache: SampleCache
    first: Tensor
    prefix_row: Tensor

    def attend(self, layer, query, key, value, *, window, scale, softcap) -> Tensor:
        held = self.cache.layers[layer]
        key, value = held.update(key[:, :, None], value[:, :, None])
        prefix = {"prefix_key": held.prefix_keys, "prefix_value": held.prefix_values, "prefix_row": self.prefix_row}
        first = held.first_seen(self.first, window)
        return decode_attention(query, key, value, first, scale=scale, softcap=softcap, **prefix)


def install(model: nn.Module) -> None:
    """Make the model's attention understand packed batches; its other calls go to torch's fused attention as before.

    Stays in place, since gradient checkpointing runs attention again in the backward pass.
    """
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(registered())
    for config in _copies(model):
        config._attn_implementation = model.config._attn_implementation


def registered() -> str:
    """The name that transformers knows this module's attention by, from now on."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


class Unknown(UserError):
    """A model gives its attention what this module's has no use for."""


class LengthsLost(UserError):
    """A model does not hand the lengths of a packed batch to its attention."""


@contextmanager
def packed(lengths: PackedLengths) -> Iterator[None]:
    """Around a packed forward pass: the model must hand the lengths to its attention.

    They are its `packed_lengths`, and for models that hand keywords to their attention no further (StableLM, Nemotron) what
    they get as a mask: gradient checkpointing keeps that for the backward pass, too.

    Raises:
        LengthsLost: it hands on neither.
    """
    token = _packing.set(packing := Packing(lengths))
    try:
        yield
    finally:
        _packing.reset(token)
    if packing.calls == 0:
        raise LengthsLost(
            "model: its attention takes neither keyword arguments nor masks, so it cannot run a packed batch"
        )


@contextmanager
def replacing_sdpa(model: nn.Module) -> Iterator[None]:
    """Within a with block, this module's attention in place of torch's; a model with any other is left as it is."""
    if model.config._attn_implementation != "sdpa":
        yield
        return
    with implemented_by(registered(), model):
        yield


@contextmanager
def implemented_by(name: str, model: nn.Module) -> Iterator[None]:
    """Within a with block, the attention registered by this name in place of the model's own and those of its parts."""
    theirs = _implementations(model.config)
    copies = [(config, config._attn_implementation) for config in _copies(model)]
    model.set_attn_implementation(name)
    for config, _ in copies:
        config._attn_implementation = model.config._attn_implementation
    try:
        yield
    finally:
        model.set_attn_implementation(theirs)
        for config, its in copies:
            config._attn_implementation = its


def _copies(model: nn.Module) -> list[PretrainedConfig]:
    """The configurations that layers do not share with a model, as layers that were copied do not: it leaves them as they are."""
    held = [(module, config) for module in model.modules() if (config := vars(module).get("config")) is not None]
    models = {id(config) for module, config in held if hasattr(type(module), "set_attn_implementation")}
    layers = {id(config): config for _, config in held if hasattr(config, "_attn_implementation")}
    return [config for number, config in layers.items() if number not in models]


def _implementations(config: PretrainedConfig) -> str | dict[str, Any]:
    """What `set_attn_implementation` takes: the configuration's own, and by their names those of the ones in it, of an image's say."""
    held = {name: getattr(config, name, None) for name in config.sub_configs}
    inner = {name: _implementations(its) for name, its in held.items() if its is not None}
    inner = {name: its for name, its in inner.items() if its is not None}  # MPT's has none
    own = config._attn_implementation
    return {"": own, **inner} if inner else own


@contextmanager
def watching() -> Iterator[Watched]:
    """Within a with block, what it gives learns of each attention call and mask that passes through here."""
    token = _watched.set(watched := Watched())
    try:
        yield watched
    finally:
        _watched.reset(token)


@contextmanager
def decoding(rows: Decoding) -> Iterator[None]:
    """Around a pass of one token per row: no mask is made."""
    token = _decoding.set(rows)
    try:
        yield
    finally:
        _decoding.reset(token)


def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    """As the rows do that are decoded: see `Decoding.attend`."""
    return _decoding.get().attend(layer, query, key, value, **options)


def _mask(*args, **kwargs) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    if (watched := _watched.get()) is not None:
        # Of chunks, the window is their size; vmap is for masks that somebody brings.
        watched.windows |= {kwargs["local_size"]} if kwargs.get("local_size") is not None else set()
        watched.other_masks |= kwargs.get("use_vmap", False) or "allow_is_bidirectional_skip" in kwargs
    if (packing := _packing.get()) is not None:  # no sequence of which is longer than a chunk (`Positions.chunk`)
        return _as_mask(packing.lengths, kwargs.get("local_size"))
    return None if _decoding.get() is not None else sdpa_mask(*args, **kwargs)


def _as_mask(lengths: PackedLengths, window: int | None) -> Tensor:
    """int64 [1, 1, 1, 1 + sequences] on the CPU, or with a window [1, 1, 2, 1 + sequences]; real masks are of another dtype.

    Four dimensions as a mask has, since some models slice them (Gemma 4).
    """
    mask = torch.tensor([lengths.shared, *lengths.own], device="cpu")
    rows = [mask] if window is None else [mask, torch.full_like(mask, window)]
    return torch.stack(rows)[None, None]


def _rows_of(mask: Tensor | None) -> list[list[int]]:
    """Those that `_as_mask` stacked; none of a real mask."""
    return mask[0, 0].tolist() if mask is not None and mask.dtype == torch.int64 and mask.dim() == 4 else []


def _lengths_of(mask: Tensor | None) -> PackedLengths | None:
    rows = _rows_of(mask)
    return PackedLengths(rows[0][0], tuple(rows[0][1:])) if rows else None


def _window_of(mask: Tensor | None) -> int | None:
    rows = _rows_of(mask)
    return rows[1][0] if len(rows) == 2 else None


def _forward(
    module: nn.Module,
    query: Tensor,  # [batch, heads, tokens, head_dim]
    key: Tensor,  # [batch, kv_heads, keys, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_lengths: PackedLengths | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    s_aux: Tensor | None = None,  # sinks [heads]
    **kwargs,
) -> tuple[Tensor, None]:
    for name in kwargs.keys() - _HARMLESS:
        if isinstance(kwargs[name], Tensor):  # a bias, which keys to attend to
            raise Unknown(f"model: its attention is given {name}, which this version does not know")
    packed_lengths = _lengths_of(attention_mask) if packed_lengths is None else packed_lengths
    if (watched := _watched.get()) is not None:
        layer, same_shape = getattr(module, "layer_idx", None), key.shape == value.shape
        watched.calls.append(
            AttentionCall(
                layer,
                packed_lengths is not None,
                key.data_ptr(),
                same_shape,
                key.shape[3],
                scaling,
                softcap,
                sliding_window,
                s_aux is not None,
            )
        )
    if _decoding.get() is not None:
        token = (states[:, :, 0] for states in (query, key, value))
        options = {"window": sliding_window, "scale": scaling, "softcap": softcap}
        return attend(module.layer_idx, *token, **options)[:, None], None
    if packed_lengths is None and softcap is None and s_aux is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if packed_lengths is not None:
        if (packing := _packing.get()) is not None:
            packing.calls += 1
        sliding_window = _window_of(attention_mask) if sliding_window is None else sliding_window
        tokens = (x[0].transpose(0, 1) for x in (query, key, value))
        like = query.device, query.dtype, query.shape[3], softcap
        alike = key.shape == value.shape and query.dtype == key.dtype == value.dtype
        if alike and not packed_lengths.shared and dropout == 0 and s_aux is None and varlen.takes(*like):
            return varlen.attend(*tokens, packed_lengths.own, sliding_window, scaling, softcap)[None], None
        if s_aux is None and _has_kernel(query, key, value, dropout):
            lengths = (packed_lengths.shared, *packed_lengths.own)
            out = packed_attention(*tokens, lengths, scale=scaling, softcap=softcap, window=sliding_window)
            return out[None], None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if packed_lengths is None:
        causal = attention_mask is None and query.shape[2] > 1
        out = _attend(query, key, value, attention_mask, causal, None, softcap, dropout, scaling, s_aux)
        return out.transpose(1, 2).contiguous(), None
    shared, own = packed_lengths
    begin, *rest = zip(*(x.split([shared, *own], dim=2) for x in (query, key, value)), strict=True)
    pieces = [begin] if shared else []
    for q, k, v in rest:
        pieces.append((q, torch.cat([begin[1], k], dim=2), torch.cat([begin[2], v], dim=2)) if shared else (q, k, v))
    pieces = [_attend(*piece, None, True, sliding_window, softcap, dropout, scaling, s_aux) for piece in pieces]
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _has_kernel(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether a packed batch is attended to in one call of `packed_attention`; if not, its sequences are one by one."""
    return (
        dropout == 0
        and key.shape == value.shape
        and query.dtype == key.dtype == value.dtype  # autocast leaves others
        and backend.why_not("packed_attention", "native", query.device.type, query.dtype) is None
    )


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
    sinks: Tensor | None,
) -> Tensor:
    tokens, keys = query.shape[2], key.shape[2]
    fused = softcap is None and sinks is None
    if causal and (not fused or tokens < keys or (window is not None and keys > window)):
        mask, causal = _seen(tokens, keys, window, query.device), False
    if fused:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling
        )
    scores = (query @ key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1).to(scores.dtype)], dim=3)
    weights = nn.functional.dropout(scores.float().softmax(-1).to(query.dtype), dropout)
    return weights[..., :keys] @ value


def _seen(tokens: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """bool [tokens, keys]: which keys the last `tokens` of so many see."""
    size = max(64, 1 << (keys - 1).bit_length())
    square = _square(size, None if window is None or window >= keys else window, device)
    return square[keys - tokens : keys, :keys]


@lru_cache(maxsize=4)  # all layers ask for the same, and sequences of any length for parts of one
def _square(size: int, window: int | None, device: torch.device) -> Tensor:
    ahead = torch.arange(size, device=device)[:, None] - torch.arange(size, device=device)
    return (ahead >= 0) & (ahead < (window or size))
