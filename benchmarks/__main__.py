"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """What `benchmarks/<name>.py` does, and whether it measures: on a device; on a CPU, with the compiled module."""

    what: str
    measures: bool = True


COMMANDS = {
    "step": Command("one micro-batch of PMC: the published loop against pmc_fast, in turns, on the same prompts"),
    "run": Command(
        "a whole short run of PMC by the published loop and by pmc_fast: time, and how fast the model unlearns"
    ),
    "sampling": Command("a whole sampling call: pmc_fast against the model's modules alone and transformers' generate"),
    "train": Command(
        "forward pass, loss and backward pass of a packed batch: pmc_fast's layers against the model's modules"
    ),
    "ops": Command("each op against its peers, at the sizes that PMC meets"),
    "parallel": Command("the ops with a head in parts over several ranks, against the same ops on one of them"),
    "profile": Command(
        "where the time of pmc_fast goes: phases, operators and a trace of a PMC step, a short run or one op"
    ),
    "compile": Command(
        "every Triton kernel, compiled for GPUs that need not be there and held to limits", measures=False
    ),
    "models": Command(
        "each kind of causal language model of transformers, tiny and random: what samples from it and trains it, and whether that is right",
        measures=False,
    ),
    "report": Command("the tables and pictures of result files", measures=False),
    "gpu": Command(
        "everything that there is to run on a GPU, unattended and within minutes: tests, ops, steps, profiles, a report",
        measures=False,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it ran, 1 if a result is wrong where none may be, 2 for bad input."""
    try:
        from benchmarks.results import command_line
        from pmc_fast.errors import UserError
    except ImportError as error:
        return _fail(f"pmc_fast cannot be imported ({error}): run `pip install -e '.[bench]'` in the source tree")
    words = sys.argv[1:] if arguments is None else arguments
    args = _parse(words)
    args.command_line = command_line(words)
    run = importlib.import_module(f"benchmarks.{args.command}").run
    try:
        if COMMANDS[args.command].measures:
            return _measure(run, args)
        run(args)
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except _wrong() as error:  # asked for only now, since it takes torch along
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    return 0


def _wrong() -> type[Exception]:
    from benchmarks.bench import Wrong

    return Wrong


def _measure(run: Callable[..., None], args: argparse.Namespace) -> int:
    """Run a benchmark on the device that the options name."""
    import torch

    from benchmarks.bench import Wrong
    from pmc_fast.loading import choose_device
    from pmc_fast.outputs import check_file

    device = choose_device(args.device)
    if device.type == "cpu":
        _require_compiled_module()
    elif device.index is not None:
        torch.cuda.set_device(device)  # where streams, events and graphs are made if none is named
    if args.json:
        check_file(args.json, "--json")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        run(args, device)
    except Wrong as error:
        print(f"WRONG, so not timed: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; only the module of the command that it names is imported."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure pmc_fast side by side with what it replaces. Everyone's results are checked before they "
        "are timed; contestants take turns in one process; medians and 20th to 80th percentiles are reported.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        what = command.what
        options = commands.add_parser(
            name, help=what, description=what[0].upper() + what[1:] + ".", formatter_class=argparse.RawTextHelpFormatter
        )
        if name in arguments[:1]:
            importlib.import_module(f"benchmarks.{name}").add_arguments(options)
            if command.measures:
                _add_measuring_arguments(options)
    return parser.parse_args(arguments)


def _add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--repeats", type=_positive, default=3, metavar="N", help="timed turns (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of inputs and samples (default: 0)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result to this file")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, want an integer of 1 or more")
    return int(text)


def _require_compiled_module() -> None:
    from pmc_fast.backend import missing_library
    from pmc_fast.errors import UserError

    if reason := missing_library():
        raise UserError(f"there is nothing to measure without the compiled module: {reason}")


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
