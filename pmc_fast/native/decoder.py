"""A decoder's layers, one token further by the C++ kernels alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pmc_fast.errors import scores_not_finite
from pmc_fast.native import address, dtype_code, library
from pmc_fast.native.decode_attention import positions_at
from pmc_fast.native.packed_linear import PackedWeight


class Norm(NamedTuple):
    """(x - mean) / sqrt(variance + epsilon) * weight + bias, float32; the mean is 0 unless `centered`."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float
    centered: bool


class Linear(NamedTuple):
    """x @ weight.T + bias, and (x @ down.T) @ up.T for each pair of adapters."""

    weight: PackedWeight
    bias: Tensor | None
    adapters: tuple[tuple[PackedWeight, PackedWeight], ...]


class Decoder:
    """Layers, and the norm after the last of them, over one cache.

    Args:
        layers: the parts of each by the names of `DecoderLayer`'s fields (csrc/cpu/decoder.h).
        keys, values: of each layer, float32 or bfloat16 [rows, heads, T, head_dim], which a step writes one position of.
        prefix_keys, prefix_values: of each layer, [prompts, heads, S, head_dim], which come before.
    """

    def __init__(
        self,
        layers: Sequence[Mapping[str, Norm | Linear | str | float | None]],
        final: Norm,
        head_dim: int,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        prefix_keys: Sequence[Tensor],
        prefix_values: Sequence[Tensor],
    ) -> None:
        self._held = (layers, final, keys, values, prefix_keys, prefix_values)  # what C++ has the addresses of
        parts = [{name: _part(part) for name, part in layer.items()} for layer in layers]
        self._decoder = library().Decoder(parts, _norm(final), head_dim)
        self._own = [positions_at(*pair) for pair in zip(keys, values, strict=True)]
        self._prefix = [positions_at(*pair) for pair in zip(prefix_keys, prefix_values, strict=True)]
        self._dtype = dtype_code(keys[0].dtype)

    def step(
        self, hidden: Tensor, cosine: Tensor, sine: Tensor, filled: int, prefix_row: Tensor, first: Tensor
    ) -> Tensor:
        """The last hidden states of one more token per row, written over what it is given.

        Args:
            hidden: contiguous float32 [N, D], the tokens embedded.
            cosine, sine: contiguous float32 [K, N, R], of the tokens' positions; a layer's `rotary` is one of the K kinds.
            filled: positions of the cache that are, this token's included.
            prefix_row: contiguous int64 [N], each row's prompt.
            first: contiguous int64 [N], the first position that each row sees.

        Raises:
            ValueError: scores of attention that are not finite.
        """
        bad = self._decoder.step(
            hidden.data_ptr(),
            len(hidden),
            cosine.data_ptr(),
            sine.data_ptr(),
            cosine.shape[2],
            self._dtype,
            self._own,
            self._prefix,
            filled,
            prefix_row.data_ptr(),
            first.data_ptr(),
            torch.get_num_threads(),
        )
        if bad >= 0:
            raise scores_not_finite(bad)
        return hidden


def _part(part: Norm | Linear | str | float | None) -> tuple | str | float | None:
    if isinstance(part, Norm):
        return _norm(part)
    return _linear(part) if isinstance(part, Linear) else part


def _norm(norm: Norm) -> tuple:
    return norm.weight.data_ptr(), address(norm.bias), len(norm.weight), norm.epsilon, norm.centered


def _linear(linear: Linear) -> tuple:
    weight = linear.weight
    adapters = [(down.memory.data_ptr(), up.memory.data_ptr(), down.out_features) for down, up in linear.adapters]
    sizes = weight.out_features, weight.in_features
    at = weight.memory.data_ptr(), dtype_code(weight.memory.dtype), weight.row_stride, weight.rounded
    return *at, address(linear.bias), *sizes, adapters
