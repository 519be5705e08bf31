"""`python -m benchmarks sampling`: a whole sampling call, by pmc_fast, by the model's modules alone, by transformers' generate.

Answers with little in common are drawn as PMC draws them; greedy ones to a question say all the same, which is the other end.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import results, step
from benchmarks.bench import OURS, Wrong
from benchmarks.limits import Limits, measure_limits
from benchmarks.measure import PeakMemory, Spread, environment, interleave, times_as_long
from benchmarks.ops import Row, table

SCHEMA = "pmc_fast.benchmarks.sampling/1"
MODULES, GENERATE = "pmc_fast, by modules", "transformers' generate"

_FEWEST_EQUAL = 0.75  # of the answers must be pmc_fast's: where two tokens are as likely, rounding decides


@dataclass(frozen=True)
class Drawn:
    """tokens: int64 [answers, T]; of each, `lengths` count, the end token included."""

    tokens: Tensor
    lengths: Tensor
    about: str
    decoded: int

    def answers(self) -> list[tuple[int, ...]]:
        return [tuple(row[:length]) for row, length in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)]


@dataclass(frozen=True)
class Case:
    """The questions of a task, and how answers to them are drawn."""

    title: str
    task: step.Task
    greedy: bool

    def __post_init__(self) -> None:
        from pmc_fast.packing import pad_left

        prompts = self.task.prompts
        rows = [prompts.prompt_ids(row.question) for row in self.task.forget]
        ids, mask = pad_left(rows, prompts.pad_id)
        object.__setattr__(self, "inputs", (ids.to(self.task.device), mask.to(self.task.device)))

    def contestants(self) -> dict[str, Callable[[], Drawn]]:
        return {OURS: self._ours, MODULES: self._by_modules, GENERATE: self._generate}

    def _ours(self) -> Drawn:
        from pmc_fast import Sampler

        config, sampler = self.task.config, Sampler(self.task.model)
        drawn = sampler.sample(
            *self.inputs,
            num_samples=config.num_samples,
            max_length=config.max_length,
            temperature=0.0 if self.greedy else config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            eos_token_id=list(self.task.prompts.end_ids),
            seed=config.seed,
        )
        about = f"{sampler.decoder}, {drawn.count} tokens, {drawn.decoded} decoded"
        return Drawn(drawn.tokens.flatten(0, 1), drawn.lengths.flatten(), about, drawn.decoded or drawn.count)

    def _by_modules(self) -> Drawn:
        with _watched(self.task.model):
            return self._ours()

    @torch.no_grad()
    def _generate(self) -> Drawn:
        from transformers import GenerationConfig

        from pmc_fast.integrations.samplers import own_settings

        config, prompts = self.task.config, self.task.prompts
        ids, mask = (x.repeat_interleave(config.num_samples, 0) for x in self.inputs)
        draw = {"temperature": config.temperature, "top_k": config.top_k or 0, "top_p": config.top_p}
        options = GenerationConfig(
            do_sample=not self.greedy,
            max_length=config.max_length,
            eos_token_id=list(prompts.end_ids),
            pad_token_id=prompts.pad_id,
            **({} if self.greedy else draw),
        )
        torch.manual_seed(config.seed)
        with own_settings(self.task.model):
            tokens = self.task.model.generate(ids, attention_mask=mask, generation_config=options)[:, ids.shape[1] :]
        ended = torch.isin(tokens, torch.tensor(list(prompts.end_ids), device=tokens.device))
        first = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1])
        count = int(first.sum())
        return Drawn(tokens, first, f"{count} tokens", count)


@contextmanager
def _watched(model: torch.nn.Module) -> Iterator[None]:
    """A hook that changes nothing: a model that somebody watches is decoded by its own modules."""
    module = next(module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    handle = module.register_forward_hook(lambda module, args, out: None)
    try:
        yield
    finally:
        handle.remove()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `step`, whose model and questions are taken."""
    step.add_arguments(parser)


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Check and measure both cases, print a table each, and write the result."""
    task = step.load(args, device)
    task.model.eval()
    where = environment(device, args.seed)
    limits = measure_limits(device, [getattr(torch, args.dtype)])
    size = f"{args.batch_size} questions x {args.num_samples} answers"
    cases = [Case(f"{size}, as PMC draws", task, False), Case(f"{size}, greedy", task, True)]
    rows: list[Row] = []
    with tqdm(total=len(cases) * 3 * (args.repeats + 1), unit="call", disable=None) as bar:
        for case in cases:
            bar.set_description(case.title)
            rows += measure(case, args.repeats, limits, bar.update)
            print(table([row for row in rows if row.title == case.title]))
            if args.json:
                content = {"environment": where, "config": step.options(args, task), "limits": asdict(limits)}
                content |= {"rows": [asdict(row) for row in rows], "command": args.command_line}
                results.write(args.json, SCHEMA, content)


def measure(case: Case, repeats: int, limits: Limits, tick: Callable[[], object] = lambda: None) -> list[Row]:
    """A row for each contestant of a case; a wrong one has no time."""
    dtype = next(case.task.model.parameters()).dtype
    contestants, rows, first = case.contestants(), {}, {}
    for name, call in contestants.items():
        with PeakMemory(case.task.device) as peak:
            first[name] = call()
        tick()
        row = Row("sampling", case.title, str(dtype).removeprefix("torch."), name, peak_bytes=peak.bytes)
        try:
            evidence = f"{first[name].about}{agreement(case, name, first[name], first[OURS], dtype)}"
            rows[name] = replace(row, right=True, evidence=evidence)
        except Wrong as error:
            rows[name] = replace(row, right=False, evidence=str(error), peak_bytes=None)
    right = {name: call for name, call in contestants.items() if rows[name].right}
    times = interleave(right, repeats, device=case.task.device, at_least_s=0.0, tick=tick)
    for name, seconds in times.items():
        flops, moved = _work(case.task.model, first[name])
        spread, ratio = Spread.of(seconds), times_as_long(seconds, times[OURS])
        share = limits.seconds(flops, moved, rows[name].dtype) / spread.median
        measured = {"seconds": spread, "repeats": repeats, "ratio": ratio, "share_of_limit": share}
        rows[name] = replace(rows[name], **measured, flops=flops, bytes=moved)
    return list(rows.values())


def agreement(case: Case, name: str, drawn: Drawn, ours: Drawn, dtype: torch.dtype) -> str:
    """What of it is pmc_fast's too, in words; raises Wrong where that is too little.

    transformers draws with noise of its own, so only its greedy answers can be compared; in 16 bits answers soon part, so
    their first tokens are.
    """
    if name == OURS or (name == GENERATE and not case.greedy):
        return ""
    pairs = zip(drawn.answers(), ours.answers(), strict=True)
    if dtype == torch.float32:
        equal, what = [a == b for a, b in pairs], "answers"
    else:
        equal, what = [a[:1] == b[:1] for a, b in pairs], "first tokens"
    share = sum(equal) / len(equal)
    if share < _FEWEST_EQUAL:
        raise Wrong(f"only {share:.0%} of the {what} are those of {OURS}")
    return f", {share:.0%} of the {what} equal"


def _work(model: Any, drawn: Drawn) -> tuple[int, int]:
    """Operations on weights, and the bytes of them that must be read: all, once for each step of the longest answer."""
    weights = {id(parameter): parameter for parameter in model.parameters() if parameter.dim() > 1}
    if not model.config.get_text_config(decoder=True).tie_word_embeddings:
        weights.pop(id(model.get_input_embeddings().weight), None)  # of which a few rows are read
    count = sum(weight.numel() for weight in weights.values())
    size = next(iter(weights.values())).element_size()
    return 2 * count * drawn.decoded, int(drawn.lengths.max()) * count * size
