"""The rows that a sampling call still runs: one token further each, fewer as they finish."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from pmc_fast import attention, backend
from pmc_fast.cache import SampleCache, layers_of, move_rows, retired
from pmc_fast.errors import UserError
from pmc_fast.fused_decoder import FusedDecoder, fused_decoder
from pmc_fast.models import LanguageModel
from pmc_fast.phases import phase


class RunningRows:
    """The rows still running: their next hidden state, their place in the output, their cache."""

    def __init__(
        self,
        lm: LanguageModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        num_samples: int,
        steps: int,
        sequence_ids: Tensor,
    ) -> None:
        prompts, width = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        self._lm = lm
        self._cache = SampleCache(layers_of(lm.model.config), width)
        prefill = {} if bool(mask.all()) else {"attention_mask": mask}
        position = (mask.cumsum(1) - 1).clamp(min=0)
        with attention.watching() as calls:
            hidden = lm.hidden(input_ids, position_ids=position, past_key_values=self._cache, use_cache=True, **prefill)
        if self._cache.get_seq_length() != width:
            raise UserError("model: it does not fill the key/value cache it is given, so it cannot be sampled from")
        hidden = hidden[:, -1]
        copies = torch.arange(num_samples, device=input_ids.device)
        self.hidden = hidden.repeat_interleave(num_samples, dim=0)
        self.slot = torch.arange(prompts * num_samples, device=input_ids.device)
        self.sequence = (sequence_ids[:, None] * num_samples + copies).flatten()
        self._position = (position[:, -1] + 1).repeat_interleave(num_samples)
        self._generated = 0
        self._mask: Tensor | None = None
        self._first: Tensor | None = None
        self._prefix_row: Tensor | None = None
        self._decoder: FusedDecoder | None = None
        if self._shares_prompts(calls):
            self._cache.share(num_samples, steps)
            self._first = (mask == 0).sum(1).repeat_interleave(num_samples)
            self._prefix_row = torch.arange(prompts, device=input_ids.device).repeat_interleave(num_samples)
            self._decoder = fused_decoder(lm, calls)
        else:
            self._cache.fan_out(num_samples, steps)
            self._mask = mask.repeat_interleave(num_samples, dim=0) if prefill else None

    def _shares_prompts(self, calls: list[attention.AttentionCall]) -> bool:
        """Whether `decode_attention` could have done the prefill's attention calls, and is fast here."""
        layers = self._cache.layers
        return (
            [call.layer for call in calls] == list(range(len(layers)))
            and all(call.same_shape for call in calls)
            and all(call.keys_at == layer.keys.data_ptr() for call, layer in zip(calls, layers, strict=True))
            and self._uses_native()
        )

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
