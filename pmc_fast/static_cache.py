"""Keys and values of a sampling call on a GPU, in fixed memory: the prompts' once, and the rows' own; attention over both."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from pmc_fast import gpu
from pmc_fast.joint_linear import JointLinear
from pmc_fast.prefill import Prefill
from pmc_fast.static_rows import Sizes, StaticRows


class StaticCache:
    """What every step reads and appends to.

    Args:
        filled: a pass over some prompts, which shows what keys and values look like.
        keeps: whether prompts' keys and values are copied to an address of their own; otherwise they are read where the
            prefill left them.

    Attributes:
        own: [layers, 2, rows, kv_heads, steps, head_dim], the keys and values that the rows' own tokens have.
    """

    def __init__(self, filled: Prefill, sizes: Sizes, keeps: bool) -> None:
        self._sizes, layers = sizes, filled.cache.layers
        _, kv_heads, _, head_dim = layers[0].keys.shape

        def positions(count: int, length: int) -> Tensor:
            return layers[0].keys.new_empty(len(layers), 2, count, kv_heads, length, head_dim)

        self._kept_prefix = positions(sizes.prompts, sizes.width) if keeps else None
        self._prefix: Sequence[Sequence[Tensor]] = ()
        self.own = positions(sizes.rows, sizes.steps)

    @property
    def joints(self) -> Sequence[JointLinear]:
        """Whose copies of weights it holds, perhaps beside others."""
        return ()

    @property
    def held_bytes(self) -> int:
        """Of keys and values."""
        return self.own.nbytes + (0 if self._kept_prefix is None else self._kept_prefix.nbytes)

    def begin(self, filled: Prefill) -> None:
        """Take the prompts' keys and values, which end where the prefix ends."""
        self._prefix = [layer.filled() for layer in filled.cache.layers]
        if self._kept_prefix is not None:
            pad = self._sizes.width - filled.cache.get_seq_length()
            for mine, its in zip(self._kept_prefix.flatten(0, 1), chain(*self._prefix), strict=True):
                mine[:, :, pad:] = its
            self._prefix = self._kept_prefix

    def attention(self, of: StaticRows, rows: int) -> StepAttention:
        """That of one more token for each of the first rows, whose keys and values are appended first."""
        return StepAttention(self.own[:, :, :rows], self._prefix, self._sizes.width, of, rows)


class StepAttention:
    """See `StaticCache.attention`."""

    def __init__(self, own: Tensor, prefix: Sequence[Sequence[Tensor]], width: int, of: StaticRows, rows: int) -> None:
        self._own, self._prefix, self._width = own, prefix, width
        self._length, self._prefix_row = of.step[:rows], of.prefix_row[:rows]
        self._first: dict[int | None, Tensor] = {None: of.first[:rows]}  # that a row sees, by window
        self._sharers: dict[int, Tensor] = {}  # rows that share a prompt, by heads; found once for all layers
        self._kernel = gpu.kernels("decode_attention").decode_attention

    def __call__(
        self, layer: int, query: Tensor, *, window: int | None, scale: float | None, softcap: float | None
    ) -> Tensor:
        """[rows, H, D] of a query [rows, H, D]."""
        if window not in self._first:
            self._first[window] = torch.maximum(self._first[None], self._length + (self._width - window))
        (keys, values), (prefix_keys, prefix_values) = self._own[layer], self._prefix[layer]
        kernels, (rows, heads, _) = gpu.kernels("prefix_attention"), query.shape
        at_once = kernels.faster_at_once(rows, prefix_keys, heads, window)
        if at_once and heads not in self._sharers:
            group = heads // prefix_keys.shape[1]
            self._sharers[heads] = kernels.sharers_of(self._prefix_row, len(prefix_keys), group)
        return self._kernel(
            query,
            keys,
            values,
            self._first[window],
            scale=query.shape[2] ** -0.5 if scale is None else scale,
            softcap=softcap,
            prefix_key=prefix_keys,
            prefix_value=prefix_values,
            prefix_row=self._prefix_row,
            length=self._length,
            sharers=self._sharers[heads] if at_once else None,
        )
