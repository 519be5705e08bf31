"""`python -m benchmarks gpu`: tests, ops, steps and profiles on a GPU, unattended, and a report of them.

Each part is a process of its own with a time limit. What it finds is on the disk as soon as it is known, so a run that is cut
short, by its own limit or from outside, loses nothing. Nothing is downloaded: the models have the shapes of known ones and
random weights.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

from benchmarks import results
from benchmarks.build import ROOT
from pmc_fast.backend import IMPLEMENTATIONS
from pmc_fast.errors import UserError

SCHEMA = "pmc_fast.benchmarks.gpu/1"
SUMMARY = "summary.json"
OK = "ok"
_RESERVE_S = 10.0  # of the time given, for what happens between the parts
_GRACE_S = 5.0  # for a part to write what it has, once told to stop
_LINES_SHOWN = 5  # of the log of a part that failed


@dataclass(frozen=True)
class Part:
    """One process: `words` behind "python", told to write `results`; `share` is its part of the time, among all shares.

    It is given those of the files `inputs` that exist by then, at least one if there are any, and starts only if the part
    `needs` went well. `under` is the command that runs python, if it is not to run by itself, and `tool` the program that this
    takes: without it the part does not start.
    """

    name: str
    words: Sequence[str]
    share: float
    results: Sequence[Path] = ()
    inputs: Sequence[Path] = ()
    needs: str | None = None
    under: Sequence[str] = ()
    tool: str | None = None


@dataclass
class Outcome:
    """What became of a part: ok, failed, cut short, not started or running."""

    name: str
    status: str = "not started"
    seconds: float = 0.0
    limit_s: float = 0.0
    exit_code: int | None = None
    log: str | None = None
    results: list[str] = field(default_factory=list)
    command: str | None = None


@dataclass(frozen=True)
class Model:
    """A shape to step, sample and profile; the options of the first two and of the last."""

    shape: str
    dtype: str
    step: Sequence[str]
    profile: Sequence[str]
    share: float


# Sizes of the same plan: for a GPU, and for a rehearsal on a CPU. Ops by the part's name.
_TESTS = {
    "cuda": [
        *("tests/ops", "tests/kernels", "tests/cuda", "tests/test_varlen.py"),
        *("tests/test_static_decoder.py", "tests/test_static_modules.py", "tests/test_packed_layers_gpu.py"),
    ],
    "cpu": ["tests/test_data.py"],
}
_PYTEST = ["-q", "-p", "no:cacheprovider"]
_ON_GPUS = {"cuda", "triton"}  # ops that have neither are not tested: what is left of them is a CPU's
_SANITIZED = ["tests/cuda/test_rows.py", "tests/ops/test_sample.py", "-k", "cuda"]
_OPS = {
    "cuda": {
        "ops": ["--dtype", "bfloat16"],
        "ops-sample": ["--op", "sample", "--dtype", "float32"],  # its logits are float32 in every benchmark
        "ops-sample-options": ["--op", "sample_by_options", "--dtype", "float32", "--graphs"],
        "ops-linear-sample": ["--op", "linear_sample_by_rows", "--dtype", "bfloat16", "--graphs"],
        "ops-decode-attention": ["--op", "decode_attention_by_prefix", "--dtype", "bfloat16", "--graphs"],
        "ops-decode-tiles": ["--op", "decode_attention_by_tiles", "--dtype", "bfloat16", "--graphs"],
    },
    "cpu": {"ops": ["--op", "rouge_l_recall"]},
}
_OPS_SHARE = {"ops": 1.5, "ops-sample-options": 1.0}
_OPS_SIZE = {
    "cuda": ["--shapes", "all", "--repeats", "5", "--limit-s", "2"],
    "cpu": ["--repeats", "1"],
}
_MEDIUM = ["--max-length", "96"]  # answers of random weights seldom end before it: some 75 tokens each
_SMALL = ["--batch-size", "2", "--num-samples", "2", "--max-length", "40", "--threads", "1"]
_MODELS = {
    "cuda": [
        Model("Llama-3.2-3B", "bfloat16", [*_MEDIUM, "--repeats", "2"], _MEDIUM, 1.0),
        Model("SmolLM2-135M", "bfloat16", [*_MEDIUM, "--repeats", "3"], _MEDIUM, 0.6),
    ],
    "cpu": [Model("tiny", "float32", [*_SMALL, "--repeats", "1"], _SMALL, 1.0)],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gpu`."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder for all results")
    parser.add_argument("--minutes", type=float, default=9.0, metavar="M", help="for everything together (default: 9)")
    parser.add_argument(
        "--only", nargs="+", metavar="PART", help="only these parts, by the names in the log (default: all)"
    )
    parser.add_argument(
        "--device", default="cuda", help="cuda, cuda:N, or cpu to rehearse the plan with tiny sizes (default: cuda)"
    )


def run(args: argparse.Namespace) -> None:
    """Take every part in turn; raises Wrong if one did not end well, once all are through."""
    from pmc_fast.loading import choose_device

    started = time.monotonic()
    if not args.minutes > 0:
        raise UserError(f"--minutes: got {args.minutes:g}, want more than 0")
    device = choose_device(args.device)
    out = args.out.absolute()
    parts = plan(out, args.device, device.type)
    names = [part.name for part in parts]
    if unknown := sorted(set(args.only or names) - set(names)):
        raise UserError(f"--only: got {', '.join(unknown)}, want some of {', '.join(names)}")
    wanted = args.only or [part.name for part in parts if part.tool is None or which(part.tool)]
    parts = [part for part in parts if part.name in wanted]
    _claim(args.out)
    about = {"device": args.device, "minutes": args.minutes, "command": args.command_line}
    outcomes = take(parts, out, started + 60 * args.minutes - _RESERVE_S, about)
    print(f"{time.monotonic() - started:.0f} s in all; {out / SUMMARY} lists the parts")
    if bad := [f"{outcome.name} ({outcome.status})" for outcome in outcomes if outcome.status != OK]:
        from benchmarks.bench import Wrong

        raise Wrong(f"{len(bad)} of {len(outcomes)} parts: {', '.join(bad)}")


def _claim(out: Path) -> None:
    """Make the folder; raises UserError if it cannot be made or holds anything."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / SUMMARY).exists():
            raise UserError(f"--out: {out} holds another run; want a new or an empty folder")
        if any(out.iterdir()):
            raise UserError(f"--out: {out} holds other files; want a new or an empty folder")
    except OSError as error:
        raise UserError(f"--out: {out}: {error.strerror}") from error


def plan(out: Path, device: str, kind: str) -> list[Part]:
    """The parts for a `kind` of device, cuda or cpu, the most telling first."""
    benchmarks = ["-m", "benchmarks"]
    tests = [folder for folder in _TESTS[kind] if (ROOT / folder).exists()]
    pytest = ["-m", "pytest", *_PYTEST, "--durations=15", f"--junitxml={out / 'tests.xml'}"]
    if kind == "cuda" and find_spec("xdist"):  # what takes time is compilation
        pytest += ["-n", str(min(12, os.cpu_count() or 1)), "--maxfail=20"]
    parts = [Part("build", ["-m", "benchmarks.build"], 0.5)]
    left_out = [f"tests/ops/test_{op}.py" for op, found in IMPLEMENTATIONS.items() if not _ON_GPUS & {*found}]
    parts.append(Part("tests", [*pytest, *(f"--ignore={file}" for file in left_out), *tests], 1.5))
    for name, options in _OPS[kind].items():
        file = out / f"{name}.json"
        words = [*benchmarks, "ops", "--device", device, *options, *_OPS_SIZE[kind], "--json", str(file)]
        parts.append(Part(name, words, _OPS_SHARE.get(name, 0.5), [file]))
    if kind == "cuda":
        parts += [_sanitizer_part("memcheck"), _sanitizer_part("racecheck")]
    for model in _MODELS[kind]:
        parts += _model_parts(model, out, device)
    files = [file for part in parts for file in part.results]
    return [*parts, Part("report", [*benchmarks, "report", "--out", str(out / "report")], 0.4, inputs=files)]


def _sanitizer_part(check: str) -> Part:
    """Watches kernels of pmc::cuda, as their mangled names say. In torch's cache it could not see where a tensor ends."""
    tool = "compute-sanitizer"
    under = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool", check, "--error-exitcode", "9"]
    under += ["--kernel-name", "kernel_substring=pmc4cuda"]
    return Part(check, ["-m", "pytest", *_PYTEST, *_SANITIZED], 0.6, under=under, tool=tool)


def _model_parts(model: Model, out: Path, device: str) -> list[Part]:
    folder, name = out / "models" / model.shape, model.shape.lower()
    made = f"model-{name}"
    making = ["-m", "benchmarks.random_models", str(folder), "--shape", model.shape]
    making += ["--device", device, "--dtype", model.dtype]
    rows = [word for kind in ("forget", "retain") for word in (f"--{kind}", f"{folder}-{kind}.jsonl")]
    common = ["--device", device, "--dtype", model.dtype, "--model", str(folder), *rows]

    def part(kind: str, words: Sequence[str], share: float) -> Part:
        file = out / f"{kind}-{name}.json"
        words = ["-m", "benchmarks", *words, *common, "--json", str(file)]
        return Part(f"{kind}-{name}", words, share * model.share, [file], needs=made)

    trace = ["--trace", str(out / f"profile-{name}.trace.json.gz")]
    return [
        Part(made, making, 0.5 * model.share),
        part("step", ["step", *model.step], 1.0),
        part("sampling", ["sampling", *model.step], 0.6),
        part("train", ["train", *model.step], 0.5),
        part("profile", ["profile", "step", *model.profile, *trace], 0.8),
    ]


def take(parts: Sequence[Part], out: Path, deadline: float, about: dict[str, Any]) -> list[Outcome]:
    """Run the parts one after the other until the deadline, on time.monotonic's clock; time not used goes to later parts.

    summary.json is written anew whenever a part starts or ends. The models are deleted in the end.
    """
    outcomes = {part.name: Outcome(part.name) for part in parts}
    width = max(map(len, outcomes))

    def write() -> None:
        content = {**about, "parts": [asdict(outcome) for outcome in outcomes.values()]}
        results.write(out / SUMMARY, SCHEMA, content)

    write()
    terminated = signal.signal(signal.SIGTERM, _interrupt)
    try:
        for place, part in enumerate(parts):
            outcome = outcomes[part.name]
            given = [file for file in part.inputs if file.exists()]
            outcome.limit_s = (deadline - time.monotonic()) * part.share / sum(later.share for later in parts[place:])
            print(f"{part.name:{width}}  ", end="", flush=True)
            if part.needs and (needed := outcomes.get(part.needs, Outcome(part.needs))).status != OK:
                outcome.status = f"not started: {part.needs} {needed.status}"
            elif part.tool and not which(part.tool):
                outcome.status = f"not started: {part.tool} is not installed"
            elif part.inputs and not given:
                outcome.status = "not started: there are no results"
            elif outcome.limit_s <= 0:
                outcome.status = "not started: no time left"
            else:
                _run_part([*part.under, sys.executable, *part.words, *map(str, given)], out, outcome, write)
                outcome.results = [file.name for file in part.results if file.exists()]
            write()
            print(f"{outcome.status:10} {outcome.seconds:6.1f} s" + (f"  {outcome.log}" if outcome.log else ""))
            if outcome.status != OK and outcome.log:
                print("".join(f"    {line}\n" for line in _last_lines(out / outcome.log)), end="", flush=True)
    finally:
        write()
        signal.signal(signal.SIGTERM, terminated)
        shutil.rmtree(out / "models", ignore_errors=True)
    return list(outcomes.values())


def _run_part(command: Sequence[str], out: Path, outcome: Outcome, write: Callable[[], None]) -> None:
    """Run one part with its output in a log, within its limit; leaves no process behind, whatever happens."""
    outcome.log, outcome.command, outcome.status = f"{outcome.name}.log", shlex.join(command[1:]), "running"
    write()
    start = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with (out / outcome.log).open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_hear_interrupts,
        )
        outcome.status = "interrupted"
        try:
            outcome.exit_code = process.wait(outcome.limit_s)
            outcome.status = OK if outcome.exit_code == 0 else "failed"
        except subprocess.TimeoutExpired:
            outcome.status = "cut short"
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                outcome.exit_code = process.wait(_GRACE_S)
        finally:
            _kill_group(process)
            outcome.seconds = time.monotonic() - start


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the process, if it still runs, and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _hear_interrupts() -> None:
    """A process started in the background of a shell would ignore them, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _last_lines(log: Path) -> list[str]:
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    return [line for line in lines if line.strip()][-_LINES_SHOWN:]
