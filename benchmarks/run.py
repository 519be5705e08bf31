"""`python -m benchmarks run`: a whole PMC run by pmc_fast and one by the published loop, from the same weights.

Both get the same rows in the same micro-batches, the same seed, learning rates and number of epochs. pmc_fast goes first;
the outcome does not depend on the order, since each starts from restored weights, seed and attention with an optimizer of
its own, and no measurement of the model runs while the clock does.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from tqdm import tqdm

from benchmarks import results, step
from benchmarks.measure import PeakMemory, Stopwatch, environment
from benchmarks.step import DTYPES, OURS, PUBLISHED

SCHEMA = "pmc_fast.benchmarks.run/1"
_MEASURES = ("unlearn_quality", "utility")
_WHOLE_NUMBERS = ("epochs", "batch_size", "accumulation", "num_samples", "evaluate_every", "evaluation_rows")
_SETTINGS = ("epochs", "batch_size", "accumulation", "num_samples", "temperature", "learning_rate", "max_length")

MicroBatch = tuple[list[int], list[Any]]  # indices of forget questions, retain rows


@dataclass(frozen=True)
class Task(step.Task):
    """What both contestants are given, and the state of the model that both start from."""

    evaluated: dict[str, Any]  # the sets that pmc_fast.evaluation.evaluate takes
    epochs: list[list[MicroBatch]]
    weights: dict[str, torch.Tensor]
    attention: str


@dataclass
class Record:
    """A contestant's run so far; `curve` holds an evaluation each, with the seconds of training before it."""

    seconds: float = 0.0
    sampled_tokens: int = 0
    peak_bytes: int | None = None
    curve: list[dict[str, float]] = field(default_factory=list)


class Contestant(Protocol):
    """One way to run PMC."""

    optimizer: torch.optim.Optimizer

    def initialise(self) -> None:
        """Remember the greedy answers of the model as it is now."""

    def prepare(self, batches: list[list[int]]) -> None:
        """Told the forget questions of an optimizer step's micro-batches before the first of them."""

    def gradients(self, indices: list[int], retain: list[Any]) -> tuple[float, int]:
        """Add a micro-batch's gradients to the model's; returns the loss and the number of sampled tokens."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run` besides those of every benchmark."""
    parser.add_argument("--model", metavar="M", help="folder or hub name; default: the demo's, which learns first")
    parser.add_argument("--forget", metavar="FILE", help="JSON lines of question and answer; with --model")
    parser.add_argument("--retain", metavar="FILE", help="JSON lines of question and answer; with --model")
    method = parser.add_argument_group("method, by default as published for Llama-3.2-3B; without --model, the demo's")
    method.add_argument("--epochs", type=int, metavar="N", help="passes over the forget rows")
    method.add_argument("--batch-size", type=int, metavar="B", help="forget and retain rows of a micro-batch")
    method.add_argument("--accumulation", type=int, metavar="N", help="micro-batches per optimizer step")
    method.add_argument("--num-samples", type=int, metavar="N", help="answers per question")
    method.add_argument("--temperature", type=float, metavar="T", help="of sampling")
    method.add_argument("--learning-rate", type=float, metavar="LR", help="the highest; reached after one epoch")
    method.add_argument("--max-length", type=int, metavar="L", help="tokens of padded prompt and answer")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (default: float32)")
    parser.add_argument(
        "--evaluate-every", type=int, default=1, metavar="EPOCHS", help="epochs between evaluations (default: 1)"
    )
    parser.add_argument(
        "--evaluation-rows", type=int, default=100, metavar="N", help="rows of each set to evaluate (default: 100)"
    )


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Run PMC twice, print a table, and write what is known so far after each evaluation."""
    task = load(args, device)
    about = {
        "config": _options(args, task),
        "environment": environment(device, args.seed),
        "command": args.command_line,
    }
    records: dict[str, Record] = {}

    def write() -> None:
        if args.json:
            results.write(args.json, SCHEMA, {**summary(records), **about})

    with tqdm(total=2 * sum(map(len, task.epochs)), unit="micro-batch", disable=None) as bar:
        for name, kind in ((OURS, _PmcFast), (PUBLISHED, _Published)):
            records[name] = Record()
            take_run(task, name, kind, records[name], args.evaluate_every, bar, write)
    print(table(summary(records)))


def load(args: argparse.Namespace, device: torch.device) -> Task:
    """The model and the rows that the options name; without --model, the demo's, once the model has learnt the rows.

    Raises UserError for options out of range or that do not fit together, and for a model that cannot be loaded.
    """
    from pmc_fast.errors import UserError
    from pmc_fast.prompts import Prompts

    config = configuration(args)
    if args.model is None:
        model, tokenizer, fiction = _tiny(args.seed)
        model = model.to(device)
        sets = {"forget": fiction.forget, "retain": fiction.retain, "paraphrased": fiction.forget_paraphrased}
        utility = {"world": fiction.world}
    else:
        from pmc_fast.data import read_jsonl
        from pmc_fast.loading import load_model

        sets, utility = {"forget": read_jsonl(args.forget), "retain": read_jsonl(args.retain)}, {}
        model, tokenizer = load_model(args.model, device, args.dtype)
    attention = model.config._attn_implementation
    prompts = Prompts(tokenizer, style=config.prompt_style, system=config.system_prompt)
    width = max(len(prompts.prompt_ids(row.question)) for row in sets["forget"])
    if config.max_new_tokens is not None:  # the published loop knows max_length alone
        config = replace(config, max_length=width + config.max_new_tokens, max_new_tokens=None)
    if config.max_length <= width:
        raise UserError(f"--max-length: got {config.max_length}, want more than the longest prompt ({width} tokens)")
    if args.model is None:
        _learn(model, prompts, fiction.training, args.seed)
        model = model.to(getattr(torch, args.dtype))
    return Task(
        model=model,
        prompts=prompts,
        forget=sets["forget"],
        retain=sets["retain"],
        config=config,
        device=device,
        evaluated={
            **{name: rows[: args.evaluation_rows] for name, rows in sets.items()},
            "utility": {name: rows[: args.evaluation_rows] for name, rows in utility.items()},
        },
        epochs=micro_batches(config, len(sets["forget"]), sets["retain"]),
        weights={name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()},
        attention=attention,
    )


def configuration(args: argparse.Namespace) -> Any:
    """The PMCConfig of these options; raises UserError for what no model or rows are needed to refuse."""
    from pmc_fast.config import PMCConfig
    from pmc_fast.demo import run as demo
    from pmc_fast.errors import UserError

    step.names_files(args)
    for name in _WHOLE_NUMBERS:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{_option(name)}: got {value}, want 1 or more")
    for name in ("temperature", "learning_rate"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{_option(name)}: got {value}, want a finite number above 0")
    defaults = PMCConfig(**demo.UNLEARNING) if args.model is None else PMCConfig.published("llama-3.2-3b")
    changes = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    if args.max_length is not None:
        changes["max_new_tokens"] = None
    return replace(defaults, seed=args.seed, **changes)


def _tiny(seed: int) -> tuple[Any, Any, Any]:
    """The demo's model before it has learnt anything, its tokenizer, and the demo's fiction."""
    from pmc_fast.demo.fiction import make_fiction
    from pmc_fast.demo.model import new_model, train_tokenizer
    from pmc_fast.demo.run import SIZES

    fiction = make_fiction(seed, **SIZES)
    tokenizer = train_tokenizer(fiction.training)
    return new_model(tokenizer, seed), tokenizer, fiction


def _learn(model: Any, prompts: Any, rows: Sequence[Any], seed: int) -> None:
    """Train the model on the rows as the demo does, so that there is something to forget."""
    from pmc_fast.config import PMCConfig
    from pmc_fast.demo.run import LEARNING
    from pmc_fast.pmc import PMC
    from pmc_fast.training import finetune

    config = PMCConfig(seed=seed, **LEARNING)
    finetune(PMC(model, prompts, config), rows, config, max_grad_norm=1.0)


def micro_batches(config: Any, forget_rows: int, retain: Sequence[Any]) -> list[list[MicroBatch]]:
    """Every epoch's micro-batches: each forget question once, in random order, and as many random retain rows as fit."""
    rng = random.Random(config.seed)
    epochs = []
    for _ in range(config.epochs):
        order = rng.sample(range(forget_rows), forget_rows)
        batches = [order[first : first + config.batch_size] for first in range(0, forget_rows, config.batch_size)]
        epochs.append([(indices, _draw(rng, retain, config.batch_size)) for indices in batches])
    return epochs


def _draw(rng: random.Random, rows: Sequence[Any], count: int) -> list[Any]:
    """Rows drawn at random, none twice if there are enough."""
    return rng.choices(rows, k=count) if len(rows) < count else rng.sample(rows, count)


def take_run(
    task: Task,
    name: str,
    kind: Callable[[Task], Contestant],
    record: Record,
    evaluate_every: int,
    bar: tqdm,
    write: Callable[[], None],
) -> None:
    """One contestant's run from the task's weights; fills the record and calls `write` after each evaluation.

    Peak memory is that of the whole run, evaluations included: they need no gradients and draw one answer per question.
    Raises UserError if the run diverges.
    """
    from pmc_fast.errors import UserError

    def evaluate(epoch: int) -> None:
        bar.set_description(f"{name}: evaluating")
        record.curve.append({"seconds": record.seconds, "epoch": epoch, **measured(task)})
        write()

    model, epoch = task.model, 0
    model.load_state_dict(task.weights)
    model.set_attn_implementation(task.attention)
    model.train()
    torch.manual_seed(task.config.seed)
    try:
        with PeakMemory(task.device) as peak:
            evaluate(0)
            bar.set_description(f"{name}: greedy answers")
            contestant = kind(task)
            with Stopwatch(task.device) as watch:
                contestant.initialise()
            record.seconds += watch.seconds
            for epoch in range(1, task.config.epochs + 1):
                bar.set_description(f"{name}: epoch {epoch}")
                with Stopwatch(task.device) as watch:
                    record.sampled_tokens += _take_epoch(task, contestant, epoch, bar)
                record.seconds += watch.seconds
                if epoch % evaluate_every == 0 or epoch == task.config.epochs:
                    evaluate(epoch)
    except UserError:
        raise
    except ValueError as error:  # what the ops raise at logits that are no numbers
        raise UserError(f"{name}: epoch {epoch}: {error}") from error
    record.peak_bytes = peak.bytes
    write()


def _take_epoch(task: Task, contestant: Contestant, epoch: int, bar: tqdm) -> int:
    """Train on an epoch's micro-batches, their gradients summed over a step; returns the number of sampled tokens."""
    from pmc_fast.errors import UserError
    from pmc_fast.training import rate_factor

    config, optimizer, batches = task.config, contestant.optimizer, task.epochs[epoch - 1]
    steps = math.ceil(len(batches) / config.accumulation)
    sampled = 0
    for number in range(steps):
        factor = rate_factor((epoch - 1) * steps + number, round(config.warmup_epochs * steps), config.epochs * steps)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        of_step = batches[number * config.accumulation : (number + 1) * config.accumulation]
        contestant.prepare([indices for indices, _ in of_step])
        for indices, retain in of_step:
            loss, tokens = contestant.gradients(indices, retain)
            if not math.isfinite(loss):
                raise UserError(f"--learning-rate: the loss is {loss} in epoch {epoch}; want a lower learning rate")
            sampled += tokens
            bar.update()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return sampled


def measured(task: Task) -> dict[str, float]:
    """Unlearn quality and utility of the model as it is now, in percent."""
    from pmc_fast.evaluation import evaluate

    found = evaluate(task.model, task.prompts, **task.evaluated)
    return {name: found[name] for name in _MEASURES}


class _Published:
    def __init__(self, task: Task) -> None:
        self._task = task
        self._loop = step.published_loop(task)
        self.optimizer = _optimizer(task, fused=False)

    def initialise(self) -> None:
        self._loop.initialise([row.question for row in self._task.forget], self._task.config.batch_size)

    def prepare(self, batches: list[list[int]]) -> None:
        """It samples for each micro-batch by itself."""

    def gradients(self, indices: list[int], retain: list[Any]) -> tuple[float, int]:
        loop, sampled = self._loop, 0
        if pending := loop.pending(indices):
            samples = loop.sample(pending)
            loop.score(pending, samples)
            sampled = samples.count
        losses = loop.train(indices, [self._task.forget[index] for index in indices], retain, None)
        return losses.collapse + self._task.config.retain_weight * losses.retain, sampled


class _PmcFast:
    def __init__(self, task: Task) -> None:
        from pmc_fast.pmc import PMC

        self._task = task
        self._pmc = PMC(task.model, task.prompts, task.config)
        self.optimizer = _optimizer(task, fused=task.device.type in ("cpu", "cuda"))  # as pmc_fast.training has it

    def initialise(self) -> None:
        self._pmc.initialise([row.question for row in self._task.forget])

    def prepare(self, batches: list[list[int]]) -> None:
        self._pmc.prepare(batches)

    def gradients(self, indices: list[int], retain: list[Any]) -> tuple[float, int]:
        loss = self._pmc.loss(indices, retain)
        loss.backward()
        return loss.item(), self._pmc.stats["sampled_tokens"]


def _optimizer(task: Task, fused: bool) -> torch.optim.Optimizer:
    config = task.config
    return torch.optim.AdamW(
        task.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused
    )


def summary(records: Mapping[str, Record]) -> dict[str, Any]:
    """What is known so far of each contestant, None if it has not begun; the ratios once both are through."""
    begun = {name: record for name, record in records.items() if record.curve}
    until = max((record.seconds for record in begun.values()), default=0.0)
    found: dict[str, Any] = {PUBLISHED: None, OURS: None}
    for name, record in begun.items():
        found[name] = {
            "seconds": record.seconds,
            "before": {measure: record.curve[0][measure] for measure in _MEASURES},
            "after": {measure: record.curve[-1][measure] for measure in _MEASURES},
            "curve": list(record.curve),
            "area": area(record.curve, until),
            "peak_bytes": record.peak_bytes,
            "sampled_tokens": record.sampled_tokens,
        }
    published, ours = found[PUBLISHED], found[OURS]
    both = published is not None and ours is not None and published["curve"][-1]["epoch"] == ours["curve"][-1]["epoch"]
    found["ratio"] = ratios(published, ours) if both else None
    return found


def ratios(published: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, float | None]:
    """How many times longer the published loop takes, and how many times larger our area is: None over an area of 0."""
    return {
        "seconds": published["seconds"] / ours["seconds"],
        "area": ours["area"] / published["area"] if published["area"] else None,
    }


def area(curve: Sequence[Mapping[str, float]], until: float) -> float:
    """The mean unlearn quality from 0 to `until` seconds: linear between evaluations, constant after the last one."""
    points = [(point["seconds"], point["unlearn_quality"]) for point in curve]
    points.append((until, points[-1][1]))
    if until == 0:
        return points[-1][1]
    return sum((end - start) * (first + last) / 2 for (start, first), (end, last) in pairwise(points)) / until


def table(result: Mapping[str, Any]) -> str:
    """The result for reading."""
    published, ours = _column(result[PUBLISHED]), _column(result[OURS])
    ratio = {"time": result["ratio"]["seconds"], "quality, mean over time": result["ratio"]["area"]}
    lines = [f"{'':24}{'published':>14}{'pmc_fast':>14}{'ratio':>10}"]
    for title in published:
        times = "" if ratio.get(title) is None else f"{ratio[title]:.2f}x"
        lines.append(f"{title:24}{published[title]:>14}{ours[title]:>14}{times:>10}".rstrip())
    return "\n".join(lines)


def _column(found: Mapping[str, Any]) -> dict[str, str]:
    before, after, peak = found["before"], found["after"], found["peak_bytes"]
    return {
        "time": f"{found['seconds']:.1f} s",
        "unlearn quality before": f"{before['unlearn_quality']:.2f} %",
        "unlearn quality after": f"{after['unlearn_quality']:.2f} %",
        "utility before": f"{before['utility']:.2f} %",
        "utility after": f"{after['utility']:.2f} %",
        "quality, mean over time": f"{found['area']:.2f} %",
        "sampled tokens": f"{found['sampled_tokens']}",
        "peak extra memory": "-" if peak is None else f"{peak / 1e9:.3g} GB",
    }


def _options(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    return {
        "model": results.name_of(args.model) or "the demo's",
        "parameters": sum(parameter.numel() for parameter in task.model.parameters()),
        "forget": results.name_of(args.forget),
        "retain": results.name_of(args.retain),
        "forget_rows": len(task.forget),
        "retain_rows": len(task.retain),
        "dtype": args.dtype,
        "evaluate_every": args.evaluate_every,
        "evaluation_rows": args.evaluation_rows,
        **asdict(task.config),
    }


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
