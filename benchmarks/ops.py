"""`python -m benchmarks ops`: each op against its peers, at the sizes that PMC meets."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import results
from benchmarks.bench import OURS, Bench, CannotRun, Verdict, named
from benchmarks.compiled import COMPILED
from benchmarks.limits import Limits, measure_limits
from benchmarks.measure import PeakMemory, Spread, Stopwatch, captured, environment, interleave, times_as_long
from benchmarks.wording import clock, size
from pmc_fast.backend import IMPLEMENTATIONS, choose
from pmc_fast.errors import UserError

SCHEMA = "pmc_fast.benchmarks.ops/1"
OPS = (
    "sample",
    "linear_sample",
    "linear_logprob",
    "collapse_loss",
    "decode_attention",
    "packed_attention",
    "rouge_l_recall",
)
# What is run only where it is asked for.
NAMED_ONLY = (
    "sample_by_options",
    "linear_sample_by_rows",
    "linear_logprob_frozen",
    "decode_attention_by_prefix",
    "decode_attention_by_tiles",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = {"pmc": (False,), "large": (True,), "all": (False, True)}


@dataclass(frozen=True)
class Row:
    """One contestant of one bench; without times if it is wrong or could not run."""

    op: str
    title: str
    dtype: str | None
    contestant: str
    right: bool | None = None
    evidence: str = ""
    seconds: Spread | None = None
    repeats: int = 0
    ratio: float | None = None  # times as long as pmc_fast, turn by turn
    peak_bytes: int | None = None
    forward: Spread | None = None  # the part of `seconds` before the backward pass, where there is one
    flops: int = 0
    bytes: int = 0
    share_of_limit: float | None = None  # the least time that this machine could take, over the median


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ops` besides those of every benchmark."""
    which = {"choices": (*OPS, *NAMED_ONLY), "help": f"of {', '.join(OPS)} (default: these), {', '.join(NAMED_ONLY)}"}
    parser.add_argument("--op", nargs="+", default=list(OPS), metavar="NAME", **which)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: both")
    parser.add_argument(
        "--shapes", choices=SHAPES, default="pmc", help="pmc: a PMC batch's; large: for GPUs; all (default: pmc)"
    )
    parser.add_argument(
        "--peer",
        nargs="+",
        metavar="NAME",
        help="only these besides pmc_fast and plain torch, by their names in the tables (default: every peer)",
    )
    parser.add_argument(
        "--graphs",
        action="store_true",
        help="on a GPU: time replays of a CUDA graph of each call, which is the GPU's time without the host's",
    )
    parser.add_argument(
        "--limit-s",
        type=float,
        default=20.0,
        metavar="S",
        help="a contestant whose first, judged run takes longer than this is not run again: that time is its result "
        "(default: 20)",
    )


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Print a table per bench, and write what is known so far after each."""
    if args.graphs and device.type != "cuda":
        raise UserError(f"--graphs: got --device {device}, want a GPU")
    if not args.limit_s > 0:
        raise UserError(f"--limit-s: got {args.limit_s:g}, want more than 0")
    dtypes = [DTYPES[name] for name in args.dtype]
    benches = [
        bench
        for op in args.op
        for bench in benches_of(op)
        if (bench.dtype is None or bench.dtype in dtypes) and bench.large in SHAPES[args.shapes]
    ]
    if not benches:
        raise UserError(f"--op, --dtype, --shapes: no benchmark of {', '.join(args.op)} fits all three")
    contestants = [contestants_of(bench, args.peer, device) for bench in benches]
    if unknown := set(args.peer or ()) - set().union(*contestants):
        known = sorted({name for bench in benches for name in bench.contestants()} - {OURS})
        raise UserError(f"--peer: got {_listed(sorted(unknown))}, want some of {_listed(known)}")
    rows: list[Row] = []
    where = environment(device, args.seed)
    limits = measure_limits(device, {bench.dtype for bench in benches if bench.dtype})
    print(describe(limits))
    with tqdm(total=sum(map(len, contestants)) * (args.repeats + 1), unit="run", disable=None) as bar:
        for bench, runs in zip(benches, contestants, strict=True):
            bar.set_description(f"{bench.op} {bench.title}"[:60])
            done = bar.n
            options = (args.seed, args.repeats, args.limit_s, limits, bar.update, args.graphs)
            rows += (new := measure(bench, runs, device, *options))
            bar.update(done + len(new) * (args.repeats + 1) - bar.n)
            tqdm.write(table(new))
            if args.json:
                content = {"environment": where, "limits": asdict(limits), "rows": [asdict(row) for row in rows]}
                content["graphs"] = args.graphs
                results.write(args.json, SCHEMA, {**content, "command": args.command_line})


def benches_of(op: str) -> list[Bench]:
    """The benches of `benchmarks/bench_<op>.py`, `op` being one of `NAMED_ONLY` too."""
    return import_module(f"benchmarks.bench_{op}").BENCHES


def contestants_of(bench: Bench, peers: Sequence[str] | None, device: torch.device) -> dict[str, Callable[[Any], Any]]:
    """Who runs: pmc_fast, the yardstick, and of the others those named; None is all.

    The implementation that pmc_fast chooses by itself does not run a second time by its name.
    """
    runs = dict(bench.contestants())
    if bench.op in IMPLEMENTATIONS:
        runs.pop(named(choose(bench.op, None, device.type, bench.dtype, bench.preferred(device.type))), None)
    return {name: run for name, run in runs.items() if peers is None or name in (OURS, bench.yardstick, *peers)}


def _listed(names: Sequence[str]) -> str:
    """Quoted, since some hold commas."""
    return ", ".join(map(repr, names))


def describe(limits: Limits) -> str:
    """The machine's limits in a line."""
    rates = [f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in sorted(limits.flops_per_s.items())]
    return f"This machine: {', '.join([f'{limits.bytes_per_s / 1e9:.1f} GB/s copied', *rates])}.\n"


def measure(
    bench: Bench,
    runs: Mapping[str, Callable[[Any], Any]],
    device: torch.device,
    seed: int,
    repeats: int,
    limit_s: float,
    limits: Limits | None,
    tick: Callable[[], object],
    graphs: bool = False,
) -> list[Row]:
    """Judge every contestant of a bench, then time those that are right in turns, as replays of graphs if asked for."""
    gc.collect()
    torch.manual_seed(seed)
    inputs = bench.make_inputs(seed, device)
    oracle = bench.oracle(inputs)
    dtype = str(bench.dtype).removeprefix("torch.") if bench.dtype else None
    row = partial(Row, bench.op, bench.title, dtype)
    least = limits.seconds(bench.flops, bench.moved_bytes, dtype) if limits and bench.moved_bytes else None

    verdicts: dict[str, Verdict] = {}
    peaks: dict[str, int | None] = {}
    times: dict[str, list[float]] = {}
    budget: Mapping[str, float] | None = None
    for name in sorted(runs, key=lambda name: name != bench.yardstick):
        seconds, peaks[name], verdicts[name] = _judged_run(bench, runs[name], inputs, oracle, device, budget)
        if name == bench.yardstick:
            budget = verdicts[name].errors
        compiles = name == COMPILED or device.type == "cuda"  # in its first run
        if verdicts[name].right and seconds > limit_s and not compiles:
            times[name] = [seconds]
        tick()
    del oracle

    quick = {name: partial(runs[name], inputs) for name in runs if verdicts[name].right and name not in times}
    for name in list(quick):
        with PeakMemory(device) as peak, Stopwatch(device) as watch:  # again, now that one-time buffers are there
            quick[name]()
        peaks[name] = peak.bytes
        if watch.seconds > limit_s:  # only now known of what its first run compiled
            times[name] = [watch.seconds]
            del quick[name]
        elif graphs:
            try:
                quick[name] = captured(quick[name])
            except RuntimeError as error:
                verdicts[name] = Verdict(None, f"no CUDA graph can hold it: {error}")
                del quick[name]
    times |= interleave(quick, repeats, device=device, tick=tick)

    spreads = {name: Spread.of(seconds) for name, seconds in times.items()}
    rows = []
    for name, verdict in verdicts.items():
        if name not in spreads:
            rows.append(row(name, verdict.right, verdict.evidence))
            continue
        median = spreads[name].median
        forward = [] if graphs else getattr(runs[name], "forward_seconds", [])[-len(times[name]) :]
        rows.append(
            row(
                name,
                True,
                verdict.evidence,
                spreads[name],
                len(times[name]),
                times_as_long(times[name], times[OURS]) if OURS in times else None,
                peaks[name],
                Spread.of(forward) if forward else None,
                bench.flops,
                bench.moved_bytes,
                least / median if least else None,
            )
        )
    return sorted(rows, key=lambda row: list(runs).index(row.contestant))


def _judged_run(
    bench: Bench,
    run: Callable[[Any], Any],
    inputs: Any,
    oracle: Any,
    device: torch.device,
    budget: Mapping[str, float] | None,
) -> tuple[float, int | None, Verdict]:
    try:
        with PeakMemory(device) as peak, Stopwatch(device) as watch:
            result = run(inputs)
    except (CannotRun, ImportError, NotImplementedError, RuntimeError) as error:
        return 0.0, None, Verdict(None, str(error) or type(error).__name__)
    return watch.seconds, peak.bytes, bench.judge(run, result, inputs, oracle, budget)


def table(rows: list[Row]) -> str:
    """The rows of one bench for reading."""
    lines = [f"{rows[0].op}  {rows[0].title}" + (f"  {rows[0].dtype}" if rows[0].dtype else "")]
    head = f"{'median':>10}{'20-80 %':>20}{'forward':>10}{'times ours':>12}{'of limit':>10}{'extra memory':>14}"
    lines.append(f"  {'':28}{head}")
    for row in rows:
        if row.seconds is None:
            why = "not run" if row.right is None else "WRONG, not timed"
            lines.append(f"  {row.contestant:28}{why}: {row.evidence.splitlines()[0]}")
            continue
        between = "one run" if row.repeats == 1 else f"{clock(row.seconds.p20)} - {clock(row.seconds.p80)}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        memory = "" if row.peak_bytes is None else size(row.peak_bytes)
        forward = "" if row.forward is None else clock(row.forward.median)
        share = "" if row.share_of_limit is None else f"{row.share_of_limit:.0%}"
        numbers = f"{clock(row.seconds.median):>10}{between:>20}{forward:>10}{ratio:>12}{share:>10}{memory:>14}"
        lines.append(f"  {row.contestant:28}{numbers}  {row.evidence}")
    return "\n".join(lines) + "\n"
