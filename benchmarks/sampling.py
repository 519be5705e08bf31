"""`python -m benchmarks sampling`: a whole sampling call, by pmc_fast, by the model's modules alone, by transformers' generate.

Answers with little in common are drawn as PMC draws them; greedy ones to a question say all the same, which is the other end.
Of families of models only the former are, by the modules alone just once, and not by transformers' generate. On a GPU calls are also
timed that find the graphs of the one before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import families, results, step
from benchmarks.bench import OURS, Wrong
from benchmarks.limits import PRODUCT, LimitInTurns, Limits, fastest_product, measure_limits
from benchmarks.measure import PeakMemory, Spread, Stopwatch, environment, interleave, times_as_long
from benchmarks.ops import Row, table

if TYPE_CHECKING:
    from pmc_fast import Sampler

SCHEMA = "pmc_fast.benchmarks.sampling/1"
MODULES, GENERATE, KEPT = "pmc_fast, by modules", "transformers' generate", "pmc_fast, graphs kept"

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
    brief: bool = False

    def __post_init__(self) -> None:
        from pmc_fast.packing import pad_left

        prompts = self.task.prompts
        rows = [prompts.prompt_ids(row.question) for row in self.task.forget]
        ids, mask = pad_left(rows, prompts.pad_id)
        object.__setattr__(self, "inputs", (ids.to(self.task.device), mask.to(self.task.device)))

    def contestants(self) -> dict[str, Callable[[], Drawn]]:
        """What holds memory between its calls comes last: it counts among the others' later."""
        from pmc_fast import Sampler

        found = {OURS: self._ours, MODULES: self._by_modules}
        if not self.brief:
            found[GENERATE] = self._generate
            if self.task.device.type == "cuda":
                found[KEPT] = partial(self._ours, Sampler(self.task.model, keep_graphs=True))
        return found

    def _ours(self, sampler: Sampler | None = None) -> Drawn:
        from pmc_fast import Sampler

        config, sampler = self.task.config, sampler or Sampler(self.task.model)
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
    families.add_argument(parser)


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Check and measure the cases, print a table each, and write the result."""
    where = environment(device, args.seed)
    limits = measure_limits(device, [getattr(torch, args.dtype)])
    size = f"{args.batch_size} questions x {args.num_samples} answers"
    rows: list[Row] = []
    with tqdm(unit="call", disable=None) as bar:
        for family, task in families.tasks(args, device):
            task.model.eval()
            if family is None:
                cases = [Case(f"{size}, as PMC draws", task, False), Case(f"{size}, greedy", task, True)]
            else:
                cases = [Case(f"{family}, {size}", task, False, brief=True)]
            for case in cases:
                bar.set_description(case.title)
                rows += measure(case, args.repeats, limits, bar.update)
                print(table([row for row in rows if row.title == case.title]))
            if args.json:
                content = {"environment": where, "config": step.options(args, task), "limits": asdict(limits)}
                content |= {"rows": [asdict(row) for row in rows], "command": args.command_line}
                results.write(args.json, SCHEMA, content)


def measure(case: Case, repeats: int, limits: Limits, tick: Callable[[], object] = lambda: None) -> list[Row]:
    """A row for each contestant of a case; a wrong one has no time. The modules are no contestant where ours are they."""
    dtype, device = next(case.task.model.parameters()).dtype, case.task.device
    contestants, rows, first, once = case.contestants(), {}, {}, {}
    for name, call in contestants.items():
        if name == MODULES and first[OURS].about.startswith("modules,"):
            continue
        with PeakMemory(device) as peak, Stopwatch(device) as watch:
            first[name] = call()
        tick()
        row = Row("sampling", case.title, str(dtype).removeprefix("torch."), name, peak_bytes=peak.bytes)
        try:
            evidence = f"{first[name].about}{agreement(case, name, first[name], first[OURS], dtype)}"
            rows[name] = replace(row, right=True, evidence=evidence)
        except Wrong as error:
            rows[name] = replace(row, right=False, evidence=str(error), peak_bytes=None)
        if case.brief and name != OURS and rows[name].right:
            once[name] = [watch.seconds]
    timed = {name: contestants[name] for name, row in rows.items() if row.right and name not in once}
    timed[PRODUCT] = fastest_product(device, dtype)
    times = interleave(timed, repeats, device=device, warmups=int(not case.brief), at_least_s=0.0, tick=tick)
    limit = LimitInTurns(limits, device, rows[OURS].dtype, times.pop(PRODUCT))
    for name, seconds in (times | once).items():
        flops, moved = _work(case, first[name])
        spread, ratio = Spread.of(seconds), times_as_long(seconds, times[OURS])
        share = limit.share(flops, moved, seconds)
        measured = {"seconds": spread, "repeats": len(seconds), "ratio": ratio, "share_of_limit": share}
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


def _work(case: Case, drawn: Drawn) -> tuple[int, int]:
    """Operations on weights, and the bytes of them that must be read: all, once for each step of the longest answer.

    Prompts do not meet the head but at their ends.
    """
    model, prompts = case.task.model, int(case.inputs[1].sum())
    weights = {id(parameter): (name, parameter) for name, parameter in model.named_parameters() if parameter.dim() > 1}
    config = model.config.get_text_config(decoder=True)
    if not config.tie_word_embeddings:
        weights.pop(id(model.get_input_embeddings().weight), None)  # of which a few rows are read
    size = sum(parameter.nbytes for _, parameter in weights.values())
    chosen = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_local_experts", 1)
    count = sum(int(weight.numel() * (chosen if ".experts." in name else 1)) for name, weight in weights.values())
    layers = count - model.get_output_embeddings().weight.numel()
    return 2 * (count * drawn.decoded + layers * prompts), int(drawn.lengths.max()) * size
