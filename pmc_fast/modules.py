"""One more token per row through a model's own modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from pmc_fast import attention
from pmc_fast.cache import argument_of, layers_of
from pmc_fast.models import LanguageModel
from pmc_fast.prefill import Prefill

_WARNING = "warn_if_padding_and_no_attention_mask"


def last_hidden(
    backbone: nn.Module, cache_argument: str, layers: int, token: Tensor, position: Tensor, held: int | Tensor
) -> Tensor:
    """What `Modules.hidden` returns, where `attention.decoding` says who attends."""
    cache = {cache_argument: Cache(layers=[PassingLayer(held) for _ in range(layers)])}
    out = backbone(input_ids=token[:, None], position_ids=position[:, None], use_cache=True, **cache)
    return out.last_hidden_state[:, -1]


class Modules:
    """The modules of a model, as they are.

    Attributes:
        name: see `Sampler.decoder`.
        compiled: whether they are compiled.
    """

    name, compiled = "modules", False
    _last_hidden = staticmethod(last_hidden)

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm

    def check(self, filled: Prefill) -> None:
        """A UserError if they cannot go on from these prompts."""

    def hidden(self, token: Tensor, position: Tensor, rows: attention.Decoding, held: int | Tensor) -> Tensor:
        """The last hidden states [R, D] after one more token per row.

        Args:
            token, position: int64 [R].
            rows: keep the token's keys and values, and attend.
            held: how many positions there are before the token: a number, or int64 [] where the host does not know it.
        """
        layers, backbone = layers_of(self._lm.model.config), self._lm.backbone
        with attention.decoding(rows), _not_warning(backbone):
            return self._last_hidden(backbone, argument_of(backbone), layers, token, position, held)


class PassingLayer(CacheLayerMixin):
    """Passes a token's keys and values on to attention, which keeps them; see `attention.Decoding`."""

    is_sliding = False  # whole length kept; attention applies a window where the model has one

    def __init__(self, held: int | Tensor) -> None:
        super().__init__()
        self.is_initialized = True
        self._held = held

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self._held = self._held + key_states.shape[2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int | Tensor, int]:
        return self._held + query_length, 0

    def get_seq_length(self) -> int | Tensor:
        return self._held

    def get_max_length(self) -> int:
        return -1  # none


@contextmanager
def _not_warning(backbone: nn.Module) -> Iterator[None]:
    """Within a with block, GPT-2 and its like do not look at tokens to warn of padding that comes without a mask."""
    held = vars(backbone)
    if _WARNING in held:  # the owner's, or that of such a block in another thread
        yield
        return
    held[_WARNING] = _nothing
    try:
        yield
    finally:
        held.pop(_WARNING, None)


def _nothing(*args) -> None: ...
