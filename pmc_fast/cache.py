"""A key/value cache that grows in place, fans out from prompts to samples, and gives up rows that finish."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class _Layer(CacheLayerMixin):
    """Keys and values [rows, heads, capacity, head_dim]; the first `length` positions are filled."""

    is_sliding = False  # whole length kept; the mask applies a window where the model has one

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._allocate(key_states), self._allocate(value_states)
        self.is_initialized = True

    def _allocate(self, like: Tensor, rows: int | None = None) -> Tensor:
        batch, heads, _, size = like.shape
        return like.new_empty(rows or batch, heads, self.capacity, size)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def fan_out(self, copies: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._allocate(old, old.shape[0] * copies)
            filled = old[:, None, :, : self.length].expand(-1, copies, -1, -1, -1)
            new.view(old.shape[0], copies, *new.shape[1:])[:, :, :, : self.length] = filled
            setattr(self, name, new)

    def move(self, source: Tensor, destination: Tensor, rows: int) -> None:
        for name in ("keys", "values"):
            held = getattr(self, name)
            held[destination, :, : self.length] = held[source, :, : self.length]
            setattr(self, name, held[:rows])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class SampleCache(Cache):
    """One `_Layer` per layer of the model, each of `capacity` positions."""

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[_Layer(capacity) for _ in range(layers)])

    def fan_out(self, copies: int) -> None:
        """Row r becomes rows r * copies ... (r + 1) * copies - 1."""
        for layer in self.layers:
            layer.fan_out(copies)

    def move(self, source: Tensor, destination: Tensor, rows: int) -> None:
        """Copy rows onto others, then keep the first `rows`."""
        for layer in self.layers:
            layer.move(source, destination, rows)


def layers_of(config) -> int:
    return config.get_text_config(decoder=True).num_hidden_layers


def retired(finished: Tensor) -> tuple[Tensor, Tensor, int]:
    """Which unfinished rows to copy onto which finished ones so that the unfinished come first, and how many they are.

    Moves as few rows as possible: those at the end fill the holes before it.
    """
    rows = int((~finished).sum())
    holes = finished[:rows].nonzero()[:, 0]
    movers = (~finished[rows:]).nonzero()[:, 0] + rows
    return movers, holes, rows


def move_rows(values: Tensor, source: Tensor, destination: Tensor, rows: int) -> Tensor:
    values[destination] = values[source]
    return values[:rows]
