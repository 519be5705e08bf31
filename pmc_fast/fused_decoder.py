"""Decodes a model of a known kind by this library's own CPU kernels, from the products that `fast_linear` prepared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pmc_fast.attention import AttentionCall
from pmc_fast.cache import SampleCache
from pmc_fast.decoder_layers import Adapter, LinearParts, NormParts, Unknown, read_layers
from pmc_fast.fast_linear import Product, product_with
from pmc_fast.models import LanguageModel
from pmc_fast.native.decode_attention import decode_attention
from pmc_fast.native.elementwise import activate, normalize, rotate


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    bias: Tensor | None
    epsilon: float
    centered: bool

    @classmethod
    def of(cls, parts: NormParts) -> _Norm:
        bias = None if parts.bias is None else parts.bias.float()
        return cls(parts.weight.float(), bias, parts.epsilon, parts.centered)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return normalize(x, self.weight, self.bias, self.epsilon, centered=self.centered, out=out)


@dataclass(frozen=True)
class _Linear:
    product: Product
    bias: Tensor | None
    adapters: tuple[Adapter, ...]

    @classmethod
    def of(cls, parts: LinearParts) -> _Linear:
        if (product := product_with(parts.weight)) is None:
            raise Unknown
        adapters = tuple(Adapter(down.float(), up.float(), scale) for down, up, scale in parts.adapters)
        return cls(product, None if parts.bias is None else parts.bias.float(), adapters)

    def __call__(self, x: Tensor) -> Tensor:
        return self._adapted(self.product(x, self.bias), x)

    def add_to(self, total: Tensor, x: Tensor) -> None:
        self.product.add_to(total, x, self.bias)
        self._adapted(total, x)

    def _adapted(self, total: Tensor, x: Tensor) -> Tensor:
        for down, up, scale in self.adapters:
            total.addmm_(x @ down.T, up.T, alpha=scale)
        return total


class FusedDecoder:
    """The layers of a model, read once for the time of a sampling call. See `fused_decoder`."""

    def __init__(self, lm: LanguageModel, calls: list[AttentionCall]) -> None:
        if lm.device.type != "cpu":
            raise Unknown
        read = read_layers(lm, calls, _Norm.of, _Linear.of)
        self._embed, self._rotary, self._layers, self._final = read.embed, read.rotary, read.layers, read.final
        self._dtype, self._head_dim = read.embed.weight.dtype, read.head_dim

    def step(self, token: Tensor, position: Tensor, cache: SampleCache, first: Tensor, prefix_row: Tensor) -> Tensor:
        """The last hidden states [N, D] of one more token per row, whose keys and values join the cache.

        Args:
            token, position: int64 [N].
            cache: holds what came before, the prompts once for all their rows.
            first: int64 [N], the first position that a row sees.
            prefix_row: int64 [N], each row's prompt.
        """
        embedded = self._embed(token[:, None])
        cosine, sine = (x[:, 0].float().contiguous() for x in self._rotary(embedded, position_ids=position[:, None]))
        hidden = embedded[:, 0].float()
        for layer, held in zip(self._layers, cache.layers, strict=True):
            x = layer.norm(hidden)
            query, key, value = (self._heads(part(x)) for part in (layer.query, layer.key, layer.value))
            for states, norm in ((query, layer.query_norm), (key, layer.key_norm)):
                if norm is not None:
                    norm(states.view(-1, self._head_dim), out=states.view(-1, self._head_dim))
            turned = rotate(query, cosine, sine, torch.empty_like(query, dtype=self._dtype))
            key_slot, value_slot = held.next_position()
            rotate(key, cosine, sine, key_slot)
            value_slot.copy_(value)
            call = layer.attention
            attended = decode_attention(
                turned,
                *held.filled(),
                held.first_seen(first, call.window),
                scale=self._head_dim**-0.5 if call.scaling is None else call.scaling,
                softcap=call.softcap,
                prefix_key=held.prefix_keys,
                prefix_value=held.prefix_values,
                prefix_row=prefix_row,
            )
            layer.output.add_to(hidden, attended.flatten(1).float())
            if layer.mlp_norm is not None:
                x = layer.mlp_norm(hidden)
            if layer.gate is None:
                wide = activate(layer.up(x), "gelu_tanh")
            else:
                wide = activate(layer.gate(x), "silu", layer.up(x))
            layer.down.add_to(hidden, wide)
        return self._final(hidden).to(self._dtype)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self._head_dim)


def fused_decoder(lm: LanguageModel, calls: list[AttentionCall]) -> FusedDecoder | None:
    """A decoder for this model, or None if one of its parts is not known or has no product of `fast_linear`.

    Args:
        calls: the attention calls of a pass through the model.
    """
    try:
        return FusedDecoder(lm, calls)
    except Unknown:
        return None
