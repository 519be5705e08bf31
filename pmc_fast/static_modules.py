"""One token per row through a model's own modules on a GPU, over keys and values in fixed memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from pmc_fast import attention
from pmc_fast.decoder_layers import Unknown, is_hooked
from pmc_fast.host_values import HostValue, RefusingHostValues
from pmc_fast.models import LanguageModel
from pmc_fast.prefill import Prefill
from pmc_fast.sharding import is_tensor_parallel, kind
from pmc_fast.static_cache import StaticCache, StepAttention
from pmc_fast.static_layers import ROTARY_KINDS
from pmc_fast.static_rows import Sizes, StaticRows

# Whose modules keep no count of their calls, nor anything else on the host that a graph would leave behind.
LIBRARIES = ("torch.nn.", "transformers.", "peft.")


def check_modules(lm: LanguageModel, filled: Prefill) -> None:
    """Whether the model's modules do the same in every step, as far as that can be told from what they are.

    Raises:
        Unknown: somebody watches, replaces or compiles them, or they may not.
    """
    if is_hooked(lm) or is_tensor_parallel(lm.backbone):
        raise Unknown
    if len({layer.keys.shape for layer in filled.cache.layers}) > 1:
        raise Unknown
    for module in lm.backbone.modules():
        if not kind(module).__module__.startswith(LIBRARIES) or module._compiled_call_impl is not None:
            raise Unknown
        if not set(_rotary_kinds(module)) <= set(ROTARY_KINDS):  # angles would depend on the other rows' positions
            raise Unknown


def read_by_modules(lm: LanguageModel, filled: Prefill) -> Iterator[Hashable]:
    """All that a step reads of the modules: what attention is given, where tensors lie, and numbers and names."""
    for call in filled.calls:
        yield replace(call, keys_at=0, packed=False)
    for module in lm.backbone.modules():
        yield kind(module), _plain(vars(module))


def _rotary_kinds(module: nn.Module) -> list[str]:
    kinds = getattr(module, "rope_type", "default")
    return list(kinds.values()) if isinstance(kinds, dict) else [kinds]  # by the layers' type, or of all layers


def _plain(value: object) -> Hashable:
    """Numbers and names as they are, tensors by their address, nothing of anything else."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, dict):
        return tuple((name, _plain(held)) for name, held in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value if isinstance(value, (bool, int, float, str)) else None


class StaticModules(StaticCache):
    """The modules, and memory for keys and values. See `StaticCache`.

    Raises:
        Unknown: a step of the modules gives the host a value.
    """

    name = "cuda graph of modules"

    def __init__(self, lm: LanguageModel, filled: Prefill, sizes: Sizes, keeps: bool) -> None:
        super().__init__(filled, sizes, keeps)
        self._lm = lm
        self._prefix_length = torch.zeros((), dtype=torch.int64, device=filled.hidden.device)
        self._try(filled)

    def _try(self, filled: Prefill) -> None:
        """Run a step of one row per prompt, whose answers have not begun."""
        rows, padding = len(filled.hidden), filled.padding
        step = SimpleNamespace(
            token=torch.zeros_like(padding),
            position=filled.position,
            step=torch.ones_like(padding),
            texts=torch.ones_like(padding[:1]).fill_(rows),
            first=padding + (self._sizes.width - filled.cache.get_seq_length()),
            prefix_row=torch.arange(rows, device=padding.device),
        )
        self.begin(filled)
        try:
            with torch.cuda.device_of(padding), RefusingHostValues(padding.device.type):
                self.hidden(step, rows)
        except HostValue as error:
            raise Unknown from error

    def begin(self, filled: Prefill) -> None:
        super().begin(filled)
        self._prefix_length.fill_(filled.cache.get_seq_length())

    def hidden(self, of: StaticRows, rows: int) -> Tensor:
        """The last hidden states [rows, D] of one more token for each of the first rows."""
        length = of.step[:rows]
        held = self._prefix_length + length[0] - 1
        most = self._sizes.width + self._sizes.steps
        # Rows without a text count on, perhaps beyond the positions that the model has learned.
        position = of.position[:rows] * (torch.arange(rows, device=length.device) < of.texts)
        cache = Cache(layers=[_Layer(own, length, held, most) for own in self.own[:, :, :rows]])
        with attention.decoding(_Rows(self.attention(of, rows))), _not_warning(self._lm.backbone):
            hidden = self._lm.hidden(
                of.token[:rows, None], position_ids=position[:, None], past_key_values=cache, use_cache=True
            )
        return hidden[:, -1]


@contextmanager
def _not_warning(backbone: nn.Module) -> Iterator[None]:
    """Within a with block, GPT-2 and its like do not look at tokens to warn of padding that comes without a mask."""
    backbone.warn_if_padding_and_no_attention_mask = lambda *args: None
    try:
        yield
    finally:
        del backbone.warn_if_padding_and_no_attention_mask


class _Rows:
    """See `attention.Decoding`."""

    def __init__(self, attends: StepAttention) -> None:
        self._attends = attends

    def attend(self, layer, query, key, value, **options) -> Tensor:
        return self._attends(layer, query, **options)  # keys and values are where the layer's cache put them


class _Layer(CacheLayerMixin):
    """The rows' own keys and values of one layer, to which a step appends; nothing in it knows how many there are.

    Args:
        own: [2, rows, kv_heads, steps, head_dim].
        length: int64 [rows], positions that each row holds, the one that is to be appended included.
        held: int64 [], positions before that one, the prompts' included; at most `most`.
    """

    is_sliding = False  # whole length kept; attention applies a window where the model has one

    def __init__(self, own: Tensor, length: Tensor, held: Tensor, most: int) -> None:
        super().__init__()
        self.keys, self.values = own
        self.is_initialized = True
        self._place, self._held, self._most, self._appended = (length - 1)[:, None, None, None], held, most, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            held.scatter_(2, self._place.expand_as(new), new)
        self._appended = 1
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._most, 0

    def get_seq_length(self) -> Tensor:
        return self._held + self._appended

    def get_max_length(self) -> int:
        return self._most
