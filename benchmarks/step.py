"""`python -m benchmarks step`: one micro-batch of PMC, by the published loop and by pmc_fast, in turns.

pmc_fast samples every answer to its end, for a fair time per token, and once more with pruning, for the time per pick.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

import torch
from tqdm import tqdm

from benchmarks import results
from benchmarks.bench import Wrong
from benchmarks.limits import Limits, measure_limits
from benchmarks.measure import PeakMemory, Spread, Stopwatch, environment
from pmc_fast.phases import phase

SCHEMA = "pmc_fast.benchmarks.step/1"
DTYPES = ("float32", "bfloat16")  # in float16 AdamW's second moments underflow, here as in the published loop
PUBLISHED, OURS, PRUNED = "published", "pmc_fast", "pmc_fast_pruned"

# Two right ways to compute a loss differ by rounding alone. The gradient of a whole model gathers more of it.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Turn:
    """One micro-batch's cost: draw samples; decode and score them; loss, gradients and optimizer step."""

    sample_s: float
    score_s: float
    train_s: float
    total_s: float
    sampled_tokens: int
    decoded_tokens: int | None  # of those, what went through the model, as far as that is known
    peak_bytes: int | None


@dataclass(frozen=True)
class Task:
    """What both contestants work on: the same model object, prompts, questions and retain rows."""

    model: Any
    prompts: Any
    forget: list[Any]
    retain: list[Any]
    config: Any  # PMCConfig
    device: torch.device


class Contestant(Protocol):
    """One way to take a PMC step."""

    references: Sequence[str]

    def collapse_gradients(self, answers: Sequence[str]) -> float:
        """Leave the gradients of the loss, these answers picked, in the model, and return the loss."""

    def turn(self) -> Turn:
        """One micro-batch from the state after initialisation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `step` besides those of every benchmark."""
    parser.add_argument("--model", metavar="M", help="folder or hub name; default: a tiny model of random weights")
    parser.add_argument("--forget", metavar="FILE", help="JSON lines of question and answer; with --model")
    parser.add_argument("--retain", metavar="FILE", help="JSON lines of question and answer; with --model")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="forget and retain rows (default: 8)")
    parser.add_argument("--num-samples", type=int, default=20, metavar="N", help="answers per question (default: 20)")
    parser.add_argument(
        "--max-length", type=int, default=200, metavar="L", help="tokens of padded prompt and answer (default: 200)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (default: float32)")


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Check that both compute the same, measure them in turns, print a table and write the result."""
    task = load(args, device)
    where = environment(device, args.seed)
    limits = measure_limits(device, [getattr(torch, args.dtype)])
    contestants: dict[str, Contestant] = {}
    turns: dict[str, list[Turn]] = {PUBLISHED: [], OURS: [], PRUNED: []}
    with tqdm(total=1 + len(turns) * (args.repeats + 2), unit="turn", disable=None) as bar:
        bar.set_description("greedy answers")
        for name in turns:
            contestants[name] = Published(task) if name == PUBLISHED else PmcFast(task, prune=name == PRUNED)
            bar.update()
        bar.set_description("same loss and gradients?")
        agreement = check(task, contestants)
        bar.update()
        order, train_flops = list(contestants), 0
        weights = _fingerprint(task.model)
        for repeat in range(args.repeats + 1):
            for name in order if repeat % 2 else reversed(order):
                bar.set_description(name if repeat else f"{name}, warm-up")
                task.model.train()
                turn = contestants[name].turn()
                if _fingerprint(task.model) != weights:
                    raise Wrong(f"{name} changed the model's weights at a learning rate of 0")
                if repeat:
                    turns[name].append(turn)
                elif name == OURS:
                    train_flops = contestants[name].train_flops()
                bar.update()
            if repeat and args.json:  # after each round, so that a run cut short loses nothing
                content = {**summary(turns), **training(turns, train_flops, limits, args.dtype)}
                content |= {"agreement": agreement, "config": options(args, task)}
                results.write(args.json, SCHEMA, {**content, "environment": where, "command": args.command_line})
    print(table({**summary(turns), **training(turns, train_flops, limits, args.dtype)}, args.repeats))


def training(turns: Mapping[str, Sequence[Turn]], flops: int, limits: Limits, dtype: str) -> dict[str, Any]:
    """The operations of pmc_fast's training part, the machine's limits, and what share of its rate of products that is."""
    share = flops / limits.flops_per_s[dtype] / Spread.of([turn.train_s for turn in turns[OURS]]).median
    return {"train_flops": flops, "train_share_of_limit": share, "limits": asdict(limits)}


def names_files(args: argparse.Namespace) -> bool:
    """Whether the options name a model and rows; raises UserError if they name some of these."""
    from pmc_fast.errors import UserError

    named = {"--model": args.model, "--forget": args.forget, "--retain": args.retain}
    missing = [option for option, value in named.items() if value is None]
    if missing and len(missing) < len(named):
        raise UserError(f"{', '.join(missing)}: missing; want --model, --forget and --retain together or none of them")
    return not missing


def options(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """What a result says of the options and of what they led to."""
    config = {name: getattr(task.config, name) for name in ("num_samples", "temperature", "top_k", "top_p")}
    return {
        "model": results.name_of(args.model) or "random weights",
        "parameters": sum(parameter.numel() for parameter in task.model.parameters()),
        "forget": results.name_of(args.forget),
        "retain": results.name_of(args.retain),
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "repeats": args.repeats,
        **config,
        **{name: getattr(task.config, name) for name in ("max_length", "min_words", "retain_weight")},
    }


def load(
    args: argparse.Namespace, device: torch.device, new_model: Callable[[Any, int], torch.nn.Module] | None = None
) -> Task:
    """The model and the rows that the options name; without --model it is made by `new_model` of a tokenizer and a seed.

    Raises UserError for options that do not fit together, too few rows, a model that cannot be loaded.
    """
    from pmc_fast.config import PMCConfig
    from pmc_fast.errors import UserError
    from pmc_fast.prompts import Prompts

    if args.batch_size < 1:
        raise UserError(f"--batch-size: got {args.batch_size}, want 1 or more")
    config = PMCConfig(
        num_samples=args.num_samples, max_length=args.max_length, batch_size=args.batch_size, seed=args.seed
    )
    if not names_files(args):
        model, tokenizer, forget, retain = _made(args.seed, new_model)
        model = model.to(device, getattr(torch, args.dtype))
    else:
        from pmc_fast.data import read_jsonl
        from pmc_fast.loading import load_model

        forget, retain = read_jsonl(args.forget), read_jsonl(args.retain)
        model, tokenizer = load_model(args.model, device, args.dtype)
    for option, rows in (("--forget", forget), ("--retain", retain)):
        if len(rows) < args.batch_size:
            raise UserError(f"{option}: got {len(rows)} rows, want at least --batch-size ({args.batch_size})")
    rng = random.Random(args.seed)
    forget, retain = rng.sample(forget, args.batch_size), rng.sample(retain, args.batch_size)
    prompts = Prompts(tokenizer, style=config.prompt_style, system=config.system_prompt)
    width = max(len(prompts.prompt_ids(row.question)) for row in forget)
    if args.max_length <= width:
        raise UserError(f"--max-length: got {args.max_length}, want more than the longest prompt ({width} tokens)")
    return Task(model, prompts, forget, retain, config, device)


def _made(
    seed: int, new_model: Callable[[Any, int], torch.nn.Module] | None
) -> tuple[torch.nn.Module, Any, list[Any], list[Any]]:
    """A model, a tiny one unless another is asked for, its tokenizer and rows."""
    from pmc_fast.demo import model
    from pmc_fast.demo.fiction import make_fiction

    fiction = make_fiction(seed, people=24, forget_people=8, places=4)
    tokenizer = model.train_tokenizer(fiction.training)
    return (new_model or model.new_model)(tokenizer, seed), tokenizer, fiction.forget, fiction.retain


def _fingerprint(model: torch.nn.Module) -> float:
    return sum(float(parameter.detach().double().sum()) for parameter in model.parameters())


def _optimizer(model: torch.nn.Module, fused: bool) -> torch.optim.Optimizer:
    """AdamW with a learning rate of 0: the same arithmetic, and every turn finds the same weights."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.01, fused=fused)


def published_loop(task: Task) -> Any:
    """The published loop with the task's settings."""
    from benchmarks.published_loop import PublishedConfig, PublishedLoop

    config = PublishedConfig(
        num_samples=task.config.num_samples,
        temperature=task.config.temperature,
        top_k=task.config.top_k,
        top_p=task.config.top_p,
        max_length=task.config.max_length,
        min_len=task.config.min_words,
        retain_weight=task.config.retain_weight,
    )
    return PublishedLoop(task.model, task.prompts, config)


class Published:
    def __init__(self, task: Task) -> None:
        self._task = task
        self._optimizer = _optimizer(task.model, fused=False)
        self._attention = task.model.config._attn_implementation
        self._indices = list(range(len(task.forget)))
        self._loop = published_loop(task)
        self._loop.initialise([row.question for row in task.forget])
        self.references = self._loop.references

    def collapse_gradients(self, answers: Sequence[str]) -> float:
        from benchmarks.published_loop import Stored

        self._loop.stored = {index: Stored(answer, 0.0) for index, answer in enumerate(answers)}
        with self._own_attention():
            losses = self._loop.train(self._indices, self._task.forget, self._task.retain, None)
        return losses.collapse + self._task.config.retain_weight * losses.retain

    def turn(self) -> Turn:
        loop, device = self._loop, self._task.device
        loop.stored = {}
        torch.manual_seed(self._task.config.seed)
        with self._own_attention(), PeakMemory(device) as peak, Stopwatch(device) as total:
            with Stopwatch(device) as sample:
                pending = loop.pending(self._indices)
                samples = loop.sample(pending)
            with Stopwatch(device) as score:
                loop.score(pending, samples)
            with Stopwatch(device) as train:
                loop.train(self._indices, self._task.forget, self._task.retain, self._optimizer)
        return Turn(sample.seconds, score.seconds, train.seconds, total.seconds, samples.count, None, peak.bytes)

    @contextmanager
    def _own_attention(self) -> Iterator[None]:
        """The attention that the model came with: pmc_fast's stays in place once it was there."""
        theirs = self._task.model.config._attn_implementation
        self._task.model.set_attn_implementation(self._attention)
        try:
            yield
        finally:
            self._task.model.set_attn_implementation(theirs)


class PmcFast:
    def __init__(self, task: Task, prune: bool = False) -> None:
        from pmc_fast.pmc import PMC

        self._task = task
        self._indices = list(range(len(task.forget)))
        self._optimizer = _optimizer(
            task.model, fused=task.device.type in ("cpu", "cuda")
        )  # as pmc_fast.training has it
        self._pmc = PMC(task.model, task.prompts, replace(task.config, prune=prune))
        self._pmc.initialise([row.question for row in task.forget])
        self._start = self._pmc.state_dict()
        self.references = self._start["ledger"]["initial_answers"]

    def collapse_gradients(self, answers: Sequence[str]) -> float:
        entries = {
            str(index): {"text": answer, "tokens": self._task.prompts.answer_ids(answer), "score": 0.0}
            for index, answer in enumerate(answers)
        }
        self._pmc.load_state_dict({**self._start, "ledger": {**self._start["ledger"], "entries": entries}})
        loss = self._pmc.loss(self._indices, self._task.retain)
        loss.backward()
        return loss.item()

    def turn(self) -> Turn:
        self._pmc.load_state_dict(self._start)
        optimizer, device = self._optimizer, self._task.device
        with PeakMemory(device) as peak, Stopwatch(device) as total:
            loss = self._pmc.loss(self._indices, self._task.retain)
            with phase("backward"):
                loss.backward()
            with phase("optimizer"):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        stats = self._pmc.stats
        sample, score = stats["seconds"]["sample"], stats["seconds"]["score"]
        # whatever is neither sampling nor scoring is training, so that nothing goes uncounted
        train = total.seconds - sample - score
        tokens = stats["sampled_tokens"], stats["decoded_tokens"]
        return Turn(sample, score, train, total.seconds, *tokens, peak.bytes)

    def train_flops(self) -> int:
        """Operations of the products of the last turn's forward and backward pass, its picks trained on again."""
        from torch.utils.flop_counter import FlopCounterMode

        from pmc_fast.flops import FORMULAS

        ledger = self._pmc.state_dict()["ledger"]
        # Final, so that nothing is sampled.
        picked = {index: {**entry, "score": 0.0} for index, entry in ledger["entries"].items()}
        self._pmc.load_state_dict({**self._start, "ledger": {**ledger, "entries": picked}})
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            self._pmc.loss(self._indices, self._task.retain).backward()
        self._task.model.zero_grad(set_to_none=True)
        return counter.get_total_flops()


def check(task: Task, contestants: Mapping[str, Contestant]) -> dict[str, float]:
    """Raise Wrong unless both start from the same greedy answers and take the same step towards them.

    Some greedy answers may differ, where two tokens are equally likely but for rounding; in bfloat16 long ones hardly ever
    agree to their ends, so the beginnings are compared.
    """
    published, ours = contestants[PUBLISHED], contestants[OURS]
    dtype = next(task.model.parameters()).dtype
    same = sum(_agree(a, b, dtype) for a, b in zip(published.references, ours.references, strict=True))
    if same < len(published.references) / 2:
        raise Wrong(f"only {same} of {len(published.references)} greedy answers of the initial model agree")
    task.model.eval()
    answers = [answer or "nothing" for answer in published.references]
    loss = published.collapse_gradients(answers)
    theirs = [None if p.grad is None else p.grad.clone() for p in task.model.parameters()]
    task.model.zero_grad(set_to_none=True)
    loss_error = abs(ours.collapse_gradients(answers) - loss) / abs(loss)
    gradient_error = distance([p.grad for p in task.model.parameters()], theirs)
    task.model.zero_grad(set_to_none=True)
    if not (loss_error <= LOSS_TOLERANCE[dtype] and gradient_error <= GRADIENT_TOLERANCE[dtype]):
        raise Wrong(f"on the same answers the losses differ by {loss_error:.1e}, the gradients by {gradient_error:.1e}")
    return {"same_greedy_answers": same, "loss_error": loss_error, "gradient_error": gradient_error}


def _agree(a: str, b: str, dtype: torch.dtype) -> bool:
    return a == b if dtype == torch.float32 else a.split()[:1] == b.split()[:1]


def distance(got: Sequence[torch.Tensor | None], want: Sequence[torch.Tensor | None]) -> float:
    """Of two gradients of a whole model, relative to the second; infinite where one has what the other lacks."""
    difference = norm = 0.0
    for g, w in zip(got, want, strict=True):
        if (g is None) != (w is None):
            return float("inf")
        if w is not None:
            difference += float((g.double() - w.double()).square().sum())
            norm += float(w.double().square().sum())
    return (difference / norm) ** 0.5


def summary(turns: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """Medians of each contestant and of the turns' ratios (how many times faster ours is), the spreads and all turns."""
    names = [field.name for field in fields(Turn)]
    median: dict[str, dict[str, Any]] = {}
    spread: dict[str, dict[str, Any]] = {}
    for contestant, taken in turns.items():
        columns = {name: [getattr(turn, name) for turn in taken] for name in names}
        spreads = {name: None if None in column else Spread.of(column) for name, column in columns.items()}
        median[contestant] = {name: s and s.median for name, s in spreads.items()}
        for name in ("sampled_tokens", "decoded_tokens", "peak_bytes"):
            if median[contestant][name] is not None:
                median[contestant][name] = round(median[contestant][name])
        spread[contestant] = {name: s and [s.p20, s.p80] for name, s in spreads.items()}
    per_turn = [ratios(asdict(a), asdict(b)) for a, b in zip(turns[PUBLISHED], turns[OURS], strict=True)]
    of_ratios = {name: Spread.of([ratio[name] for ratio in per_turn]) for name in per_turn[0]}
    if PRUNED in turns:
        pairs = zip(turns[PUBLISHED], turns[PRUNED], strict=True)
        per_pick = [published.sample_s / pruned.sample_s for published, pruned in pairs]
        of_ratios["sample_per_pick_pruned"] = Spread.of(per_pick)
    return {
        **median,
        "ratio": {name: s.median for name, s in of_ratios.items()},
        "spread": {**spread, "ratio": {name: [s.p20, s.p80] for name, s in of_ratios.items()}},
        "turns": {contestant: [asdict(turn) for turn in taken] for contestant, taken in turns.items()},
    }


def ratios(published: Mapping[str, float], ours: Mapping[str, float]) -> dict[str, float]:
    """How many times longer the published loop takes; the total as if ours had sampled as many tokens."""
    per_token = ours["sample_s"] / max(1, ours["sampled_tokens"])
    equal = per_token * published["sampled_tokens"] + ours["score_s"] + ours["train_s"]
    return {
        "sample_per_token": published["sample_s"] / max(1, published["sampled_tokens"]) / per_token,
        "train": published["train_s"] / ours["train_s"],
        "total_at_equal_tokens": published["total_s"] / equal,
    }


def table(result: Mapping[str, Any], repeats: int) -> str:
    """The result for reading."""
    contestants = [name for name in (PUBLISHED, OURS, PRUNED) if name in result]
    lines = [f"{'median of ' + str(repeats):24}" + "".join(f"{name:>17}" for name in contestants)]
    for name, title, scale, unit in (
        ("sample_s", "sample", 1, "s"),
        ("score_s", "decode, score", 1, "s"),
        ("train_s", "train", 1, "s"),
        ("total_s", "total", 1, "s"),
        ("sampled_tokens", "sampled tokens", 1, ""),
        ("decoded_tokens", "decoded tokens", 1, ""),
        ("peak_bytes", "peak extra memory", 1e-9, "GB"),
    ):
        values = [result[contestant][name] for contestant in contestants]
        form = "{:.0f}" if name.endswith("tokens") else "{:.3g} " + unit
        lines.append(f"{title:24}" + "".join(f"{'-' if v is None else form.format(v * scale):>14}" for v in values))
    lines.append("")
    for name, title in (
        ("sample_per_token", "sampling, per token"),
        ("train", "training"),
        ("total_at_equal_tokens", "total, at equal tokens"),
        ("sample_per_pick_pruned", "sampling, per pick"),
    ):
        if name not in result["ratio"]:
            continue
        low, high = result["spread"]["ratio"][name]
        lines.append(f"{title:24}{result['ratio'][name]:>13.2f}x  ({low:.2f} - {high:.2f})")
    if "train_share_of_limit" in result:
        lines.append(
            f"{'training, of the limit':24}{result['train_share_of_limit']:>13.0%}   (the rate of large products)"
        )
    return "\n".join(lines)
