"""One token per row through a model's own modules on a GPU, over keys and values in fixed memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pmc_fast.decoder_layers import Unknown, is_hooked
from pmc_fast.host_values import HostValue, RefusingHostValues
from pmc_fast.models import LanguageModel
from pmc_fast.modules import Modules
from pmc_fast.prefill import Prefill
from pmc_fast.sharding import is_tensor_parallel, kind
from pmc_fast.static_cache import StaticCache, StepAttention
from pmc_fast.static_layers import ROTARY_KINDS
from pmc_fast.static_rows import Sizes, StaticRows, known_positions

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

    def __init__(self, lm: LanguageModel, modules: Modules, filled: Prefill, sizes: Sizes, keeps: bool) -> None:
        super().__init__(filled, sizes, keeps)
        self.name, self._modules = f"cuda graph of {modules.name}", modules
        self._prefix_length = torch.zeros((), dtype=torch.int64, device=filled.hidden.device)
        self._try(Modules(lm), filled)

    def _try(self, modules: Modules, filled: Prefill) -> None:
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
                self._hidden(modules, step, rows)
        except HostValue as error:
            raise Unknown from error

    def begin(self, filled: Prefill) -> None:
        super().begin(filled)
        self._prefix_length.fill_(filled.cache.get_seq_length())

    def hidden(self, of: StaticRows, rows: int) -> Tensor:
        """The last hidden states [rows, D] of one more token for each of the first rows."""
        return self._hidden(self._modules, of, rows)

    def _hidden(self, modules: Modules, of: StaticRows, rows: int) -> Tensor:
        length = of.step[:rows]
        appending = Appending(self.own[:, :, :rows], length, self.attention(of, rows))
        return modules.hidden(
            of.token[:rows], known_positions(of, rows), appending, self._prefix_length + length[0] - 1
        )


class Appending:
    """Rows that keep a token's keys and values, and then attend. See `attention.Decoding`.

    Args:
        own: [layers, 2, rows, kv_heads, steps, head_dim].
        length: int64 [rows], positions that each row holds, the one that is to be appended included.
    """

    def __init__(self, own: Tensor, length: Tensor, attends: StepAttention) -> None:
        self._own, self._place, self._attends = own, (length - 1)[:, None, None, None], attends

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        for held, new in zip(self._own[layer], (key[:, :, None], value[:, :, None]), strict=True):
            held.scatter_(2, self._place.expand_as(new), new)
        return self._attends(layer, query, **options)
