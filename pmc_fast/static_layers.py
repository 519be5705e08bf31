"""One token per row through layers of a known kind on a GPU, over keys and values in fixed memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from pmc_fast import gpu
from pmc_fast.decoder_layers import Unknown, read_layers
from pmc_fast.gpu.gemm import write_logits
from pmc_fast.joint_linear import COPY_SHARE, JointLinear, JointLinears
from pmc_fast.layer_parts import Layer, Layers, LinearParts, NormParts
from pmc_fast.memory import free_bytes
from pmc_fast.models import LanguageModel
from pmc_fast.prefill import Prefill
from pmc_fast.side_by_side import side_by_side
from pmc_fast.static_cache import StaticCache
from pmc_fast.static_rows import Sizes, StaticRows, known_positions

ROTARY_KINDS = ("default", "linear", "llama3", "yarn")  # whose angles depend on positions alone


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
        options = {"centered": part.centered, "offset": part.offset, "added": added, "out": out}
        return gpu.kernels("elementwise").normalize(x, part.weight, part.bias, part.epsilon, **options)


@dataclass(frozen=True)
class _Linear:
    parts: LinearParts

    def __call__(self, x: Tensor) -> Tensor:
        return self.adapted(_product(x, self.parts.weight, self.parts.bias), x)

    def adapted(self, out: Tensor, x: Tensor) -> Tensor:
        """`out`, to which is added what adapters make of x."""
        for down, up, scale in self.parts.adapters:
            out += scale * (x.to(down.dtype) @ down.T @ up.T)
        return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_empty(len(x), len(weight))
    write_logits(x, weight, bias, out)
    return out


@dataclass(frozen=True)
class _Products:
    """Of the same rows: all by `joint`, or each by its own weight."""

    linears: tuple[_Linear, ...]
    joint: JointLinear | None

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """[N, O] each; their rows may lie apart."""
        if self.joint is None:
            return side_by_side(x, self.linears)
        states = _product(x, self.joint.weight, self.joint.bias).split(
            [len(linear.parts.weight) for linear in self.linears], 1
        )
        return [linear.adapted(its, x) for linear, its in zip(self.linears, states, strict=True)]


def read_static_layers(lm: LanguageModel, filled: Prefill) -> Layers[_Norm, _Linear]:
    """The model's layers as `StaticLayers` calls them.

    Raises:
        Unknown: one of the model's parts is of no known kind, or its angles depend on more than positions.
    """
    dtype = filled.hidden.dtype
    layers = read_layers(lm, filled.calls, lambda parts: _Norm(parts, dtype), _Linear)
    kinds = getattr(layers.angles.rotary, "rope_type", "default")
    if not {*(kinds.values() if isinstance(kinds, dict) else [kinds])} <= {*ROTARY_KINDS}:
        raise Unknown
    return layers


def read_in_place(layers: Layers[_Norm, _Linear]) -> Iterator[Hashable]:
    """Where the tensors lie that a step reads, and the numbers that are in it."""
    yield layers.embed.scale
    for layer in layers.layers:
        yield replace(layer.attention, keys_at=0, packed=False), layer.activation, layer.clip, layer.rotary
    rotary = layers.angles.rotary
    tensors = [layers.embed.weight, layers.embed.positions, *(() if rotary is None else rotary.buffers())]
    for part in chain([layers.final], *(vars(layer).values() for layer in layers.layers)):
        if isinstance(part, (_Norm, _Linear)):
            tensors += [part.parts.weight, part.parts.bias]
        if isinstance(part, _Norm):
            yield part.parts.epsilon
        if isinstance(part, _Linear):
            for down, up, scale in part.parts.adapters:
                tensors += [down, up]
                yield scale
    for tensor in tensors:
        yield None if tensor is None else tensor.data_ptr()


def _has_norms_of_heads(layer: Layer[_Norm, _Linear]) -> bool:
    norm = layer.query_norm
    return norm is not None and len(norm.parts.weight) != len(layer.query.parts.weight)


class StaticLayers(StaticCache):
    """The layers, and memory for keys and values. See `StaticCache`.

    Args:
        copies: whether weights may be copied, for one product in place of several.
    """

    name = "cuda graph"

    def __init__(
        self, layers: Layers[_Norm, _Linear], copies: bool, filled: Prefill, sizes: Sizes, keeps: bool
    ) -> None:
        super().__init__(filled, sizes, keeps)
        self.layers = layers
        joints = JointLinears(int(free_bytes(filled.hidden.device) * COPY_SHARE) if copies else 0)
        self._attention, self._mlp = [], []
        for layer in layers.layers:
            for products, linears, joins in (
                # A norm of each head wants the heads of all rows at one distance.
                (self._attention, (layer.query, layer.key, layer.value), not _has_norms_of_heads(layer)),
                (self._mlp, (layer.gate, layer.up), True),
            ):
                linears = tuple(linear for linear in linears if linear is not None)
                joint = joints.of([linear.parts for linear in linears]) if joins else None
                products.append(_Products(linears, joint))
        position = torch.arange(sizes.width + sizes.steps, device=filled.hidden.device)
        self._cosine, self._sine = layers.angles(position, layers.embed.weight.dtype)  # float32 [K, positions, R]

    @property
    def joints(self) -> list[JointLinear]:
        return [products.joint for products in (*self._attention, *self._mlp) if products.joint is not None]

    def begin(self, filled: Prefill) -> None:
        super().begin(filled)
        for joint in self.joints:
            joint.refresh()

    def hidden(self, of: StaticRows, rows: int) -> Tensor:
        """The last hidden states [rows, D] of one more token for each of the first rows."""
        elementwise, attend = gpu.kernels("elementwise"), self.attention(of, rows)
        layers = self.layers
        position, length = of.position[:rows], of.step[:rows]
        learned = position if layers.embed.positions is None else known_positions(of, rows)
        hidden = layers.embed(of.token[:rows], learned)
        added = None
        for index, layer in enumerate(layers.layers):
            keys, values = self.own[index, :, :rows]
            x = self._input(layer.norm, hidden, added)
            made = self._attention[index](x)
            if layer.clip is not None:
                for states in made:
                    states.clamp_(-layer.clip, layer.clip)
            for states, norm in zip(made, (layer.query_norm, layer.key_norm), strict=False):
                if norm is not None:
                    norm.in_place(states.view(-1, len(norm.parts.weight)))
            query, key, value = layer.heads(made, layers.head_dim)
            angles = self._cosine[layer.rotary], self._sine[layer.rotary]
            turned = elementwise.rotate_and_append(query, key, value, *angles, position, length, keys, values)
            call = layer.attention
            attended = attend(index, turned, window=call.window, scale=call.scaling, softcap=call.softcap)
            output = layer.output(attended.flatten(1))
            if layer.output_norm is not None:
                layer.output_norm.in_place(output)
            if not layer.parallel:
                y = self._input(layer.mlp_norm, hidden, output)
            else:
                y = x if layer.mlp_norm is None else layer.mlp_norm(hidden)
            gated = self._mlp[index](y)
            added = layer.down(elementwise.activate(gated[0], layer.activation, *gated[1:]))
            if layer.down_norm is not None:
                layer.down_norm.in_place(added)
            if layer.parallel:
                added += output
        return layers.final(hidden, added)

    def _input(self, norm: _Norm | None, hidden: Tensor, added: Tensor | None) -> Tensor:
        """What is added to the hidden states, normalised."""
        if norm is not None:
            return norm(hidden, added)
        if added is not None:
            hidden += added
        return hidden.to(self.layers.embed.weight.dtype)
