"""What the layers of a decoder are made of, as decoders of our own take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pmc_fast.attention import AttentionCall

Norm, Linear = TypeVar("Norm"), TypeVar("Linear")


@dataclass(frozen=True)
class NormParts:
    """(x - mean) / sqrt(variance + epsilon) * (weight + offset) + bias; the mean is 0 unless `centered`."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float
    centered: bool
    offset: float


class Adapter(NamedTuple):
    """scale * (x @ down.T) @ up.T."""

    down: Tensor  # [r, D]
    up: Tensor  # [O, r]
    scale: float


@dataclass(frozen=True)
class LinearParts:
    """x @ weight.T + bias, and what LoRA adapters add; the weight is `whole`, or its rows from `begin` on."""

    weight: Tensor
    bias: Tensor | None
    adapters: tuple[Adapter, ...]
    whole: Tensor
    begin: int = 0

    def split(self, *sizes: int) -> list[LinearParts]:
        """Products of so many outputs each."""
        return [self._rows(slice(end - size, end)) for size, end in zip(sizes, accumulate(sizes), strict=True)]

    def _rows(self, rows: slice) -> LinearParts:
        bias = None if self.bias is None else self.bias[rows]
        adapters = tuple(adapter._replace(up=adapter.up[rows]) for adapter in self.adapters)
        return LinearParts(self.weight[rows], bias, adapters, self.whole, self.begin + rows.start)


@dataclass(frozen=True)
class Embedding:
    """scale * weight[token] + positions[position + offset] in float32; the row of `padding` gets no gradient."""

    weight: Tensor
    scale: float
    padding: int | None
    positions: Tensor | None  # learned, unless the angles tell them
    offset: int

    def __call__(self, token: Tensor, position: Tensor) -> Tensor:
        rows = nn.functional.embedding(token, self.weight, self.padding).float()
        rows = rows if self.scale == 1 else rows * self.scale
        if self.positions is None:
            return rows
        return rows + nn.functional.embedding(position + self.offset, self.positions)


@dataclass(frozen=True)
class Angles:
    """Rotary embeddings: of each kind that layers name, or the only one (None); or without any."""

    rotary: nn.Module | None
    kinds: tuple[str | None, ...]
    unturned: bool  # whether some layers turn nothing: for them there is one kind more, the last

    def __call__(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions int64 [N] as a model of this dtype has them, float32 [K, N, R]."""
        if self.rotary is None:
            return (position.new_empty(1, len(position), 0, dtype=torch.float32),) * 2
        like = torch.empty(0, dtype=dtype, device=position.device)
        each = [self.rotary(like, position[None], *(() if kind is None else (kind,))) for kind in self.kinds]
        if self.unturned:
            each.append((torch.ones_like(each[0][0]), torch.zeros_like(each[0][1])))
        cosine, sine = (torch.cat(angles).float() for angles in zip(*each, strict=True))
        return cosine, sine


@dataclass(frozen=True)
class Layer(Generic[Norm, Linear]):
    """h += output_norm(output(attention(x))) with x = norm(h), then h += down_norm(down(activation(gate(y)) * up(y))).

    y is mlp_norm(h). If the layer is `parallel`, it is made of the h that x is made of, and is x where there is no mlp_norm.
    Other norms that are None change nothing; without a gate it is activation(up(y)).
    """

    norm: Norm | None
    query: Linear  # without key and value, of each head the query, then its key, then its value
    key: Linear | None
    value: Linear | None
    clip: float | None  # what query, key and value make is kept within this, either way
    query_norm: Norm | None  # as wide as a head or as all of them, like key_norm
    key_norm: Norm | None
    output: Linear
    output_norm: Norm | None
    parallel: bool
    mlp_norm: Norm | None
    gate: Linear | None
    up: Linear
    activation: str  # "silu", "gelu", "gelu_tanh" or "relu"
    down: Linear
    down_norm: Norm | None
    rotary: int  # which of the backbone's angles
    attention: AttentionCall

    def heads(self, states: Sequence[Tensor], head_dim: int) -> Sequence[Tensor]:
        """Queries, keys and values [N, heads, head_dim] in what query, key and value, or the query alone, have made."""
        if self.key is None:
            return states[0].unflatten(1, (-1, 3, head_dim)).unbind(2)
        return [part.unflatten(1, (-1, head_dim)) for part in states]


@dataclass(frozen=True)
class Layers(Generic[Norm, Linear]):
    """A whole backbone."""

    embed: Embedding
    angles: Angles
    layers: list[Layer[Norm, Linear]]
    final: Norm
    head_dim: int
