"""`python -m benchmarks profile`: where the time of one PMC step or one op goes, as a table and a trace."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import ops, results, step
from benchmarks.bench import OURS
from benchmarks.measure import Stopwatch, environment
from pmc_fast.phases import PHASES, PREFIX

SCHEMA = "pmc_fast.benchmarks.profile/1"
TARGETS = ("step", *ops.OPS)
OPERATORS_SHOWN = 12


@dataclass(frozen=True)
class Line:
    """What one phase or operator took: seconds in all, calls, and the bytes its operators allocated."""

    name: str
    seconds: float
    calls: int
    allocated_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `profile` besides those of every benchmark."""
    parser.add_argument("what", choices=TARGETS, metavar="WHAT", help=f"of {', '.join(TARGETS)}")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write a trace for chrome://tracing or ui.perfetto.dev, gzipped if it ends in .gz",
    )
    step.add_arguments(parser)


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Profile pmc_fast once, after a warm-up; print the tables, write trace and result."""
    if args.trace:
        results.check_writable(args.trace, "--trace")
    title, work = _step(args, device) if args.what == "step" else _op(args, device)
    work()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler, Stopwatch(device) as total:
        work()
    if args.trace:
        profiler.export_chrome_trace(str(args.trace))
    phases, operators = phase_lines(profiler.events()), operator_lines(profiler.key_averages())
    other = total.seconds - sum(line.seconds for line in phases)
    shown = [*phases, Line("between phases", other, 0, 0)] if phases else []
    print(f"{title}: {total.seconds:.3f} s under the profiler\n")
    if shown:
        print(table("phase", shown, total.seconds))
    print(table("operator, without what it calls", operators[:OPERATORS_SHOWN], total.seconds))
    if args.trace:
        print(f"trace: {args.trace} (open it in ui.perfetto.dev)")
    if args.json:
        content = {
            "title": title,
            "seconds": total.seconds,
            "phases": [asdict(line) for line in shown],
            "operators": [asdict(line) for line in operators],
            "environment": environment(device, args.seed),
        }
        results.write(args.json, SCHEMA, content)


def _step(args: argparse.Namespace, device: torch.device) -> tuple[str, Callable[[], Any]]:
    task = step.load(args, device)
    task.model.train()
    contestant = step.PmcFast(task)
    sizes = f"{args.batch_size} questions x {args.num_samples} samples"
    return f"PMC step, {args.model or 'random weights'}, {sizes}, {args.dtype}", contestant.turn


def _op(args: argparse.Namespace, device: torch.device) -> tuple[str, Callable[[], Any]]:
    """The op at the first of its benchmarks' sizes."""
    dtype = ops.DTYPES[args.dtype]
    bench = next(bench for bench in ops.benches_of(args.what) if bench.dtype in (None, dtype))
    inputs, ours = bench.make_inputs(args.seed, device), bench.contestants()[OURS]
    return f"{bench.op}, {bench.title}" + (f", {args.dtype}" if bench.dtype else ""), lambda: ours(inputs)


def phase_lines(events: Sequence[Any]) -> list[Line]:
    """The phases in their usual order. They do not nest, so each operator's memory belongs to the one around it."""
    ranges = sorted(
        (event for event in events if event.name.startswith(PREFIX) and event.device_type.name == "CPU"),
        key=lambda event: event.time_range.start,
    )
    allocated, place = [0] * len(ranges), 0
    for event in sorted(events, key=lambda event: event.time_range.start):
        while place < len(ranges) and ranges[place].time_range.end < event.time_range.start:
            place += 1
        if place < len(ranges) and event.time_range.start >= ranges[place].time_range.start:
            allocated[place] += max(0, _own_memory(event))
    lines = []
    for name in PHASES:
        mine = [index for index, event in enumerate(ranges) if event.name == PREFIX + name]
        if mine:
            seconds = sum(ranges[index].time_range.elapsed_us() for index in mine) / 1e6
            lines.append(Line(name, seconds, len(mine), sum(allocated[index] for index in mine)))
    return lines


def operator_lines(averages: Sequence[Any]) -> list[Line]:
    """The operators, those that took longest themselves first."""
    lines = [
        Line(event.key, event.self_cpu_time_total / 1e6, event.count, max(0, _own_memory(event)))
        for event in averages
        if not event.key.startswith(PREFIX)
    ]
    return sorted(lines, key=lambda line: -line.seconds)


def _own_memory(event: Any) -> int:
    return event.self_cpu_memory_usage + event.self_device_memory_usage


def table(header: str, lines: Sequence[Line], total_seconds: float) -> str:
    """The lines for reading."""
    rows = [f"{header:48}{'seconds':>10}{'share':>8}{'calls':>8}{'allocated':>13}"]
    for line in lines:
        name = line.name if len(line.name) <= 47 else line.name[:44] + "..."
        calls = str(line.calls) if line.calls else ""
        memory = f"{line.allocated_bytes / 1e6:.0f} MB" if line.calls else ""
        rows.append(f"{name:48}{line.seconds:>10.3f}{line.seconds / total_seconds:>8.1%}{calls:>8}{memory:>13}")
    return "\n".join(rows) + "\n"
