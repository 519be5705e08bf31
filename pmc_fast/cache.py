"""A key/value cache that goes from prompts to samples, grows in place, and gives up rows that finish."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class _Layer(CacheLayerMixin):
    """Keys and values [rows, heads, capacity, head_dim]; the first `length` positions are filled.

    Once shared, they are those of the samples, which come after the prompts' [prompts, heads, positions, head_dim].
    """

    is_sliding = False  # whole length kept; the mask applies a window where the model has one

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0
        self.prefix_keys: Tensor | None = None
        self.prefix_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._allocate(key_states), self._allocate(value_states)
        self.is_initialized = True

    def _allocate(self, like: Tensor, rows: int | None = None) -> Tensor:
        batch, heads, _, size = like.shape
        return like.new_empty(batch if rows is None else rows, heads, self.capacity, size)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, begin : self.length] = key_states
        self.values[:, :, begin : self.length] = value_states
        return self.filled()

    def next_position(self) -> tuple[Tensor, Tensor]:
        """One more position [rows, heads, head_dim] of keys and of values, to be written."""
        self.length += 1
        return self.keys[:, :, self.length - 1], self.values[:, :, self.length - 1]

    def filled(self) -> tuple[Tensor, Tensor]:
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def fan_out(self, copies: int, more: int) -> None:
        filled = self.filled()
        self.capacity = self.length + more
        for name, old in zip(("keys", "values"), filled, strict=True):
            new = self._allocate(old, old.shape[0] * copies)
            new.unflatten(0, (-1, copies))[:, :, :, : self.length] = old[:, None]
            setattr(self, name, new)

    def share(self, copies: int, more: int) -> None:
        self.prefix_keys, self.prefix_values = self.filled()
        self.capacity, self.length = more, 0
        rows = self.keys.shape[0] * copies
        self.keys, self.values = self._allocate(self.keys, rows), self._allocate(self.values, rows)

    def move(self, source: Tensor, destination: Tensor, rows: int) -> None:
        for name in ("keys", "values"):
            held = getattr(self, name)
            held[destination, :, : self.length] = held[source, :, : self.length]
            setattr(self, name, held[:rows])

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

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[_Layer(capacity) for _ in range(layers)])

    def fan_out(self, copies: int, more: int) -> None:
        """Row r becomes rows r * copies ... (r + 1) * copies - 1, each with room for `more` positions."""
        for layer in self.layers:
            layer.fan_out(copies, more)

    def share(self, copies: int, more: int) -> None:
        """What is held becomes the prefix of `copies` empty rows each, with room for `more` positions."""
        for layer in self.layers:
            layer.share(copies, more)

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
