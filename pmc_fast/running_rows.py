"""The answers that a sampling call still runs: one token further each; those that say the same so far are computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast import attention, backend
from pmc_fast.fused_decoder import FusedDecoder, fused_decoder
from pmc_fast.models import LanguageModel
from pmc_fast.modules import Modules
from pmc_fast.phases import phase
from pmc_fast.prefill import Prefill

_TOKEN_BITS = 32


class RunningRows:
    """Answers that are not done, and a row for each text that some of them have in common so far.

    Answers to a prompt begin in one row, whose next token each draws with noise of its own; those that draw different
    tokens go on in rows of their own. So a model that is sure of its answers decodes few rows, however many are sampled.

    Args:
        filled: a pass over the prompts, whose cache becomes the rows'.
        num_samples: n; answer b * n + i is sample i of prompt b.
        steps: tokens per answer at most.
        modules: what decodes where this library's own CPU kernels do not.

    Attributes:
        hidden: [R, D], the rows' last hidden states.
        slot: int64 [A], the answers that are not done.
        row: int64 [A], the row of each.
        decoded: how many tokens went through the model so far.
        name: see `Sampler.decoder`.

    Raises:
        UserError: the modules are to be compiled, and cannot be.
    """

    def __init__(self, lm: LanguageModel, filled: Prefill, num_samples: int, steps: int, modules: Modules) -> None:
        prompts, device = len(filled.hidden), filled.hidden.device
        self._lm, self._filled, self._cache, self._modules = lm, filled, filled.cache, modules
        self.hidden = filled.hidden
        self.slot = torch.arange(prompts * num_samples, device=device)
        self.row = self.slot // num_samples
        self._prompt = torch.arange(prompts, device=device)  # of each row
        self._generated = self.decoded = 0
        self._shares = filled.suits_decode_attention and (modules.compiled or self._attends_natively())
        self._decoder: FusedDecoder | None = None
        if self._shares:
            self._cache.share(len(self.slot), steps)
            self._decoder = fused_decoder(lm, filled.calls, self._cache)
        else:
            self._cache.grow(len(self.slot), steps)
        if self._decoder is None:
            modules.check(filled)

    @property
    def name(self) -> str:
        return self._modules.name if self._decoder is None else "native"

    def _attends_natively(self) -> bool:
        return backend.choose("decode_attention", None, self.hidden.device.type, self.hidden.dtype) == "native"

    def advance(self, token: Tensor, done: Tensor) -> bool:
        """Retire the answers that are done and run the others one token further; False if none is left.

        Args:
            token: int64 [A], what each answer drew.
            done: bool [A].
        """
        if bool(done.all()):
            return False
        with phase("retire"):
            token = self._regroup(token, ~done)
        self._generated += 1
        self.decoded += len(token)
        with phase("decode"):
            self.hidden = self._hidden(token)
        return True

    def _regroup(self, token: Tensor, goes_on: Tensor) -> Tensor:
        """Give each text that goes on a row; returns the rows' tokens."""
        self.slot = self.slot[goes_on]
        texts = self.row[goes_on] << _TOKEN_BITS | token[goes_on]
        texts, text = texts.unique(return_inverse=True)
        parent = texts >> _TOKEN_BITS
        place, source, destination = placed(parent)
        self._cache.arrange(source, destination, len(texts))
        self._prompt = torch.empty_like(parent).index_copy_(0, place, self._prompt[parent])
        self.row = place[text]
        return torch.empty_like(parent).index_copy_(0, place, texts & (1 << _TOKEN_BITS) - 1)

    def _hidden(self, token: Tensor) -> Tensor:
        """The last hidden states after one more token per row."""
        position = self._filled.position[self._prompt] + self._generated
        if self._shares:
            first = self._filled.padding[self._prompt]
            if self._decoder is not None:
                return self._decoder.step(token, position, first, self._prompt)
            rows = attention.SharedPrompts(self._cache, first, self._prompt)
            return self._modules.hidden(token, position, rows, self._cache.get_seq_length())
        options = {}
        if self._filled.padded and self._cache.attends:
            mask = self._filled.mask[self._prompt]
            options["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), self._generated)], dim=1)
        return self._lm.hidden(token[:, None], self._cache, position_ids=position[:, None], **options)[:, -1]


def placed(parent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where rows that go on from rows of before are to be kept: their places, and which rows to copy to which places.

    Args:
        parent: int64 [R], ascending: the row that each goes on from. The first to go on from a row stays in its place, if
            that is below R; as few rows as possible are copied.

    Returns:
        place: int64 [R], a permutation; source, destination: int64 [C], rows to copy and places that nobody stays in.
    """
    rows = len(parent)
    first = torch.ones_like(parent, dtype=torch.bool)
    first[1:] = parent[1:] != parent[:-1]
    stays = first & (parent < rows)
    free = torch.ones_like(stays)
    free[parent[stays]] = False
    destination = free.nonzero()[:, 0]
    place = parent.clone()
    place[~stays] = destination
    return place, parent[~stays], destination
