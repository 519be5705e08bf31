"""The cache of models that keep states besides keys and values: linear attention, convolutions."""

from __future__ import annotations

from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from pmc_fast.cache import CacheBytes
from pmc_fast.errors import UserError
from pmc_fast.models import LanguageModel, differ

# Layers of transformers' caches that keep keys and values, or nothing.
_KEYS_AND_VALUES = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
# Where those are that this version knows; a model's own may count places, which padding shifts, by more than is tried.
_KNOWN = "transformers.cache_utils"

# Backbones that went on from rearranged rows as from the texts themselves.
_tried: WeakSet[nn.Module] = WeakSet()


class StateCache(DynamicCache):
    """As transformers makes and grows it, in rows that go from prompts to samples.

    attends: whether it has keys at all; Mamba's modules take a mask for the new tokens' alone.
    """

    @property
    def keeps_more(self) -> bool:
        """Whether any layer has something besides keys and values."""
        return any(type(layer).__name__ not in _KEYS_AND_VALUES for layer in self.layers)

    @property
    def attends(self) -> bool:
        return any(hasattr(layer, "keys") for layer in self.layers)

    @property
    def is_filled(self) -> bool:
        """Whether every layer has what it keeps."""
        return all(getattr(layer, "is_initialized", False) or _states_of(layer) for layer in self.layers)

    @property
    def held(self) -> CacheBytes:
        """Of all tokens, of all rows."""
        keys = [x for layer in self.layers for x in vars(layer).values() if isinstance(x, Tensor) and x.dim() > 2]
        states = [state for layer in self.layers for state in _states_of(layer)]
        return CacheBytes(sum(x.nbytes for x in keys), sum(state.nbytes for state in states))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Of a model without attention 0, where transformers raises."""
        return super().get_seq_length(layer_idx) if self.attends else 0

    def grow(self, rows: int, more: int) -> None:
        """Nothing: it does so by itself."""

    def arrange(self, source: Tensor, destination: Tensor, rows: int) -> None:
        """Copy rows onto others, then keep the first `rows`."""
        if len(source) or rows != self.rows:
            row = torch.arange(rows, device=source.device)
            row[destination] = source
            self.reorder_cache(row)

    @property
    def rows(self) -> int | None:
        return next((len(state) for layer in self.layers for state in _states_of(layer)), None)


def _states_of(layer: object) -> list[Tensor]:
    kinds = [getattr(layer, name, {}) for name in ("conv_states", "recurrent_states")]
    return [state for states in kinds for state in states.values() if state is not None]


@torch.no_grad()
def check_rows(lm: LanguageModel) -> None:
    """That rows can be padded on the left, copied and moved: two prompts become three rows, which go on as their texts do.

    It is tried once for a model.

    Raises:
        UserError: they do not, since the model keeps states elsewhere, say, or takes padding for text.
    """
    if lm.backbone in _tried:
        return
    for layer in StateCache(config=lm.model.config).layers:
        if type(layer).__module__ != _KNOWN:
            raise UserError(
                f"model: {type(lm.model).__name__} keeps {type(layer).__name__}, a cache of its own that this version does not know, so it "
                "cannot be sampled from"
            )
    size = lm.head_module.weight.shape[0]

    def last(ids: list[list[int]], cache: StateCache | None = None, **options) -> Tensor:
        return lm.hidden(torch.tensor(ids, device=lm.device) % size, cache, **options)[:, -1]

    long, short = [*range(1, 38)], [*range(11, 35)]  # some models compress a few tokens at a time
    padding = len(long) - len(short)
    with lm.at_rest():
        want = torch.cat([last([[*short, 10]]), last([[*short, 11]]), last([[*long, 12]])])
        cache, mask = StateCache(config=lm.model.config), torch.ones(2, len(long), dtype=torch.int64, device=lm.device)
        mask[1, :padding] = 0
        last([long, [0] * padding + short], cache, attention_mask=mask, position_ids=_positions(mask))
        cache.arrange(*(torch.tensor(rows, device=lm.device) for rows in ([1, 0], [0, 2])), 3)
        mask = torch.cat([mask[[1, 1, 0]], mask.new_ones(3, 1)], dim=1)
        options = {"attention_mask": mask} if cache.attends else {}
        got = last([[10], [11], [12]], cache, position_ids=_positions(mask)[:, -1:], **options)
    if differ(want, got):
        raise UserError(
            f"model: {type(lm.model).__name__} does not go on from its cache as from the text: it keeps states elsewhere or takes "
            "padding for text, so it cannot be sampled from"
        )
    _tried.add(lm.backbone)


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)
