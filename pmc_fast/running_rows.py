"""The rows that a sampling call still runs: one token further each, fewer as they finish."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from pmc_fast import attention, backend
from pmc_fast.cache import move_rows, retired
from pmc_fast.fused_decoder import FusedDecoder, fused_decoder
from pmc_fast.models import LanguageModel
from pmc_fast.phases import phase
from pmc_fast.prefill import Prefill


class RunningRows:
    """The rows still running: their next hidden state, their place in the output, their cache."""

    def __init__(self, lm: LanguageModel, filled: Prefill, num_samples: int, steps: int, sequence: Tensor) -> None:
        prompts, device = len(filled.hidden), filled.hidden.device
        self._lm, self._cache = lm, filled.cache
        self.hidden = filled.hidden.repeat_interleave(num_samples, dim=0)
        self.slot = torch.arange(prompts * num_samples, device=device)
        self.sequence = sequence
        self._position = (filled.position + 1).repeat_interleave(num_samples)
        self._generated = 0
        self._mask: Tensor | None = None
        self._first: Tensor | None = None
        self._prefix_row: Tensor | None = None
        self._decoder: FusedDecoder | None = None
        if filled.suits_decode_attention and self._uses_native():
            self._cache.share(num_samples, steps)
            self._first = filled.padding.repeat_interleave(num_samples)
            self._prefix_row = torch.arange(prompts, device=device).repeat_interleave(num_samples)
            self._decoder = fused_decoder(lm, filled.calls)
        else:
            self._cache.fan_out(num_samples, steps)
            self._mask = filled.mask.repeat_interleave(num_samples, dim=0) if filled.padded else None

    @property
    def native(self) -> bool:
        """Whether this library's own CPU kernels decode."""
        return self._decoder is not None

    def _uses_native(self) -> bool:
        return backend.choose("decode_attention", None, self.hidden.device.type, self.hidden.dtype) == "native"

    def advance(self, token: Tensor, done: Tensor) -> bool:
        """Retire the rows that are done and run the others one token further; False if none is left."""
        if bool(done.any()):
            if bool(done.all()):
                return False
            with phase("retire"):
                token = self._retire(token, done)
        self._generated += 1
        with phase("decode"):
            self.hidden = self._hidden(token)
        self._position = self._position + 1
        return True

    def _hidden(self, token: Tensor) -> Tensor:
        """The last hidden states after one more token per row."""
        if self._decoder is not None:
            return self._decoder.step(token, self._position, self._cache, self._first, self._prefix_row)
        attending, options = nullcontext(), {}
        if self._prefix_row is not None:
            attending = attention.decoding(self._cache, self._first, self._prefix_row)
        if self._mask is not None:
            grown = self._mask.new_ones(len(token), self._generated)
            options["attention_mask"] = torch.cat([self._mask, grown], dim=1)
        with attending:
            hidden = self._lm.hidden(
                token[:, None],
                position_ids=self._position[:, None],
                past_key_values=self._cache,
                use_cache=True,
                **options,
            )
        return hidden[:, -1]

    def _retire(self, token: Tensor, done: Tensor) -> Tensor:
        """Keep the rows that are not done, everywhere; returns their tokens."""
        source, destination, rows = retired(done)
        self._cache.move(source, destination, rows)
        self.slot = move_rows(self.slot, source, destination, rows)
        self.sequence = move_rows(self.sequence, source, destination, rows)
        self._position = move_rows(self._position, source, destination, rows)
        for name in ("_mask", "_first", "_prefix_row"):
            if (values := getattr(self, name)) is not None:
                setattr(self, name, move_rows(values, source, destination, rows))
        return move_rows(token, source, destination, rows)
