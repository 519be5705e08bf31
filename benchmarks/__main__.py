"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "step": "one micro-batch of PMC: the published loop against pmc_fast, in turns, on the same prompts",
    "run": "a whole short run of PMC by the published loop and by pmc_fast: time, and how fast the model unlearns",
    "ops": "each op against its peers, at the sizes that PMC meets",
    "profile": "where the time of pmc_fast goes: phases, operators and a trace of one PMC step or one op",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark; 0 if it ran, 1 if a result is wrong where none may be, 2 for bad input."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        from pmc_fast.errors import UserError
    except ImportError as error:
        return _fail(f"pmc_fast cannot be imported ({error}): run `pip install -e '.[bench]'` in the source tree")
    try:
        import torch

        from benchmarks import results
        from benchmarks.bench import Wrong
        from pmc_fast.loading import choose_device

        _require_compiled_module()
        device = choose_device(args.device)
        if args.json:
            results.check_writable(args.json)
        if args.threads:
            torch.set_num_threads(args.threads)
        importlib.import_module(f"benchmarks.{args.command}").run(args, device)
    except UserError as error:
        return _fail(str(error))
    except Wrong as error:
        print(f"WRONG, so not timed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure pmc_fast side by side with what it replaces. Everyone's results are checked before they "
        "are timed; contestants take turns in one process; medians and 20th to 80th percentiles are reported.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in COMMANDS.items():
        command = commands.add_parser(
            name, help=what, description=what[0].upper() + what[1:] + ".", formatter_class=argparse.RawTextHelpFormatter
        )
        importlib.import_module(f"benchmarks.{name}").add_arguments(command)
        command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
        command.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)")
        command.add_argument("--repeats", type=_positive, default=3, metavar="N", help="timed turns (default: 3)")
        command.add_argument("--seed", type=int, default=0, help="of inputs and samples (default: 0)")
        command.add_argument("--json", type=Path, metavar="OUT", help="also write the result to this file")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, want 1 or more")
    return value


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
