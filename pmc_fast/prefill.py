"""One pass over the prompts of a sampling call, which leaves their keys and values in a cache."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from pmc_fast import attention, packed_layers
from pmc_fast.cache import CacheBytes, SampleCache, layers_of
from pmc_fast.errors import UserError
from pmc_fast.models import LanguageModel
from pmc_fast.packing import pack
from pmc_fast.state_cache import StateCache, check_rows

# Prompts are packed if that leaves so many of the tokens of the padded batch at most.
MOST_TOKENS = 0.95

# Backbones whose packed prompts were of no use, so that the padded ones had to be run as well: once is enough.
_padded_only: WeakSet[nn.Module] = WeakSet()

# What a row takes, by backbone, and the dtypes that it was found with.
_cache_bytes: WeakKeyDictionary[nn.Module, tuple[frozenset[torch.dtype], CacheBytes]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Prefill:
    """hidden: the prompts' last hidden states [B, D]; mask: int64 [B, T]; position: int64 [B], of the last tokens.

    suits_decode_attention: whether `decode_attention` could have done the attention calls, from what the cache holds.
    """

    hidden: Tensor
    cache: SampleCache | StateCache
    mask: Tensor
    padded: bool
    position: Tensor
    calls: list[attention.AttentionCall]
    suits_decode_attention: bool

    @property
    def padding(self) -> Tensor:
        """int64 [B], the tokens of padding before each prompt."""
        return (self.mask == 0).sum(1)


def prefill(lm: LanguageModel, input_ids: Tensor, attention_mask: Tensor | None) -> Prefill:
    """Run the model over prompts padded on the left.

    On a CPU, prompts that begin alike (a chat template, a system prompt) or are of other lengths are packed: no padding, and the
    beginning once.

    Raises:
        UserError: the model does not use the cache, or cannot run from it alone, or takes padding for text.
    """
    width = input_ids.shape[1]
    mask = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
    padded = not bool(mask.all())
    position = (mask.cumsum(1) - 1).clamp(min=0)
    options = {"attention_mask": mask} if padded else {}
    name = type(lm.model).__name__
    if padded and lm.positions.table and "position_ids" not in inspect.signature(lm.backbone.forward).parameters:
        raise UserError(
            f"attention_mask: got padding, but {name} takes a token's place in the row for its position (it has no position_ids); "
            "want prompts of one length"
        )
    try:
        if (packed := _packed(lm, input_ids, mask)) is not None:
            hidden, cache, calls = packed
            return Prefill(hidden, cache, mask, padded, position[:, -1], calls, True)
        cache = _new_cache(lm, width)
        with attention.watching() as watched:
            hidden = lm.hidden(input_ids, cache, position_ids=position, **options)
    except UserError:
        raise
    except (AttributeError, TypeError, ValueError) as error:  # what layers with states that it knows no place for raise
        raise UserError(
            f"model: {name} does not run over the cache it is given ({type(error).__name__}: {error}), so it cannot be sampled from; "
            "want one that keeps keys, values and what else it keeps where transformers has a place for them"
        ) from error
    if not cache.is_filled or (isinstance(cache, SampleCache) and cache.get_seq_length() != width):
        raise UserError("model: it does not fill the key/value cache it is given, so it cannot be sampled from")
    suits = isinstance(cache, SampleCache) and _suits_decode_attention(cache, watched)
    return Prefill(hidden[:, -1], cache, mask, padded, position[:, -1], watched.calls, suits)


def _new_cache(lm: LanguageModel, width: int) -> SampleCache | StateCache:
    """An empty one of so many positions, or one that grows if the model has states besides keys and values."""
    try:
        theirs = StateCache(config=lm.model.config)
    except (AttributeError, KeyError):  # layers of a kind that transformers has no cache for
        theirs = None
    if theirs is None or not theirs.keeps_more:
        return SampleCache(layers_of(lm.model.config), width)
    check_rows(lm)
    return theirs


@torch.no_grad()
def cache_bytes(lm: LanguageModel) -> CacheBytes:
    """What a row takes of keys, values and states, as a pass over a token leaves them, once for a model.

    Configurations do not tell: layers differ (Gemma 4), take others' keys (Gemma 3n), keep what keys are made of (DeepSeek V3), or
    a rank has a part of the heads.

    Raises:
        UserError: as `prefill`.
    """
    dtypes = frozenset(parameter.dtype for parameter in lm.backbone.parameters())
    found_with, found = _cache_bytes.get(lm.backbone, (None, CacheBytes(0, 0)))
    if found_with != dtypes:
        lm.check_causal()
        with lm.at_rest(), torch.autocast(lm.device.type, enabled=False):
            found = prefill(lm, torch.zeros(1, 1, dtype=torch.int64, device=lm.device), None).cache.held
        _cache_bytes[lm.backbone] = dtypes, found
    return found


def _packed(
    lm: LanguageModel, input_ids: Tensor, mask: Tensor
) -> tuple[Tensor, SampleCache, list[attention.AttentionCall]] | None:
    """The last hidden states, cache and attention calls; None if that saves few tokens or the model cannot be packed."""
    model, device = lm.model, input_ids.device
    if device.type != "cpu" or model.config._attn_implementation != attention.NAME:
        return None
    if lm.backbone in _padded_only:
        return None
    # Of chunks only the masks know, and some models scale attention by the place in a row.
    if lm.positions.chunk is not None or lm.positions.tuned is not None:
        return None
    prompts = [ids[kept].tolist() for ids, kept in zip(input_ids, mask.bool(), strict=True)]
    packed = pack(prompts, [[0]] * len(prompts))
    if packed.input_ids.numel() > MOST_TOKENS * input_ids.numel() or lm.unpackable:
        return None
    lm.check_causal()  # here, so that nobody watches
    shared = packed.lengths.shared
    cache = SampleCache(layers_of(model.config), packed.input_ids.shape[1])
    try:
        with attention.watching() as watched:
            hidden = packed.hidden(lm, cache)
        by_layers = lm.packed_by != "modules"  # which know what they attend to
        calls = packed_layers.attention_calls(lm) if by_layers else watched.calls
        suits = by_layers or (_suits_decode_attention(cache, watched) and all(call.packed for call in calls))
    except attention.LengthsLost:
        suits = False
    if not suits:
        _padded_only.add(lm.backbone)
        return None
    # Where each prompt's tokens lie among the packed ones: the beginning first, the rest before its last token.
    column = torch.arange(input_ids.shape[1], device=device)
    place = packed.rows[:, None] - column.flip(0)
    text = column - (mask == 0).sum(1, keepdim=True)
    cache.spread(torch.where(text < shared, text.clamp(min=0), place))
    return hidden, cache, calls


def _suits_decode_attention(cache: SampleCache, watched: attention.Watched) -> bool:
    """Whether it sees all layers, and what these see is told by their windows rather than by masks alone."""
    calls, layers = watched.calls, cache.layers
    return (
        [call.layer for call in calls] == list(range(len(layers)))
        and all(call.same_shape and not call.sinks for call in calls)
        and all(call.keys_at == layer.keys.data_ptr() for call, layer in zip(calls, layers, strict=True))
        and {call.window for call in calls} - {None} == watched.windows
        and not watched.other_masks
    )
