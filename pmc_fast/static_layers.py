"""One token per row through layers of a known kind on a GPU, over keys and values in fixed memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from pmc_fast import gpu
from pmc_fast.attention import AttentionCall
from pmc_fast.decoder_layers import Layers, LinearParts, NormParts, Unknown, read_layers
from pmc_fast.gpu.gemm import write_logits
from pmc_fast.models import LanguageModel
from pmc_fast.prefill import Prefill
from pmc_fast.side_by_side import side_by_side
from pmc_fast.static_rows import Sizes, StaticRows

_ROTARY_KINDS = ("default", "linear", "llama3", "yarn")  # whose angles depend on positions alone


@dataclass(frozen=True)
class _Norm:
    parts: NormParts
    dtype: torch.dtype

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        return self._write(x, added, torch.empty(x.shape, dtype=self.dtype, device=x.device))

    def in_place(self, x: Tensor) -> None:
        self._write(x, None, x)

    def _write(self, x: Tensor, added: Tensor | None, out: Tensor) -> Tensor:
        part = self.parts
        normalize = gpu.kernels("elementwise").normalize
        return normalize(x, part.weight, part.bias, part.epsilon, centered=part.centered, added=added, out=out)


@dataclass(frozen=True)
class _Linear:
    parts: LinearParts

    def __call__(self, x: Tensor) -> Tensor:
        out = x.new_empty(len(x), len(self.parts.weight))
        write_logits(x, self.parts.weight, self.parts.bias, out)
        for down, up, scale in self.parts.adapters:
            out += scale * (x.to(down.dtype) @ down.T @ up.T)
        return out


def read_static_layers(lm: LanguageModel, filled: Prefill) -> Layers[_Norm, _Linear]:
    """The model's layers as `StaticLayers` calls them.

    Raises:
        Unknown: one of the model's parts is of no known kind.
    """
    dtype = filled.hidden.dtype
    layers = read_layers(lm, filled.calls, lambda parts: _Norm(parts, dtype), _Linear)
    if getattr(layers.rotary, "rope_type", None) not in _ROTARY_KINDS:
        raise Unknown
    return layers


def read_in_place(layers: Layers[_Norm, _Linear]) -> Iterator[float | None]:
    """Where the weights lie that a step reads, and the numbers that it multiplies them with."""
    tensors = [layers.embed.weight]
    for part in chain([layers.final], *(vars(layer).values() for layer in layers.layers)):
        if isinstance(part, (_Norm, _Linear)):
            tensors += [part.parts.weight, part.parts.bias]
        if isinstance(part, _Linear):
            for down, up, scale in part.parts.adapters:
                tensors += [down, up]
                yield scale
    for tensor in tensors:
        yield None if tensor is None else tensor.data_ptr()


class StaticLayers:
    """The layers, and memory for keys and values: the prompts' once, and the rows' own.

    Args:
        keeps: whether prompts' keys and values are copied to an address of their own; otherwise they are read where the
            prefill left them.

    Attributes:
        own: [layers, 2, rows, kv_heads, steps, head_dim], the rows' own keys and values.
    """

    def __init__(self, layers: Layers[_Norm, _Linear], sizes: Sizes, keeps: bool) -> None:
        self.layers, self._sizes = layers, sizes
        weight = layers.embed.weight
        kv_heads = len(layers.layers[0].key.parts.weight) // layers.head_dim

        def positions(count: int, length: int) -> Tensor:
            shape = (len(layers.layers), 2, count, kv_heads, length, layers.head_dim)
            return torch.empty(shape, dtype=weight.dtype, device=weight.device)

        self._kept_prefix = positions(sizes.prompts, sizes.width) if keeps else None
        self._prefix: Sequence[Sequence[Tensor]] = ()
        self.own = positions(sizes.rows, sizes.steps)
        self._cosine, self._sine = self._angles(sizes.width + sizes.steps)

    @property
    def held_bytes(self) -> int:
        return self.own.nbytes + (0 if self._kept_prefix is None else self._kept_prefix.nbytes)

    def _angles(self, positions: int) -> list[Tensor]:
        """Cosines and sines of the rotary embedding, float32 [positions, R]."""
        like = self.layers.embed.weight[:1, :1]
        index = torch.arange(positions, device=like.device)[None]
        return [x[0].float().contiguous() for x in self.layers.rotary(like, position_ids=index)]

    def begin(self, filled: Prefill) -> None:
        """Take the prompts' keys and values, which end where the prefix ends."""
        self._prefix = [layer.filled() for layer in filled.cache.layers]
        if self._kept_prefix is not None:
            pad = self._sizes.width - filled.cache.get_seq_length()
            for mine, its in zip(self._kept_prefix.flatten(0, 1), chain(*self._prefix), strict=True):
                mine[:, :, pad:] = its
            self._prefix = self._kept_prefix

    def hidden(self, of: StaticRows, rows: int) -> Tensor:
        """The last hidden states [rows, D] of one more token for each of the first rows."""
        elementwise, kernel = gpu.kernels("elementwise"), gpu.kernels("decode_attention").decode_attention
        layers, dim = self.layers, self.layers.head_dim
        position, length, prefix_row = of.position[:rows], of.step[:rows], of.prefix_row[:rows]
        hidden = layers.embed(of.token[:rows]).float()
        first: dict[int | None, Tensor] = {None: of.first[:rows]}
        added = None
        for layer, (prefix_keys, prefix_values), own in zip(layers.layers, self._prefix, self.own, strict=True):
            keys, values = own[:, :rows]
            x = layer.norm(hidden, added)
            query, key, value = (
                part.view(rows, -1, dim) for part in side_by_side(x, (layer.query, layer.key, layer.value))
            )
            for states, norm in ((query, layer.query_norm), (key, layer.key_norm)):
                if norm is not None:
                    norm.in_place(states.view(-1, dim))
            turned = elementwise.rotate_and_append(
                query, key, value, self._cosine, self._sine, position, length, keys, values
            )
            call = layer.attention
            if call.window not in first:
                first[call.window] = torch.maximum(first[None], length + (self._sizes.width - call.window))
            attended = kernel(
                turned,
                keys,
                values,
                first[call.window],
                scale=_scale(call),
                softcap=call.softcap,
                prefix_key=prefix_keys,
                prefix_value=prefix_values,
                prefix_row=prefix_row,
                length=length,
            )
            added = layer.output(attended.flatten(1))
            if layer.gate is None:
                added += layer.down(elementwise.activate(layer.up(x), "gelu_tanh"))
            else:
                gate, up = side_by_side(layer.mlp_norm(hidden, added), (layer.gate, layer.up))
                added = layer.down(elementwise.activate(gate, "silu", up))
        return layers.final(hidden, added)


def _scale(call: AttentionCall) -> float:
    return call.head_dim**-0.5 if call.scaling is None else call.scaling
