"""`python -m benchmarks ops`: each op against its peers, at the sizes that PMC meets."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import results
from benchmarks.bench import OURS, Bench, Verdict
from benchmarks.measure import PeakMemory, Spread, Stopwatch, environment, interleave

SCHEMA = "pmc_fast.benchmarks.ops/1"
OPS = ("sample", "linear_sample", "linear_logprob", "collapse_loss", "rouge_l_recall")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    ratio: float | None = None  # times as long as pmc_fast
    peak_bytes: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ops` besides those of every benchmark."""
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), metavar="NAME", help=f"of {', '.join(OPS)}")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: both")
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
    dtypes = [DTYPES[name] for name in args.dtype]
    benches = [bench for op in args.op for bench in benches_of(op) if bench.dtype is None or bench.dtype in dtypes]
    rows: list[Row] = []
    where = environment(device, args.seed)
    steps = sum(len(bench.contestants()) for bench in benches) * (args.repeats + 1)
    with tqdm(total=steps, unit="run", disable=None) as bar:
        for bench in benches:
            bar.set_description(f"{bench.op} {bench.title}"[:60])
            done = bar.n
            rows += (new := measure(bench, device, args.seed, args.repeats, args.limit_s, bar.update))
            bar.update(done + len(new) * (args.repeats + 1) - bar.n)
            tqdm.write(table(new))
            if args.json:
                results.write(args.json, SCHEMA, {"environment": where, "rows": [asdict(row) for row in rows]})


def benches_of(op: str) -> list[Bench]:
    """The benches of `benchmarks/bench_<op>.py`."""
    return import_module(f"benchmarks.bench_{op}").BENCHES


def measure(
    bench: Bench, device: torch.device, seed: int, repeats: int, limit_s: float, tick: Callable[[], object]
) -> list[Row]:
    """Judge every contestant of a bench, then time those that are right in turns."""
    gc.collect()
    torch.manual_seed(seed)
    inputs = bench.make_inputs(seed, device)
    oracle = bench.oracle(inputs)
    runs = bench.contestants()
    dtype = str(bench.dtype).removeprefix("torch.") if bench.dtype else None
    row = partial(Row, bench.op, bench.title, dtype)

    verdicts: dict[str, Verdict] = {}
    peaks: dict[str, int | None] = {}
    times: dict[str, list[float]] = {}
    budget: Mapping[str, float] | None = None
    for name in sorted(runs, key=lambda name: name != bench.yardstick):
        seconds, peaks[name], verdicts[name] = _judged_run(bench, runs[name], inputs, oracle, device, budget)
        if name == bench.yardstick:
            budget = verdicts[name].errors
        if verdicts[name].right and seconds > limit_s:
            times[name] = [seconds]
        tick()
    del oracle

    quick = {name: partial(runs[name], inputs) for name in runs if verdicts[name].right and name not in times}
    for name, call in quick.items():
        with PeakMemory(device) as peak:  # again, now that one-time buffers are there
            call()
        peaks[name] = peak.bytes
    times |= interleave(quick, repeats, device=device, tick=tick)

    spreads = {name: Spread.of(seconds) for name, seconds in times.items()}
    ours = spreads.get(OURS)
    rows = []
    for name, verdict in verdicts.items():
        if name not in spreads:
            rows.append(row(name, verdict.right, verdict.evidence))
            continue
        ratio = spreads[name].median / ours.median if ours else None
        rows.append(row(name, True, verdict.evidence, spreads[name], len(times[name]), ratio, peaks[name]))
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
    except (ImportError, NotImplementedError, RuntimeError) as error:
        return 0.0, None, Verdict(False, f"cannot run: {error}")
    return watch.seconds, peak.bytes, bench.judge(run, result, inputs, oracle, budget)


def table(rows: list[Row]) -> str:
    """The rows of one bench for reading."""
    lines = [f"{rows[0].op}  {rows[0].title}" + (f"  {rows[0].dtype}" if rows[0].dtype else "")]
    lines.append(f"  {'':28}{'median':>10}{'20-80 %':>20}{'times ours':>12}{'extra memory':>14}")
    for row in rows:
        if row.seconds is None:
            lines.append(f"  {row.contestant:28}WRONG, not timed: {row.evidence}")
            continue
        between = "one run" if row.repeats == 1 else f"{clock(row.seconds.p20)} - {clock(row.seconds.p80)}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f} MB"
        lines.append(
            f"  {row.contestant:28}{clock(row.seconds.median):>10}{between:>20}{ratio:>12}{memory:>14}  {row.evidence}"
        )
    return "\n".join(lines) + "\n"


def clock(seconds: float) -> str:
    """A time for reading."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
