"""Samplers for PMC that draw with other people's engines: transformers' generate, and vLLM in the same process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pmc_fast.errors import UserError, described
from pmc_fast.models import evaluating
from pmc_fast.ops import _checks
from pmc_fast.positions import Positions
from pmc_fast.sampler import Samples
from pmc_fast.sampling_inputs import answer_limits, check_sequence_ids, end_tokens


@dataclass(frozen=True)
class _Request:
    """What is drawn: `copies` answers to each prompt; top_k 0 is off."""

    input_ids: Tensor
    attention_mask: Tensor
    copies: int
    limits: list[int]  # tokens per answer at most, for each prompt
    ends: tuple[int, ...]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    sequences: list[int]

    @property
    def end_ids(self) -> list[int]:
        """The ends that are tokens: -1 is none."""
        return [end for end in self.ends if end >= 0]

    def of(self, rows: list[int]) -> _Request:
        """What is drawn for some of the prompts."""
        return replace(
            self,
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            limits=[self.limits[row] for row in rows],
            sequences=[self.sequences[row] for row in rows],
        )


class _EngineSampler:
    """``Sampler.sample`` for engines that draw whole answers; a subclass says how, in ``_draw``."""

    model: nn.Module  # that is trained

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
        prune: object = None,
    ) -> Samples:
        """As ``Sampler.sample``; ``prune`` is not used."""
        positions = Positions.of(self.model)
        limits = answer_limits(input_ids, attention_mask, num_samples, max_new_tokens, max_length, positions).tolist()
        _checks.sampling(temperature, top_k, top_p, min_p, seed)
        ends = tuple(end_tokens(eos_token_id))
        if sequence_ids is None:
            sequence_ids = torch.arange(len(input_ids), device=input_ids.device)
        check_sequence_ids(sequence_ids, len(input_ids), num_samples)
        mask = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
        copies = num_samples if temperature else 1  # greedy answers are all the same
        drawn = self._draw(
            _Request(
                input_ids.masked_fill(mask == 0, 0),  # a token that pads may be none of the model's
                mask,
                copies,
                limits,
                ends,
                # Engines take Python's numbers of just these types.
                float(temperature),
                int(top_k or 0),
                float(top_p),
                float(min_p),
                int(seed),
                sequence_ids.tolist(),
            )
        )
        return _samples([answers * (num_samples // copies) for answers in drawn], limits, ends, input_ids.device)

    def _draw(self, request: _Request) -> list[list[list[int]]]:
        """The tokens of `copies` answers to each prompt; what follows an end token or exceeds the limit is cut off."""
        raise NotImplementedError


class GenerateSampler(_EngineSampler):
    """Draws answers with ``model.generate``, for models that ``Sampler`` cannot run.

    Two calls with the same arguments give the same answers; unlike ``Sampler``'s, these depend on what else is in the
    batch. Answers are not pruned, and their log-probabilities, which PMC has no use for, are nan.

    Args:
        model: the transformers causal language model that is trained.

    Raises:
        UserError: it cannot generate.
    """

    def __init__(self, model: nn.Module) -> None:
        if not callable(getattr(model, "generate", None)):
            raise UserError(f"model: got {described(model)}, expected a transformers model with generate")
        self.model = model

    def _draw(self, request: _Request) -> list[list[list[int]]]:
        longest, positions = int(request.attention_mask.sum(1).max()), Positions.of(self.model)
        if not positions.fixed or longest + max(request.limits) - 1 <= positions.most:
            return self._generate(request)
        # Rows go on as long as others do, so those with less room are not asked together with them.
        drawn: list[list[list[int]]] = [[] for _ in request.limits]
        for limit in set(request.limits):
            rows = [row for row, its in enumerate(request.limits) if its == limit]
            for row, answers in zip(rows, self._generate(request.of(rows)), strict=True):
                drawn[row] = answers
        return drawn

    def _generate(self, request: _Request) -> list[list[list[int]]]:
        from transformers import GenerationConfig

        draw = {"do_sample": False}
        if request.temperature:
            draw = {
                "do_sample": True,
                "temperature": request.temperature,
                "top_k": request.top_k,
                "top_p": request.top_p,
            }
            draw |= {"min_p": request.min_p} if request.min_p else {}
        ends = request.end_ids
        wanted = GenerationConfig(
            max_new_tokens=max(request.limits),  # rows with less go on as long as others do
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            use_cache=True,
            **draw,
        )
        input_ids, copies = request.input_ids, request.copies
        devices = [input_ids.device] if input_ids.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), evaluating(self.model), own_settings(self.model):
            torch.manual_seed(_seed(request.seed, *request.sequences))
            rows = self.model.generate(
                input_ids=input_ids.repeat_interleave(copies, dim=0),
                attention_mask=request.attention_mask.repeat_interleave(copies, dim=0),
                generation_config=wanted,
            )
        return rows[:, input_ids.shape[1] :].view(len(input_ids), copies, -1).tolist()


@contextmanager
def own_settings(model: nn.Module) -> Iterator[None]:
    """Within a with block, generate takes what a configuration leaves open, such as a repetition penalty, from nobody."""
    from transformers import GenerationConfig

    theirs, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = theirs


class VLLMSampler(_EngineSampler):
    """Draws answers with a vLLM engine that shares the training process, and gives it the trained weights at each call.

    The same seed, prompt and sequence id ask the engine for the same random numbers; whether it then gives the same
    answer whatever else is in the batch is up to it. Answers are not pruned, and their log-probabilities, which PMC has no
    use for, are nan.

    Args:
        llm: a ``vllm.LLM`` of the same architecture, in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``).
        model: the transformers causal language model that is trained, without adapters.
        load_weights: gives the engine (name, tensor) pairs, named as in the model's checkpoints; default the
            ``load_weights`` of the engine's model, where vLLM's driver worker keeps it.

    Raises:
        UserError: the model has adapters, or the engine's model is not found.
    """

    def __init__(
        self,
        llm: Any,
        model: nn.Module,
        load_weights: Callable[[Iterable[tuple[str, Tensor]]], object] | None = None,
    ) -> None:
        if getattr(model, "peft_config", None):
            raise UserError("model: got a model with adapters, expected one without: vLLM is given plain weights only")
        self.llm, self.model = llm, model
        self._load_weights = load_weights or _loader_of(llm)

    def _draw(self, request: _Request) -> list[list[list[int]]]:
        from vllm import SamplingParams

        prompts = [
            ids[keep.bool()].tolist() for ids, keep in zip(request.input_ids, request.attention_mask, strict=True)
        ]
        parameters = [
            SamplingParams(
                n=request.copies,
                temperature=request.temperature,
                top_k=request.top_k or -1,
                top_p=request.top_p,
                min_p=request.min_p,
                max_tokens=limit,
                seed=_seed(request.seed, sequence),
                stop_token_ids=request.end_ids,
                ignore_eos=True,  # none but these tokens end an answer
                detokenize=False,
            )
            for limit, sequence in zip(request.limits, request.sequences, strict=True)
        ]
        self._load_weights((name, parameter.detach()) for name, parameter in self.model.named_parameters())
        self.llm.reset_prefix_cache()  # it holds keys and values of the weights before
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
        return [[list(answer.token_ids) for answer in output.outputs] for output in outputs]


def _loader_of(llm: Any) -> Callable[[Iterable[tuple[str, Tensor]]], object]:
    try:
        return llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights
    except AttributeError as error:
        raise UserError(
            f"llm: its model is not where it was looked for ({error}); start it in this process, with "
            "VLLM_ENABLE_V1_MULTIPROCESSING=0, or give load_weights"
        ) from None


def _seed(*parts: int) -> int:
    """An integer in [0, 2^62) out of several: engines add the number of the sample to it."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 2


def _samples(drawn: list[list[list[int]]], limits: list[int], ends: tuple[int, ...], device: torch.device) -> Samples:
    """Answers to each prompt, cut behind their first end token and at the prompt's limit."""
    answers = []
    for limit, row in zip(limits, drawn, strict=True):
        for ids in row:
            ids = ids[:limit]
            length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
            answers.append(ids[:length])
    shape = len(drawn), len(drawn[0])
    width = max(map(len, answers))
    padded = [ids + [ends[0]] * (width - len(ids)) for ids in answers]
    finished = [bool(ids) and ids[-1] in ends for ids in answers]

    def tensor(values: list, dtype: torch.dtype, *more: int) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device).view(*shape, *more)

    tokens = tensor(padded, torch.int64, width)
    return Samples(
        tokens,
        tensor([len(ids) for ids in answers], torch.int64),
        torch.full(tokens.shape, torch.nan, dtype=torch.float32, device=device),
        tensor(finished, torch.bool),
        torch.zeros(shape, dtype=torch.bool, device=device),
    )
