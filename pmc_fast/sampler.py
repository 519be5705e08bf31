"""Samples answers: one prefill per prompt, n samples of each, what they have in common computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pmc_fast import attention, backend
from pmc_fast.compiled_modules import CompiledModules
from pmc_fast.errors import described
from pmc_fast.fast_linear import fast_linear
from pmc_fast.memory import free_bytes
from pmc_fast.models import LanguageModel, evaluating
from pmc_fast.modules import Modules
from pmc_fast.ops import _checks
from pmc_fast.phases import phase
from pmc_fast.prefill import Prefill, cache_bytes, prefill
from pmc_fast.running_rows import RunningRows
from pmc_fast.sampling_inputs import answer_limits, check_places, check_sequence_ids, end_tokens
from pmc_fast.sharding import gathered, smallest
from pmc_fast.static_decoder import KeptDecoders, static_decoder
from pmc_fast.static_rows import Sizes, rounded
from pmc_fast.vocabulary import check_ids, vocabulary_size

if TYPE_CHECKING:
    from pmc_fast.pruning import Pruner

# Of the memory that is free when a call starts, how much its cache may take if nobody says.
CACHE_SHARE = 0.5

# Of some prompts' answers: tokens [answers, T], lengths, logprobs [answers, T], finished, pruned; and the tokens decoded.
Wave = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]


@dataclass(frozen=True)
class Samples:
    """n answers to each of B prompts, at most L tokens long.

    tokens: int64 [B, n, L]; past an answer's length, the first end token.
    lengths: int64 [B, n], the end token included.
    logprobs: float32 [B, n, L], nats, under the untempered, untruncated model; 0 past an answer's length.
    finished: bool [B, n]; False where the answer was cut off before an end token.
    pruned: bool [B, n]; True where it was cut off by ``prune``.
    decoded: tokens that went through the model one by one, where those that answers to a prompt begin with in common count
        once; None where that is not known.
    """

    tokens: Tensor
    lengths: Tensor
    logprobs: Tensor
    finished: Tensor
    pruned: Tensor
    decoded: int | None = None

    @property
    def count(self) -> int:
        """The number of sampled tokens."""
        return int(self.lengths.sum())


class SampleSource(Protocol):
    """What PMC can draw answers from: ``Sampler``, or any object with its ``sample`` method."""

    def sample(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Samples:
        """As ``Sampler.sample``; PMC gives num_samples, max_new_tokens or max_length, temperature, top_k, top_p, min_p,
        eos_token_id, seed, sequence_ids and prune. Answers that ``prune`` would stop may go on: no pick depends on it.
        """
        ...


class Sampler:
    """Draws answers from a transformers causal language model, from the very weights being trained.

    Args:
        model: the model, or a ``LanguageModel`` around it.
        keep_graphs: on a GPU, whether the memory and the CUDA graphs of a call stay for the next one: of the same rows,
            options (but for ``seed`` and ``sequence_ids``) and weights' addresses, and of about the same lengths. Otherwise
            nothing stays allocated.
        compile_modules: whether the model's own modules are compiled by torch where they decode: see ``decoder``; this library's
            kernels are what they are. Takes from ten seconds to a minute or more at the first token, again where the first
            single row comes up, and whenever the model has changed in more than its weights' values.

    Attributes:
        decoder: what decoded in the last call: "cuda graph" (this library's GPU kernels), "native" (its CPU kernels),
            "cuda graph of modules" (the model's own, where a part of it is of no known kind), "launches" (either of them, where
            torch could not capture a step, which it warns of) or "modules" (the model's own, launch by launch: on a CPU, or
            where somebody watches or replaces them, they need the host or are tensor-parallel). With ``compile_modules``,
            "compiled modules" instead of "modules".

    Raises:
        UserError: the model has no head this library knows.
    """

    def __init__(
        self, model: nn.Module | LanguageModel, keep_graphs: bool = False, compile_modules: bool = False
    ) -> None:
        self.lm = model if isinstance(model, LanguageModel) else LanguageModel(model)
        self.decoder: str | None = None
        self._kept = KeptDecoders() if keep_graphs else None
        self._modules = CompiledModules(self.lm) if compile_modules else Modules(self.lm)

    def cache_bytes(self, rows: int, positions: int) -> int:
        """Bytes of keys, values and states for that many rows of that many tokens each, prompt and answer together.

        Where rows share their prompts, a call holds less. Of tensor-parallel layers, this rank's part; all ranks ask together, as for
        weights in parts. The first time the model runs one token.

        Raises:
            ValueError, TypeError: a number that is none, or negative.
            UserError: the model cannot be sampled from.
        """
        _checks.integer("rows", rows, "an integer of at least 0", 0)
        _checks.integer("positions", positions, "an integer of at least 0", 0)
        each = cache_bytes(self.lm)
        return rows * (positions * each.token + each.row)

    @torch.no_grad()
    def sample(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        num_samples: int = 1,
        max_new_tokens: int | Tensor | None = None,
        max_length: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        eos_token_id: int | Sequence[int],
        seed: int = 0,
        sequence_ids: Tensor | None = None,
        prune: Pruner | None = None,
        cache_budget: int | None = None,
        impl: str | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Samples:
        """Draw ``num_samples`` answers to each prompt, exactly from the tempered, truncated distribution.

        The draws are independent. What answers to a prompt begin with in common goes through the model once.

        Equivalent to ``model.generate(input_ids, do_sample=True, num_return_sequences=num_samples, ...)``, but an
        answer depends only on its prompt, ``seed`` and its sequence id, not on what else is in the batch (but for "dynamic" and
        "longrope" rotary embeddings, once a row goes beyond the positions they were made for). torch.autocast is off meanwhile:
        the weights' own dtype is the dtype of sampling. Calls on one model in several threads wait for one another, whichever
        sampler they are of; nothing else may run the model meanwhile, since its modules are other ones.

        Args:
            input_ids: int64 [B, T], prompts padded on the left.
            attention_mask: int64 or bool [B, T], 0 at padding; None if there is none.
            num_samples: answers per prompt, at least 1.
            max_new_tokens: tokens per answer at most, or int64 [B] for each prompt's; or
            max_length: padded prompt and answer together at most (give exactly one of the two).
            temperature, top_k, top_p, min_p: as in ``pmc_fast.sample``; temperature 0 is greedy.
            eos_token_id: the token(s) that end an answer; -1 for none.
            seed: integer in [0, 2^63).
            sequence_ids: int64 [B]; sample i of prompt b draws the noise of sequence ``sequence_ids[b] * n + i``, below 2^32.
                Default 0, 1, ..., B - 1.
            prune: stops answers that cannot be picked any more; made for these B prompts and ``num_samples``.
            cache_budget: bytes that keys and values may take at a time; prompts that do not fit together take turns,
                with the same answers. Default: half of the memory that is free.
            impl: the implementation of ``linear_sample`` to use.
            progress: called with the number of answers still running after each step.

        Raises:
            ValueError, TypeError: an argument of the wrong type, shape, dtype or range (token ids outside of the vocabulary
                on a CPU alone: a GPU would have to be waited for), or a ``cache_budget`` too small for the answers to one
                prompt.
            UserError: the model cannot be sampled from, it has a table of positions which ends before an answer may, or
                its modules are to be compiled and cannot be: they have hooks or replaced forwards, are tensor-parallel, have
                attention that is not torch's SDPA, or do what torch cannot compile.

        Source: arXiv 2507.04219, section 4 (x_1..x_n ~ p_theta(.|q)).
        """
        limits = answer_limits(input_ids, attention_mask, num_samples, max_new_tokens, max_length, self.lm.positions)
        check_places(input_ids.device, "input_ids are", {"sequence_ids": sequence_ids})
        if prune is not None and not hasattr(prune, "part"):
            raise TypeError(f"prune: got {described(prune)}, expected a pmc_fast.pruning.Pruner or None")
        _checks.sampling(temperature, top_k, top_p, min_p, seed)
        backend.check(impl)
        if cache_budget is not None:
            _checks.number("cache_budget", cache_budget, "an integer, of bytes, or None", _checks.INTEGERS)
        if attention_mask is not None:  # a token that pads may be none of the model's
            input_ids = input_ids.masked_fill(attention_mask == 0, 0)
        check_ids(input_ids, vocabulary_size(self.lm.model))
        ends = torch.tensor(end_tokens(eos_token_id), device="cpu")
        device, prompts = input_ids.device, len(input_ids)
        if sequence_ids is None:
            sequence_ids = torch.arange(prompts, device=device)
        check_sequence_ids(sequence_ids, prompts, num_samples)
        model, waves = self.lm.model, []
        # Kernels that are launched without an op around them take Python's numbers of just these types.
        draw = {"temperature": float(temperature), "top_p": float(top_p), "min_p": float(min_p), "seed": int(seed)}
        draw |= {"top_k": None if top_k is None else int(top_k), "impl": impl}
        with (
            self.lm.turn,
            gathered(self.lm.root),
            torch.autocast(device.type, enabled=False),  # casting the weights for each token costs more
            evaluating(model),
            attention.replacing_sdpa(model) if self.lm.attends_as_known else nullcontext(),
        ):
            check_places(self.lm.device, "the model is", {"input_ids": input_ids})  # weights may come here to be whole
            at_once = self._prompts_at_once(input_ids, limits, num_samples, cache_budget)
            with (
                fast_linear(self.lm.backbone, None if self.lm.shards else self.lm.head.weight),
                self._kept.call() if self._kept else nullcontext(),
            ):
                for begin in range(0, prompts, at_once):
                    part = slice(begin, begin + at_once)
                    with phase("prefill"):
                        mask = None if attention_mask is None else attention_mask[part]
                        filled = prefill(self.lm, input_ids[part], mask)
                    limit = limits[part].to(device).repeat_interleave(num_samples)
                    pruner = None if prune is None else prune.part(begin, min(begin + at_once, prompts))
                    wave = (filled, num_samples, sequence_ids[part], limit, ends.to(device), draw, pruner, progress)
                    waves.append(self._sample_wave(*wave))
        return _join(waves, prompts, num_samples, ends[0])

    def _sample_wave(
        self,
        filled: Prefill,
        num_samples: int,
        sequence_ids: Tensor,
        limit: Tensor,
        ends: Tensor,
        draw: dict[str, Any],
        prune: Pruner | None,
        progress: Callable[[int], object] | None,
    ) -> Wave:
        steps = int(limit.max())
        sizes = Sizes(len(limit), len(filled.hidden), filled.cache.get_seq_length(), steps)
        sequence = (sequence_ids[:, None] * num_samples + torch.arange(num_samples, device=limit.device)).flatten()
        decoder = static_decoder(self.lm, filled, sizes, ends, draw, self._kept, self._modules)
        if decoder is not None:
            with torch.cuda.device_of(limit):  # where its kernels are launched
                wave = decoder.sample(filled, sequence, limit, draw["seed"], prune, progress)
            self.decoder = decoder.name
            return wave
        rows = RunningRows(self.lm, filled, num_samples, steps, self._modules)
        self.decoder = rows.name
        return _run(self.lm, rows, sequence, limit, ends, draw, prune, progress)

    def _prompts_at_once(self, input_ids: Tensor, limits: Tensor, num_samples: int, cache_budget: int | None) -> int:
        """How many prompts' answers fit into the budget together."""
        width, steps = input_ids.shape[1], int(limits.max())
        needed = self.cache_bytes(num_samples, width + steps)
        if self._kept is not None:
            needed = self.cache_bytes(num_samples, rounded(width) + rounded(steps)) + self.cache_bytes(1, width)
        given = cache_budget is not None
        if not given:
            # What is kept this call uses again, or frees first. What graphs hold for themselves counts as free as it is.
            kept = self._kept.held_bytes if self._kept else 0
            cache_budget = int((free_bytes(input_ids.device) + kept) * CACHE_SHARE)
        if needed > cache_budget and given:
            raise ValueError(
                f"cache_budget: got {cache_budget} bytes, expected at least {needed}, the keys and values of "
                f"{num_samples} answers to one prompt"
            )
        fits = smallest(self.lm.model, max(1, cache_budget // needed))
        if self._kept is None or fits >= len(input_ids):
            return fits
        # A last wave of fewer prompts has memory of its own, which is kept beside the others'.
        return next(count for count in range(fits, 0, -1) if count + len(input_ids) % count <= fits)


def _run(
    lm: LanguageModel,
    rows: RunningRows,
    sequence: Tensor,
    limit: Tensor,
    ends: Tensor,
    draw: dict[str, Any],
    prune: Pruner | None,
    progress: Callable[[int], object] | None,
) -> Wave:
    """Decode until no answer is left."""
    total, device = len(limit), limit.device
    steps = int(limit.max())
    tokens = ends[0].expand(total, steps).clone()
    logprobs = torch.zeros(total, steps, dtype=torch.float32, device=device)
    lengths = limit.clone()
    finished, pruned = (torch.zeros(total, dtype=torch.bool, device=device) for _ in range(2))
    for step in range(steps):
        slot = rows.slot
        noise = {"sequence": sequence[slot], "position": torch.full_like(slot, step)}
        drawn = lm.head.sample(rows.hidden, hidden_row=rows.row, **noise, **draw)
        tokens[slot, step], logprobs[slot, step] = drawn.token, drawn.logprob
        ended = torch.isin(drawn.token, ends)
        finished[slot[ended]] = True
        done = ended | (limit[slot] == step + 1)
        lengths[slot[done]] = step + 1
        if prune is not None and (step + 1) % prune.interval == 0:
            running = slot[~done]
            with phase("prune"):
                stopped = prune(running, tokens[:, : step + 1], lengths)
            if stopped is not None:
                gone = running[stopped.to(device)]
                pruned[gone], lengths[gone] = True, step + 1
                done = done | pruned[slot]
        if not rows.advance(drawn.token, done):
            break
        if progress:
            progress(len(rows.slot))
    longest = int(lengths.max())
    return tokens[:, :longest], lengths, logprobs[:, :longest], finished, pruned, rows.decoded


def _join(waves: list[Wave], prompts: int, num_samples: int, end: Tensor) -> Samples:
    """One result of the waves' results, as wide as the longest answer."""
    longest = max(wave[0].shape[1] for wave in waves)
    shape = (prompts, num_samples)

    def wide(column: int, value: float) -> Tensor:
        parts = [F.pad(wave[column], (0, longest - wave[column].shape[1]), value=value) for wave in waves]
        return torch.cat(parts).reshape(*shape, longest)

    lengths, finished, pruned = (torch.cat([wave[column] for wave in waves]).view(shape) for column in (1, 3, 4))
    return Samples(wide(0, int(end)), lengths, wide(2, 0.0), finished, pruned, sum(wave[5] for wave in waves))
