"""A key/value cache that goes from prompts to samples, grows in place, and rearranges its rows."""

from __future__ import annotations

import inspect
from typing import NamedTuple

from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class CacheBytes(NamedTuple):
    """In all layers together."""

    token: int  # keys and values, which tokens add
    row: int  # states, which do not grow


class _Layer(CacheLayerMixin):
    """Keys and values [capacity of rows, heads, capacity, head_dim]; of the first `rows`, `length` positions are filled.

    Once shared, they are those of the samples, which come after the prompts' [prompts, heads, positions, head_dim].
    """

    is_sliding = False  # whole length kept; the mask applies a window where the model has one

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length, self.rows = capacity, 0, 0
        self.prefix_keys: Tensor | None = None
        self.prefix_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.rows = len(key_states)
        self.keys, self.values = (self._allocate(states, self.rows) for states in (key_states, value_states))
        self.is_initialized = True

    def _allocate(self, like: Tensor, rows: int) -> Tensor:
        _, heads, _, size = like.shape
        return like.new_empty(rows, heads, self.capacity, size)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, self.length = self.length, self.length + key_states.shape[2]
        self.keys[: self.rows, :, begin : self.length] = key_states
        self.values[: self.rows, :, begin : self.length] = value_states
        return self.filled()

    def filled(self) -> tuple[Tensor, Tensor]:
        return self.keys[: self.rows, :, : self.length], self.values[: self.rows, :, : self.length]

    def spread(self, position: Tensor) -> None:
        for name in ("keys", "values"):
            setattr(self, name, getattr(self, name)[0][:, position].transpose(0, 1).contiguous())
        self.rows, self.length = position.shape
        self.capacity = self.length

    def grow(self, rows: int, more: int) -> None:
        filled = self.filled()
        self.capacity += more
        self.keys, self.values = (self._allocate(old, rows) for old in filled)
        for new, old in zip(self.filled(), filled, strict=True):
            new.copy_(old)

    def share(self, rows: int, more: int) -> None:
        self.prefix_keys, self.prefix_values = self.filled()
        self.capacity, self.length = more, 0
        self.keys, self.values = self._allocate(self.keys, rows), self._allocate(self.values, rows)

    def arrange(self, source: Tensor, destination: Tensor, rows: int) -> None:
        for held in (self.keys, self.values) if len(source) else ():
            held[destination, :, : self.length] = held[source, :, : self.length]
        self.rows = rows

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def first_seen(self, first: Tensor, window: int | None) -> Tensor:
        """The first position that each row's last token sees: `first` [rows], or the window's begin if that is later."""
        return first if window is None else first.clamp(min=self.get_seq_length() - window)

    def get_seq_length(self) -> int:
        return self.length + (0 if self.prefix_keys is None else self.prefix_keys.shape[2])

    def get_max_length(self) -> int:
        return self.get_seq_length() - self.length + self.capacity


class SampleCache(Cache):
    """One `_Layer` per layer of the model, each of `capacity` positions."""

    attends = True

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[_Layer(capacity) for _ in range(layers)])

    def spread(self, position: Tensor) -> None:
        """From one row of packed texts to a row for each: position t of row r is position [r, t] of before."""
        for layer in self.layers:
            layer.spread(position)

    def grow(self, rows: int, more: int) -> None:
        """Make room for `rows` rows in all, and for `more` positions in each."""
        for layer in self.layers:
            layer.grow(rows, more)

    def share(self, rows: int, more: int) -> None:
        """What is held becomes the prefixes of as many empty rows; there is room for `rows`, of `more` positions each."""
        for layer in self.layers:
            layer.share(rows, more)

    def arrange(self, source: Tensor, destination: Tensor, rows: int) -> None:
        """Copy rows onto others, then keep the first `rows`."""
        for layer in self.layers:
            layer.arrange(source, destination, rows)

    @property
    def is_filled(self) -> bool:
        return all(layer.keys is not None for layer in self.layers)

    @property
    def held(self) -> CacheBytes:
        """Of all tokens, of all rows."""
        return CacheBytes(sum(states.nbytes for layer in self.layers for states in layer.filled()), 0)


def layers_of(config) -> int:
    """How many layers have keys and values of their own; the last ones may take others' (Gemma 3n, Gemma 4)."""
    config = config.get_text_config(decoder=True)
    return config.num_hidden_layers - getattr(config, "num_kv_shared_layers", 0)


def argument_of(backbone: nn.Module) -> str:
    """The name by which it takes a cache: since transformers 5.24 another one, and the old one goes with 5.40; Mamba's own."""
    taken = inspect.signature(backbone.forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in taken), "past_key_values")
