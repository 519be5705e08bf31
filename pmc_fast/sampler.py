"""Samples answers: one prefill per prompt, n samples of each, rows retire as they finish."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pmc_fast import attention, backend
from pmc_fast.errors import UserError
from pmc_fast.fast_linear import fast_linear
from pmc_fast.models import LanguageModel, evaluating
from pmc_fast.phases import phase


@dataclass(frozen=True)
class Samples:
    """n answers to each of B prompts, at most L tokens long.

    tokens: int64 [B, n, L]; past an answer's length, the first end token.
    lengths: int64 [B, n], the end token included.
    logprobs: float32 [B, n, L], nats, under the untempered, untruncated model; 0 past an answer's length.
    finished: bool [B, n]; False where the answer was cut off before an end token.
    """

    tokens: Tensor
    lengths: Tensor
    logprobs: Tensor
    finished: Tensor

    @property
    def count(self) -> int:
        """The number of sampled tokens."""
        return int(self.lengths.sum())


class Sampler:
    """Draws answers from a transformers causal language model, from the very weights being trained.

    Args:
        model: the model, or a ``LanguageModel`` around it.

    Raises:
        UserError: the model has no head this library knows.
    """

    def __init__(self, model: nn.Module | LanguageModel) -> None:
        self.lm = model if isinstance(model, LanguageModel) else LanguageModel(model)

    @torch.no_grad()
    def sample(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        num_samples: int = 1,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        eos_token_id: int | Sequence[int],
        seed: int = 0,
        sequence_ids: Tensor | None = None,
        impl: str | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Samples:
        """Draw ``num_samples`` answers to each prompt, exactly from the tempered, truncated distribution.

        Equivalent to ``model.generate(input_ids, do_sample=True, num_return_sequences=num_samples, ...)``, but an
        answer depends only on its prompt, ``seed`` and its sequence id, not on what else is in the batch.

        Args:
            input_ids: int64 [B, T], prompts padded on the left.
            attention_mask: int64 or bool [B, T], 0 at padding; None if there is none.
            num_samples: answers per prompt, at least 1.
            max_new_tokens: tokens per answer at most; or
            max_length: padded prompt and answer together at most (give exactly one of the two).
            temperature, top_k, top_p, min_p: as in ``pmc_fast.sample``; temperature 0 is greedy.
            eos_token_id: the token(s) that end an answer.
            seed: integer in [0, 2^63).
            sequence_ids: int64 [B]; sample i of prompt b draws the noise of sequence ``sequence_ids[b] * n + i``.
                Default 0, 1, ..., B - 1.
            impl: the implementation of ``linear_sample`` to use.
            progress: called with the number of rows still running after each step.

        Raises:
            ValueError, TypeError: an argument of the wrong shape, dtype or range.
            UserError: the model cannot be sampled from.

        Source: arXiv 2507.04219, section 4 (x_1..x_n ~ p_theta(.|q)).
        """
        steps = _steps(input_ids, attention_mask, num_samples, max_new_tokens, max_length)
        ends = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id))
        if ends.numel() == 0:
            raise ValueError("eos_token_id: got none, expected at least one token id")
        prompts, width = input_ids.shape
        device, rows = input_ids.device, prompts * num_samples
        ends = ends.to(device)
        if sequence_ids is None:
            sequence_ids = torch.arange(prompts, device=device)
        if sequence_ids.shape != (prompts,):
            raise ValueError(f"sequence_ids: got shape {list(sequence_ids.shape)}, expected [{prompts}]")

        tokens = ends[0].expand(rows, steps).clone()
        logprobs = torch.zeros(rows, steps, device=device)
        lengths = torch.full((rows,), steps, device=device)
        ended = torch.zeros(rows, dtype=torch.bool, device=device)
        draw = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed, "impl": impl}

        model = self.lm.model
        with (
            evaluating(model),
            fast_linear(self.lm.backbone, rows, self.lm.head.weight),
            attention.replacing_sdpa(model) as attention_calls,
        ):
            with phase("prefill"):
                batch = _Batch(self.lm, input_ids, attention_mask, num_samples, steps, sequence_ids)
            batch.use_decode_attention(attention_calls)
            for step in range(steps):
                drawn = self.lm.head.sample(
                    batch.hidden, sequence=batch.sequence, position=torch.full_like(batch.sequence, step), **draw
                )
                tokens[batch.slot, step], logprobs[batch.slot, step] = drawn.token, drawn.logprob
                done = torch.isin(drawn.token, ends)
                lengths[batch.slot[done]], ended[batch.slot[done]] = step + 1, True
                if step + 1 == steps or not batch.advance(drawn.token, done):
                    break
                if progress:
                    progress(len(batch.slot))

        longest = int(lengths.max()) if rows else 0
        shape = (prompts, num_samples)
        return Samples(
            tokens[:, :longest].reshape(*shape, longest),
            lengths.view(shape),
            logprobs[:, :longest].reshape(*shape, longest),
            ended.view(shape),
        )


class _Batch:
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
        from pmc_fast.cache import SampleCache, layers_of

        prompts, width = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if (mask[:, -1] == 0).any():
            raise ValueError("attention_mask: a prompt ends in padding; expected padding on the left")
        self._lm = lm
        self._cache = SampleCache(layers_of(lm.model.config), width + steps)
        prefill = {} if bool(mask.all()) else {"attention_mask": mask}
        position = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = lm.hidden(input_ids, position_ids=position, past_key_values=self._cache, use_cache=True, **prefill)[
            :, -1
        ]
        if self._cache.get_seq_length() != width:
            raise UserError("model: it does not fill the key/value cache it is given, so it cannot be sampled from")
        self._cache.fan_out(num_samples)

        copies = torch.arange(num_samples, device=input_ids.device)
        self.hidden = hidden.repeat_interleave(num_samples, dim=0)
        self.slot = torch.arange(prompts * num_samples, device=input_ids.device)
        self.sequence = (sequence_ids[:, None] * num_samples + copies).flatten()
        self._position = (position[:, -1] + 1).repeat_interleave(num_samples)
        self._mask = mask.repeat_interleave(num_samples, dim=0) if prefill else None
        self._first: Tensor | None = None
        self._generated = 0

    def use_decode_attention(self, calls: list[bool]) -> None:
        """Decode with the op of that name if it could have done the prefill's attention calls, and is fast here."""
        if calls and all(calls) and self._uses_native():
            padding = torch.zeros_like(self._position) if self._mask is None else (self._mask == 0).sum(1)
            self._first, self._mask = padding, None

    def _uses_native(self) -> bool:
        return backend.choose("decode_attention", None, self.hidden.device.type, self.hidden.dtype) == "native"

    def advance(self, token: Tensor, done: Tensor) -> bool:
        """Retire the rows that are done and run the others one token further; False if none is left."""
        if bool(done.any()):
            if bool(done.all()):
                return False
            with phase("retire"):
                token = self._retire(token, done)
        options = {}
        self._generated += 1
        if self._mask is not None:
            grown = self._mask.new_ones(len(token), self._generated)
            options["attention_mask"] = torch.cat([self._mask, grown], dim=1)
        attending = nullcontext() if self._first is None else attention.decoding(self._first)
        with phase("decode"), attending:
            self.hidden = self._lm.hidden(
                token[:, None],
                position_ids=self._position[:, None],
                past_key_values=self._cache,
                use_cache=True,
                **options,
            )[:, -1]
        self._position = self._position + 1
        return True

    def _retire(self, token: Tensor, done: Tensor) -> Tensor:
        """Keep the rows that are not done, everywhere; returns their tokens."""
        from pmc_fast.cache import move_rows, retired

        source, destination, rows = retired(done)
        self._cache.move(source, destination, rows)
        self.slot = move_rows(self.slot, source, destination, rows)
        self.sequence = move_rows(self.sequence, source, destination, rows)
        self._position = move_rows(self._position, source, destination, rows)
        for name in ("_mask", "_first"):
            if (values := getattr(self, name)) is not None:
                setattr(self, name, move_rows(values, source, destination, rows))
        return move_rows(token, source, destination, rows)


def _steps(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    num_samples: int,
    max_new_tokens: int | None,
    max_length: int | None,
) -> int:
    """Tokens per answer at most; checks the arguments it is made from."""
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids: got shape {list(input_ids.shape)}, expected [B, T] with at least one token")
    if input_ids.dtype != torch.int64:
        raise TypeError(f"input_ids: got dtype {input_ids.dtype}, expected torch.int64")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: got shape {list(attention_mask.shape)}, expected {list(input_ids.shape)}, that of input_ids"
        )
    if num_samples < 1:
        raise ValueError(f"num_samples: got {num_samples}, expected at least 1")
    if (max_new_tokens is None) == (max_length is None):
        raise ValueError(
            f"max_new_tokens, max_length: got {max_new_tokens} and {max_length}, expected exactly one of them"
        )
    steps = max_new_tokens if max_new_tokens is not None else max_length - input_ids.shape[1]
    if steps < 1:
        name = "max_new_tokens" if max_new_tokens is not None else "max_length"
        got = max_new_tokens if max_new_tokens is not None else max_length
        raise ValueError(
            f"{name}: got {got}, which leaves no room for an answer after prompts padded to {input_ids.shape[1]} tokens"
        )
    return steps
