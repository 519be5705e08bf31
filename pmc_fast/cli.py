"""The command line: pmc-fast demo | finetune | unlearn | evaluate | doctor."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from pmc_fast.config import MOST, PUBLISHED
from pmc_fast.data import is_utf8
from pmc_fast.errors import UserError
from pmc_fast.loading import DTYPES
from pmc_fast.prompts import STYLES
from pmc_fast.runs import holds_run
from pmc_fast.warning import LibraryWarning

_DESCRIPTION = """\
Make a language model forget: Partial Model Collapse (arXiv 2507.04219) trains it on its own,
selected answers, and never on the text that is to be forgotten.

  pmc-fast demo                                             all of it on invented data, in a minute
  pmc-fast finetune --model M --data FILE --out DIR         train M to know a question/answer file
  pmc-fast unlearn  --model M --forget FILE --retain FILE --out DIR
  pmc-fast evaluate --model M --forget FILE --retain FILE
  pmc-fast doctor                                           what works on this machine

M is a transformers folder or a hub name, FILE JSON lines: {"question": ..., "answer": ...}"""

_ALIASES = {"learning_rate": ("--lr",), "retain_weight": ("--lambda",), "min_words": ("--min-len",)}

# Options that name files or folders.
_PATHS = ("model", "data", "forget", "retain", "paraphrased", "utility", "json", "out")

_FORM = 'FILE holds JSON lines, each an object with two texts: {"question": ..., "answer": ...}'

_COMMANDS = {
    "demo": "pmc_fast.demo.run",
    "finetune": "pmc_fast.commands",
    "unlearn": "pmc_fast.commands",
    "evaluate": "pmc_fast.commands",
    "doctor": "pmc_fast.doctor",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 for an interrupt, 141 if nobody reads the output."""
    try:
        try:
            return _run(arguments)
        finally:
            if sys.stdout is not None:  # closed before the start, as under some daemons
                sys.stdout.flush()  # here, rather than when Python ends
    except BrokenPipeError:  # as in pmc-fast doctor | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes in the end
        return 128 + 13  # what a shell makes of SIGPIPE


def _run(arguments: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    if odd := [argument for argument in arguments if not is_utf8(argument)]:
        parser.error(f"got {odd[0]!r}, expected UTF-8")
    options = parser.parse_args(arguments)
    try:
        _check(options)
        # Imported here, so that --help and mistyped options need no torch.
        command = getattr(import_module(_COMMANDS[options.command]), options.command)
        with _warning(options.command):
            return command(options) or 0
    except UserError as error:
        print(f"pmc-fast {options.command}: {_by_option(str(error), options, arguments)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\npmc-fast {options.command}: interrupted", file=sys.stderr)
        if "out" in options and holds_run(options.out):
            again = "again" if options.resume else "with --resume"
            print(f"To go on, give the same command {again} (the run is in {options.out}).", file=sys.stderr)
        return 130


def _by_option(message: str, options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """A message about an argument of the Python API, about the option that was typed instead."""
    name, colon, rest = message.partition(": ")
    if not colon or name not in options or name in _paths(options):  # a folder may be called "model"
        return message
    option = f"--{name.replace('_', '-')}"
    typed = [word.partition("=")[0] for word in arguments]
    option = next((alias for alias in _ALIASES.get(name, ()) if alias in typed), option)
    return f"{option}: {rest.replace('expected None or', 'expected')}"


def _paths(options: argparse.Namespace) -> list[str]:
    """The names of files and folders that were given."""
    given = (getattr(options, name, None) for name in _PATHS)
    return [path for one in given if one is not None for path in (one if isinstance(one, list) else [one])]


@contextmanager
def _warning(command: str) -> Iterator[None]:
    """This library's warnings as errors are shown, above a progress bar that is there; others' as they are."""

    def show(message: Warning, category: type[Warning], *where: object) -> None:
        if not issubclass(category, LibraryWarning):
            others(message, category, *where)
            return
        from tqdm import tqdm

        tqdm.write(f"pmc-fast {command}: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        others, warnings.showwarning = warnings.showwarning, show
        yield


def make_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="pmc-fast", description=_DESCRIPTION, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    def command(name: str, summary: str, description: str | None = None) -> argparse.ArgumentParser:
        about = description or f"{summary[0].upper()}{summary[1:]}."
        return commands.add_parser(name, help=summary, description=about, formatter_class=formatter)

    demo = command(
        "demo",
        "invent facts, train a small model on them, make it forget some",
        "Invents people and facts, trains a small model until it knows them, makes it forget some of the people,\n"
        "and shows what it answered before and after. Needs no files and no network.",
    )
    demo.add_argument("--out", default="./pmc-demo", metavar="DIR", help="where results go (default: %(default)s)")
    _resume(demo)
    _machine(demo, model=False)

    finetune = command(
        "finetune",
        "train a model on a question/answer file",
        "Trains a model on the answers of a question/answer file; rows are used whole, however long.",
    )
    finetune.epilog = _FORM
    _model(finetune)
    finetune.add_argument("--data", required=True, metavar="FILE", help="rows to learn, JSON lines")
    _out(finetune)
    _resume(finetune)
    loop = finetune.add_argument_group("training")
    _loop(loop, epochs=5, batch_size=16, accumulation=1)
    _evaluation(finetune)
    _machine(finetune)

    unlearn = command(
        "unlearn",
        "make a model forget the answers of a question/answer file",
        "Makes a model forget. The answers in --forget serve the report's figures alone: training never sees them.",
    )
    unlearn.epilog = _FORM
    _model(unlearn, prompt="auto; with --preset phi-1.5 tags")
    unlearn.add_argument("--forget", required=True, metavar="FILE", help="what to forget, JSON lines")
    unlearn.add_argument("--retain", required=True, metavar="FILE", help="what to keep, JSON lines")
    _sets(unlearn)
    _out(unlearn)
    _resume(unlearn)
    _method(unlearn)
    _evaluation(unlearn)
    _machine(unlearn)

    evaluate = command(
        "evaluate",
        "measure unlearn quality, utility and leakage",
        "Measures how much of the true answers a model says, by ROUGE-L recall of its greedy answers.\n"
        "Unlearn quality: 100 % less the mean of --forget and --paraphrased. Utility: the mean of --retain and --utility.",
    )
    evaluate.epilog = _FORM
    _model(evaluate)
    evaluate.add_argument("--forget", required=True, metavar="FILE", help="what should be forgotten, JSON lines")
    evaluate.add_argument("--retain", required=True, metavar="FILE", help="what should be known, JSON lines")
    _sets(evaluate)
    _evaluation(evaluate)
    evaluate.add_argument(
        "--leakage",
        type=int,
        metavar="N",
        help="also draw N answers to each forget question; the worst one's ROUGE-L recall, as a mean over questions",
    )
    evaluate.add_argument("--prefill", default="", metavar="TEXT", help="text that --leakage's answers start with")
    evaluate.add_argument("--json", metavar="OUT", help="write the results to this file too")
    _machine(evaluate)

    doctor = command("doctor", "what is installed, which implementations work here and why the others do not")
    doctor.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    return parser


def _model(parser: argparse.ArgumentParser, prompt: str = "auto") -> None:
    parser.add_argument("--model", required=True, metavar="M", help="transformers folder, or hub name")
    parser.add_argument(
        "--prompt",
        choices=STYLES,
        help="the tokenizer's chat template, 'Question: .. Answer: ..', or the bare question; "
        f"auto is chat where there is a template, else tags (default: {prompt})",
    )
    parser.add_argument(
        "--system", metavar="TEXT", help="system prompt of chat prompts (default: You are a helpful assistant.)"
    )


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="new or empty folder for the model, metrics and report"
    )


def _resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out, given the options it was started with (start it if there is none yet)",
    )
    parser.add_argument(
        "--checkpoint-every", type=int, metavar="STEPS", help="optimizer steps between checkpoints (default: one epoch)"
    )


def _sets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--paraphrased", metavar="FILE", help="the forget questions asked in other words")
    parser.add_argument(
        "--utility",
        nargs="+",
        action="extend",
        metavar="FILE",
        default=[],
        help="further sets that should be known, named after the files",
    )


def _loop(group, epochs: object, batch_size: object, accumulation: object) -> None:
    group.add_argument("--epochs", type=int, metavar="N", help=f"passes over the data (default: {epochs})")
    group.add_argument("--batch-size", type=int, metavar="B", help=f"rows per micro-batch (default: {batch_size})")
    group.add_argument(
        "--accumulation", type=int, metavar="N", help=f"micro-batches per optimizer step (default: {accumulation})"
    )
    group.add_argument(
        "--learning-rate",
        *_ALIASES["learning_rate"],
        type=float,
        metavar="LR",
        help="peak learning rate (default: 1e-5)",
    )
    group.add_argument("--weight-decay", type=float, metavar="W", help="of AdamW (default: 0.01)")
    group.add_argument(
        "--warmup-epochs", type=float, metavar="N", help="linear warm-up, then linear decay to 0 (default: 1)"
    )


def _method(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "method", "defaults: those of --preset llama-3.2-3b / those of phi-1.5 if they differ"
    )
    number = {"type": float, "metavar": "X"}
    count = {"type": int, "metavar": "N"}
    switch = argparse.BooleanOptionalAction
    group.add_argument("--preset", choices=tuple(PUBLISHED), default="llama-3.2-3b", help="published settings")
    group.add_argument(
        "--retain-weight", *_ALIASES["retain_weight"], **number, help="weight of the retain loss (1.25 / 1.5)"
    )
    group.add_argument("--num-samples", **count, help="answers drawn per forget question (20 / 5)")
    group.add_argument("--temperature", **number, help="of the draws (0.9 / 1.25)")
    group.add_argument("--top-k", **count, help="draw from the k likeliest tokens, 0 for all (50)")
    group.add_argument("--top-p", **number, help="draw from the likeliest tokens of this mass (0.95)")
    group.add_argument("--min-p", **number, help="drop tokens below this share of the likeliest one (0)")
    group.add_argument("--min-words", *_ALIASES["min_words"], **count, help="answers of fewer words score worse (0)")
    group.add_argument("--max-length", **count, help="tokens of padded prompt and answer at most (200)")
    group.add_argument("--max-new-tokens", **count, help="tokens of an answer at most, instead of --max-length")
    group.add_argument(
        "--selection",
        choices=("best", "bradley_terry"),
        help="take the best answer, or draw one by softmax(-score/tau) (best)",
    )
    group.add_argument("--tau", **number, help="of --selection bradley_terry (0.1)")
    group.add_argument("--keep-truncated", action=switch, help="answers cut off by the limit may be picked (yes)")
    group.add_argument(
        "--prune",
        action=switch,
        help="stop sampling answers that --selection best cannot pick any more; same picks (yes)",
    )
    group.add_argument(
        "--reencode", action=switch, help="train on the decoded and re-encoded answer, not on the drawn tokens (yes)"
    )
    _loop(group, epochs="30 / 40", batch_size="8 / 16", accumulation="2 / 4")


def _evaluation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--evaluation-rows",
        type=int,
        default=400,
        metavar="N",
        help="measure on the first N rows of each set, 0 for all (default: %(default)s)",
    )
    group.add_argument(
        "--evaluation-tokens",
        type=int,
        default=128,
        metavar="N",
        help="tokens of an answer at most (default: %(default)s)",
    )


def _machine(parser: argparse.ArgumentParser, model: bool = True) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: 0)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    if not model:
        return
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: cuda where there is one)")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the weights (default: float32)",
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def _check(options: argparse.Namespace) -> None:
    """What argparse cannot check; most of the method's own options are checked by PMCConfig."""
    # As many threads as no machine has end the process before an error could.
    ranges = {
        "threads": (1, 4096),
        "seed": (0, 2**63 - 1),
        "top_k": (0, MOST),
        **dict.fromkeys(("checkpoint_every", "evaluation_tokens", "leakage"), (1, MOST)),
        "evaluation_rows": (0, MOST),
    }
    for name, (smallest, largest) in ranges.items():
        value = getattr(options, name, None)
        if value is not None and not smallest <= value <= largest:
            wanted = f"at least {smallest}" if value < smallest else f"at most {largest}"
            raise UserError(f"--{name.replace('_', '-')}: got {value}, expected {wanted}")
    for name in _PATHS:
        given = getattr(options, name, None)
        if "" in (given if isinstance(given, list) else [given]):
            raise UserError(f"--{name}: got '', expected the name of a file or folder")
    if getattr(options, "prefill", "") and not options.leakage:
        raise UserError("--prefill: it starts the answers of --leakage, which is missing; expected --leakage N with it")


if __name__ == "__main__":
    sys.exit(main())
