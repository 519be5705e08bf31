"""Decodes a model of a known kind by this library's own CPU kernels, from the weights that `fast_linear` packed, or as they lie."""

from __future__ import annotations

import math

from torch import Tensor

from pmc_fast.attention import AttentionCall
from pmc_fast.cache import SampleCache
from pmc_fast.decoder_layers import Unknown, read_layers
from pmc_fast.fast_linear import operand
from pmc_fast.layer_parts import Adapter, LinearParts, NormParts
from pmc_fast.models import LanguageModel
from pmc_fast.native import decoder
from pmc_fast.native.packed_linear import PackedWeight, pack


class FusedDecoder:
    """The layers of a model, read once for the time of a sampling call. See `fused_decoder`."""

    def __init__(self, lm: LanguageModel, calls: list[AttentionCall], cache: SampleCache) -> None:
        if lm.device.type != "cpu":
            raise Unknown
        read = read_layers(lm, calls, _norm, _linear)
        self._embed, self._angles, self._dtype = read.embed, read.angles, read.embed.weight.dtype
        self._cache = cache
        layers = []
        for layer in read.layers:
            parts = dict(vars(layer))
            call = parts.pop("attention")
            scale = read.head_dim**-0.5 if call.scaling is None else call.scaling
            clip = math.inf if layer.clip is None else layer.clip
            attention = {"window": call.window or 0, "scale": scale, "softcap": call.softcap or 0.0}
            layers.append({**parts, "clip": clip, **attention})
        tensors = ([getattr(layer, name) for layer in cache.layers] for name in _CACHED)
        self._decoder = decoder.Decoder(layers, read.final, read.head_dim, *tensors)

    def step(self, token: Tensor, position: Tensor, first: Tensor, prefix_row: Tensor) -> Tensor:
        """The last hidden states [N, D] of one more token per row, whose keys and values join the cache.

        Args:
            token, position: int64 [N].
            first: int64 [N], the first position that a row sees.
            prefix_row: int64 [N], each row's prompt.
        """
        cosine, sine = self._angles(position, self._dtype)
        for layer in self._cache.layers:
            layer.length += 1
        filled = self._cache.layers[0].length
        return self._decoder.step(self._embed(token, position), cosine, sine, filled, prefix_row, first).to(self._dtype)


_CACHED = ("keys", "values", "prefix_keys", "prefix_values")


def _norm(parts: NormParts) -> decoder.Norm:
    bias = None if parts.bias is None else parts.bias.float()
    return decoder.Norm(parts.weight.float() + parts.offset, bias, parts.epsilon, parts.centered)


def _linear(parts: LinearParts) -> decoder.Linear:
    if (weight := operand(parts.whole, parts.begin, parts.begin + len(parts.weight))) is None:
        raise Unknown
    bias = None if parts.bias is None else parts.bias.float()
    return decoder.Linear(weight, bias, tuple(_adapter(adapter) for adapter in parts.adapters))


def _adapter(adapter: Adapter) -> tuple[PackedWeight, PackedWeight]:
    return pack(adapter.down.float()), pack(adapter.up.float() * adapter.scale)


def fused_decoder(lm: LanguageModel, calls: list[AttentionCall], cache: SampleCache) -> FusedDecoder | None:
    """A decoder for this model, or None if one of its parts is not known or torch multiplies it faster.

    Args:
        calls: the attention calls of a pass through the model.
        cache: the rows', which holds the prompts once for all of them.
    """
    try:
        return FusedDecoder(lm, calls, cache)
    except Unknown:
        return None
