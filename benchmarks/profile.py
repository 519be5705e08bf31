"""`python -m benchmarks profile`: where the time of pmc_fast goes, as tables of phases and operators and a trace."""

from __future__ import annotations

import argparse
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import ops, results, step
from benchmarks.bench import OURS
from benchmarks.measure import Stopwatch, environment
from benchmarks.wording import clock, share, size
from pmc_fast.errors import UserError
from pmc_fast.outputs import check_file
from pmc_fast.phases import PHASES, PREFIX

SCHEMA = "pmc_fast.benchmarks.profile/1"
TARGETS = ("step", "run", *ops.OPS)
BETWEEN = "between phases"
OPERATORS_SHOWN = 12
_LESSONS = 10  # optimizer steps of the tiny model before a run: enough for it to end some of its answers


@dataclass(frozen=True)
class Line:
    """What one phase or operator took.

    `seconds` are the host's, from its start to its end; of an operator or a kernel, without what it calls.
    `device_seconds` are those of the GPU kernels that it launched, which may run later; None on a CPU.
    `allocated_bytes` is the sum of all tensors that it made, those that are soon freed again included; of an operator,
    what it made less what it freed, with what it calls. `peak_bytes` is the most that tensors held during a phase beyond
    what they held before the work began; None for an operator.
    """

    name: str
    seconds: float
    calls: int
    allocated_bytes: int = 0
    peak_bytes: int | None = None
    device_seconds: float | None = None


class Allocation(NamedTuple):
    """At this time, in nanoseconds, so many bytes of tensors were allocated; freed if negative."""

    time: int
    bytes: int


class Work(NamedTuple):
    """What is profiled: its title, what it is made of, and the work itself."""

    title: str
    config: dict[str, Any]
    call: Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `profile` besides those of every benchmark."""
    parser.add_argument("what", choices=TARGETS, metavar="WHAT", help=f"of {', '.join(TARGETS)}")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write a trace for chrome://tracing or ui.perfetto.dev, gzipped if it ends in .gz",
    )
    parser.add_argument(
        "--micro-batches", type=int, default=3, metavar="N", help="of run, an optimizer step each (default: 3)"
    )
    step.add_arguments(parser)


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Profile pmc_fast once, after a warm-up; print the tables, write trace and result."""
    if args.trace:
        check_file(args.trace, "--trace")
    work = {"step": _step, "run": _run}.get(args.what, _op)(args, device)
    work.call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler, Stopwatch(device) as total:
        work.call()
    if args.trace:
        profiler.export_chrome_trace(str(args.trace))
    events, averages = profiler.events(), profiler.key_averages()
    phases = phase_lines(events, allocations(profiler, device), device.type)
    content = {
        "title": work.title,
        "seconds": total.seconds,
        "phases": [asdict(line) for line in with_the_rest(phases, events, total.seconds, device.type)],
        "operators": [asdict(line) for line in operator_lines(averages, device.type)],
        "kernels": [asdict(line) for line in kernel_lines(averages)],
        "config": {"what": args.what, **work.config},
        "environment": environment(device, args.seed),
        "command": args.command_line,
    }
    if args.json:
        results.write(args.json, SCHEMA, content)
    print(f"{work.title}: {total.seconds:.3f} s under the profiler\n")
    for header, key, shown in (
        ("phase", "phases", None),
        ("operator, its own time", "operators", OPERATORS_SHOWN),
        ("GPU kernel", "kernels", OPERATORS_SHOWN),
    ):
        if content[key]:
            print(table(header, content[key][:shown], total.seconds))
    if not any(content[key] for key in ("phases", "operators", "kernels")):
        print("torch's profiler saw no operator in it: profile the C++ with a system profiler such as perf\n")
    if args.trace:
        print(f"trace: {args.trace} (open it in ui.perfetto.dev)")


def _step(args: argparse.Namespace, device: torch.device) -> Work:
    task = step.load(args, device)
    task.model.train()
    return Work(f"PMC step, {_sizes(args)}", _config(args, task), step.PmcFast(task, prune=True).turn)


def _run(args: argparse.Namespace, device: torch.device) -> Work:
    """Greedy answers, then a few micro-batches; with a learning rate of 0, so that it can be run again.

    The tiny model would hardly ever end an answer, so it is first trained on the rows for a moment.
    """
    from pmc_fast.pmc import PMC
    from pmc_fast.training import finetune, unlearn

    if args.micro_batches < 1:
        raise UserError(f"--micro-batches: got {args.micro_batches}, want 1 or more")
    rows = argparse.Namespace(**{**vars(args), "batch_size": args.micro_batches * args.batch_size})
    task = step.load(rows, device)
    config = replace(task.config, batch_size=args.batch_size, epochs=1, accumulation=1, learning_rate=0.0)
    if args.model is None:
        taught = task.forget + task.retain
        learning = replace(config, epochs=_LESSONS, learning_rate=3e-3, batch_size=len(taught))
        finetune(PMC(task.model, task.prompts, learning), taught, learning, progress=False)

    def whole_run() -> None:
        pmc = PMC(task.model, task.prompts, config)
        pmc.initialise([row.question for row in task.forget])
        unlearn(pmc, task.retain, config, progress=False)

    title = f"PMC run, {args.micro_batches} micro-batches of {_sizes(args)}"
    return Work(title, _config(args, replace(task, config=config)), whole_run)


def _sizes(args: argparse.Namespace) -> str:
    model = results.name_of(args.model) or "random weights"
    return f"{args.batch_size} questions x {args.num_samples} samples, {model}, {args.dtype}"


def _config(args: argparse.Namespace, task: step.Task) -> dict[str, Any]:
    return {
        "model": results.name_of(args.model) or "random weights",
        "parameters": sum(parameter.numel() for parameter in task.model.parameters()),
        "dtype": args.dtype,
        **asdict(task.config),
    }


def _op(args: argparse.Namespace, device: torch.device) -> Work:
    """The op at the first of its benchmarks' sizes."""
    if given := [f"--{name}" for name in ("model", "forget", "retain") if getattr(args, name) is not None]:
        raise UserError(f"{', '.join(given)}: of step and run alone, got {args.what}")
    dtype = ops.DTYPES[args.dtype]
    bench = next(bench for bench in ops.benches_of(args.what) if bench.dtype in (None, dtype))
    inputs, ours = bench.make_inputs(args.seed, device), bench.contestants()[OURS]
    name = f"{bench.op}, {bench.title}" + (f", {args.dtype}" if bench.dtype else "")
    config = {"size": bench.title, "dtype": args.dtype if bench.dtype else None}
    return Work(name, config, partial(ours, inputs))


def allocations(profiler: Any, device: torch.device) -> list[Allocation]:
    """Every tensor's memory on the device as it came and went, on the clock of the profiler's events."""
    found = profiler.profiler.kineto_results
    records = (event for event in found.events() if event.name() == "[memory]")
    start = found.trace_start_ns()
    mine = [
        Allocation(event.start_ns() - start, event.nbytes())
        for event in records
        if event.device_type().name.lower() == device.type
    ]
    return sorted(mine)


class _Ranges:
    """The phases that a trace marks, by their start. They do not nest, so a time belongs to one of them or to none."""

    def __init__(self, events: Iterable[Any]) -> None:
        marked = [event for event in events if event.name.startswith(PREFIX) and event.device_type.name == "CPU"]
        marked.sort(key=lambda event: event.time_range.start)
        self.names = [event.name.removeprefix(PREFIX) for event in marked]
        self.times = [(event.time_range.start, event.time_range.end) for event in marked]
        self._starts = [start for start, _ in self.times]

    def at(self, microseconds: float) -> str | None:
        """The name of the phase at that time."""
        place = bisect_right(self._starts, microseconds) - 1
        return self.names[place] if place >= 0 and microseconds <= self.times[place][1] else None


def phase_lines(events: Sequence[Any], memory: Sequence[Allocation], device_type: str) -> list[Line]:
    """The phases in their usual order, each with what happened on any thread while it ran."""
    ranges = _Ranges(events)
    times, held = [one.time for one in memory], list(accumulate((one.bytes for one in memory), initial=0))
    lines = {name: Line(name, 0.0, 0, 0, 0, None if device_type == "cpu" else 0.0) for name in PHASES}
    for name, (start, end) in zip(ranges.names, ranges.times, strict=True):
        first, last = bisect_left(times, start * 1e3), bisect_right(times, end * 1e3)
        lines[name] = replace(
            lines[name],
            seconds=lines[name].seconds + (end - start) / 1e6,
            calls=lines[name].calls + 1,
            allocated_bytes=lines[name].allocated_bytes + sum(max(0, one.bytes) for one in memory[first:last]),
            peak_bytes=max(lines[name].peak_bytes, *held[first : last + 1]),
        )
    for launched, seconds in [] if device_type == "cpu" else _kernels(events):
        if (name := ranges.at(launched)) is not None:
            lines[name] = replace(lines[name], device_seconds=lines[name].device_seconds + seconds)
    return [line for line in lines.values() if line.calls]


def with_the_rest(phases: list[Line], events: Sequence[Any], seconds: float, device_type: str) -> list[Line]:
    """The phases, if there are any, and a line for the time outside them."""
    if not phases:
        return []
    rest = seconds - sum(line.seconds for line in phases)
    if device_type == "cpu":
        return [*phases, Line(BETWEEN, rest, 0)]
    on_device = sum(seconds for _, seconds in _kernels(events)) - sum(line.device_seconds for line in phases)
    return [*phases, Line(BETWEEN, rest, 0, device_seconds=on_device)]


def _kernels(events: Sequence[Any]) -> list[tuple[float, float]]:
    """When each piece of GPU work was launched, in microseconds, and the seconds that it took.

    A kernel shares its id with the call of the CUDA API that launched it, and is linked to the operator that did.
    """
    hosts = [event for event in events if event.device_type.name == "CPU"]
    calls = {event.id: event.time_range.start for event in hosts if event.name.startswith(("cu", "hip"))}
    operators = {event.id: event.time_range.start for event in hosts if not event.name.startswith(("cu", "hip"))}
    found = []
    for event in events:
        if _is_kernel(event, event.name):
            linked = operators.get(getattr(event, "linked_correlation_id", 0), event.time_range.start)
            found.append((calls.get(event.id, linked), event.time_range.elapsed_us() / 1e6))
    return found


def _is_kernel(event: Any, name: str) -> bool:
    """GPU work rather than the shadow of a phase, which is marked on the GPU's own timeline as well."""
    return event.device_type.name != "CPU" and not event.is_user_annotation and not name.startswith(PREFIX)


def operator_lines(averages: Iterable[Any], device_type: str) -> list[Line]:
    """The operators, those that took longest themselves first: on the GPU where there is one."""
    lines = [
        Line(
            event.key,
            event.self_cpu_time_total / 1e6,
            event.count,
            max(0, event.cpu_memory_usage + event.device_memory_usage),
            device_seconds=None if device_type == "cpu" else event.self_device_time_total / 1e6,
        )
        for event in averages
        if event.device_type.name == "CPU" and not event.key.startswith(PREFIX)
    ]
    return sorted(lines, key=lambda line: (-(line.device_seconds or 0.0), -line.seconds))


def kernel_lines(averages: Iterable[Any]) -> list[Line]:
    """The GPU's kernels and copies, those that took longest first; none on a CPU."""
    lines = [
        Line(event.key, 0.0, event.count, device_seconds=event.self_device_time_total / 1e6)
        for event in averages
        if _is_kernel(event, event.key)
    ]
    return sorted(lines, key=lambda line: -line.device_seconds)


def table(header: str, lines: Sequence[Mapping[str, Any]], total_seconds: float) -> str:
    """The lines, as the result file has them, for reading."""
    on_device = any(line["device_seconds"] is not None for line in lines)
    peaks = any(line["peak_bytes"] is not None for line in lines)
    columns = f"{'seconds':>10}{'share':>9}" + (f"{'GPU':>10}{'share':>9}" if on_device else "")
    rows = [f"{header:48}{columns}{'calls':>8}{'allocated':>11}" + (f"{'peak':>11}" if peaks else "")]
    for line in lines:
        name = line["name"] if len(line["name"]) <= 47 else line["name"][:44] + "..."
        times = [line["seconds"]] + ([line["device_seconds"]] if on_device else [])
        cells = "".join(f"{clock(seconds):>10}{share(seconds / total_seconds):>9}" for seconds in times)
        cells += f"{line['calls'] or '':>8}{size(line['allocated_bytes']) if line['calls'] else '':>11}"
        rows.append(f"{name:48}{cells}" + (f"{size(line['peak_bytes']) if line['calls'] else '':>11}" if peaks else ""))
    return "\n".join(rows) + "\n"
