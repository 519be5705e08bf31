"""What the commands finetune, unlearn and evaluate do."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from pmc_fast import training
from pmc_fast.config import PMCConfig
from pmc_fast.data import QA, read_jsonl
from pmc_fast.doctor import environment
from pmc_fast.errors import UserError
from pmc_fast.evaluation import evaluate as measure
from pmc_fast.evaluation import greedy_answers, leakage
from pmc_fast.loading import choose_device, load_model
from pmc_fast.ops import rouge_l_recall
from pmc_fast.pmc import PMC
from pmc_fast.prompts import Prompts
from pmc_fast.runs import Run

# Options that do not decide how a run ends.
_HARMLESS = ("command", "resume", "checkpoint_every", "out", "threads")

_METHOD = [
    "num_samples",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "retain_weight",
    "min_words",
    "max_length",
    "max_new_tokens",
    "selection",
    "tau",
    "keep_truncated",
    "prune",
    "reencode",
    "epochs",
    "batch_size",
    "accumulation",
    "learning_rate",
    "weight_decay",
    "warmup_epochs",
]


def finetune(options: argparse.Namespace) -> int:
    defaults = PMCConfig(epochs=5, batch_size=16, accumulation=1)
    config = method(options, defaults)
    rows = read_jsonl(options.data)
    run = open_run(options, [options.data])
    if run.report is not None:
        return _already_finished(run, _finetune_table)
    pmc, tokenizer = _prepare(options, config)
    run.start()
    sample = _first(rows, options.evaluation_rows)
    started = time.perf_counter()

    def recall(title: str) -> dict[str, float]:
        with bar(len(sample), title) as progress:
            questions = [row.question for row in sample]
            limit = options.evaluation_tokens
            answers = greedy_answers(pmc.lm, pmc.prompts, questions, max_new_tokens=limit, progress=progress)
        return {"rouge_l": float(rouge_l_recall(answers, [row.answer for row in sample]).mean())}

    beginning = run.beginning
    if beginning is None:
        before, seconds = timed(recall, "before")
        run.save_beginning(beginning := {"before": before, "seconds": seconds})
    phases = training.finetune(pmc, rows, config, run=run, checkpoint_every=options.checkpoint_every)
    model = run.save_model("model", pmc.lm.model, tokenizer)
    after, seconds = timed(recall, "after")
    timing = {**phases, "evaluate": beginning["seconds"] + seconds, "last_process": time.perf_counter() - started}
    report = _report(run, options, beginning["before"], after, timing)
    run.finish(report)
    _finetune_table(report)
    print(f"model: {model}\nreport: {run.folder / 'report.json'}")
    return 0


def unlearn(options: argparse.Namespace) -> int:
    config = method(options, PMCConfig.published(options.preset))
    sets = _read_sets(options)
    files = [options.forget, options.retain, *filter(None, [options.paraphrased]), *options.utility]
    run = open_run(options, files)
    if run.report is not None:
        return _already_finished(run, print_comparison)
    pmc, tokenizer = _prepare(options, config)
    run.start()
    started = time.perf_counter()

    def measured(title: str) -> dict:
        return _measure(pmc, pmc.prompts, _limited(sets, options.evaluation_rows), options.evaluation_tokens, title)

    beginning = run.beginning
    if beginning is None:
        before, evaluate_seconds = timed(measured, "before")
        initialise_seconds = initialise(pmc, [row.question for row in sets["forget"]])
        seconds = {"evaluate": evaluate_seconds, "initialise": initialise_seconds}
        run.save_beginning(beginning := {"before": before, "pmc": pmc.state_dict(), "seconds": seconds})
    else:
        pmc.load_state_dict(beginning["pmc"])
    phases = training.unlearn(pmc, sets["retain"], config, run=run, checkpoint_every=options.checkpoint_every)
    model = run.save_model("model", pmc.lm.model, tokenizer)
    run.write_json("ledger.json", pmc.state_dict())
    after, seconds = timed(measured, "after")
    evaluate_seconds = beginning["seconds"]["evaluate"] + seconds
    timing = {**phases, "initialise": beginning["seconds"]["initialise"], "evaluate": evaluate_seconds}
    report = _report(run, options, beginning["before"], after, timing)
    report["timing"]["last_process"] = time.perf_counter() - started
    run.finish(report)
    print_comparison(report)
    print(f"model: {model}\nreport: {run.folder / 'report.json'}")
    return 0


def evaluate(options: argparse.Namespace) -> int:
    sets = _read_sets(options)
    if options.json and not Path(options.json).resolve().parent.is_dir():
        raise UserError(f"--json: {options.json}: no such folder")
    config = PMCConfig(seed=options.seed, **_prompt(options))
    set_threads(options.threads)
    model, tokenizer = load_model(options.model, options.device, options.dtype, options.trust_remote_code)
    prompts = Prompts(tokenizer, style=config.prompt_style, system=config.system_prompt)
    results = _measure(model, prompts, _limited(sets, options.evaluation_rows), options.evaluation_tokens, "evaluating")
    rows = [
        ("unlearn quality", f"{results['unlearn_quality']:.2f} %"),
        ("utility", f"{results['utility']:.2f} %"),
        ("forget ROUGE-L", f"{results['forget_rouge_l']:.4f}"),
        ("paraphrased ROUGE-L", f"{results.get('paraphrased_rouge_l', float('nan')):.4f}"),
        ("retain ROUGE-L", f"{results['retain_rouge_l']:.4f}"),
        *((f"{name} ROUGE-L", f"{value:.4f}") for name, value in results["utility_sets"].items()),
    ]
    if options.leakage:
        with bar(len(sets["forget"]), "leakage") as progress, _ops_errors():
            results["leakage"] = leakage(
                model,
                prompts,
                sets["forget"],
                num_samples=options.leakage,
                prefill=options.prefill,
                max_new_tokens=options.evaluation_tokens,
                seed=options.seed,
                progress=progress,
            )
        rows.append((f"leakage, worst of {options.leakage}", f"{results['leakage']:.4f}"))
    print_table(("measure", "value"), [row for row in rows if row[1] != "nan"])
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def method(options: argparse.Namespace, defaults: PMCConfig) -> PMCConfig:
    """The hyperparameters: the defaults with what was given on the command line."""
    from dataclasses import replace

    given = {name: getattr(options, name, None) for name in _METHOD}
    changes = {name: value for name, value in given.items() if value is not None}
    if changes.get("top_k") == 0:
        changes["top_k"] = None
    return replace(defaults, seed=options.seed, **_prompt(options), **changes)


def open_run(options: argparse.Namespace, files: Sequence[str]) -> Run:
    """The run in --out, checked against these options and the contents of these files; nothing is written yet."""
    config = {name: value for name, value in vars(options).items() if name not in _HARMLESS}
    config["sha256"] = {str(file): hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}
    run = Run(options.out, {"command": options.command, **config}, options.resume)
    if options.resume and not run.resumed:
        print(f"{run.folder}: no run to resume there; starting one")
    return run


def initialise(pmc: PMC, questions: list[str]) -> float:
    """Remember the model's answers as they are now; returns the seconds it took."""

    def answer(title: str) -> None:
        with bar(len(questions), title) as progress, _ops_errors():
            pmc.initialise(questions, progress=progress)

    return timed(answer, "remembering answers")[1]


def set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def timed(function: Callable, *arguments: object) -> tuple:
    """What the function returns, and the seconds it took."""
    start = time.perf_counter()
    return function(*arguments), time.perf_counter() - start


@contextmanager
def bar(total: int, title: str):
    """A progress bar, as a function to call with the number of rows done."""
    from tqdm import tqdm

    with tqdm(total=total, desc=title, unit="row") as progress:
        yield progress.update


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    print(line(header), "-" * len(line(["-" * width for width in widths])), *map(line, rows), sep="\n")


def print_comparison(report: dict) -> None:
    """A report's measurements before and after unlearning."""
    before, after = report["before"], report["after"]
    rows = [
        ("unlearn quality %", f"{before['unlearn_quality']:.2f}", f"{after['unlearn_quality']:.2f}"),
        ("utility %", f"{before['utility']:.2f}", f"{after['utility']:.2f}"),
    ]
    for name in ("forget_rouge_l", "paraphrased_rouge_l", "retain_rouge_l"):
        if name in before:
            rows.append((name.replace("_rouge_l", " ROUGE-L"), f"{before[name]:.4f}", f"{after[name]:.4f}"))
    for name, value in before["utility_sets"].items():
        rows.append((f"{name} ROUGE-L", f"{value:.4f}", f"{after['utility_sets'][name]:.4f}"))
    print_table(("", "before", "after"), rows)


def _prepare(options: argparse.Namespace, config: PMCConfig) -> tuple[PMC, object]:
    set_threads(options.threads)
    model, tokenizer = load_model(options.model, options.device, options.dtype, options.trust_remote_code)
    return PMC(model, Prompts(tokenizer, style=config.prompt_style, system=config.system_prompt), config), tokenizer


def _prompt(options: argparse.Namespace) -> dict[str, str]:
    given = {"prompt_style": options.prompt, "system_prompt": options.system}
    return {name: value for name, value in given.items() if value is not None}


def _read_sets(options: argparse.Namespace) -> dict[str, list[QA]]:
    """The sets by name; "forget", "retain" and "paraphrased" are not utility sets."""
    sets = {"forget": read_jsonl(options.forget), "retain": read_jsonl(options.retain)}
    if options.paraphrased:
        sets["paraphrased"] = read_jsonl(options.paraphrased)
    for file in options.utility:
        name = Path(file).stem
        if name in sets or name == "paraphrased":
            raise UserError(f"--utility: {file}: there is another set named {name}; rename the file")
        sets[name] = read_jsonl(file)
    return sets


def _limited(sets: dict[str, list[QA]], rows: int) -> dict[str, list[QA]]:
    return {name: _first(held, rows) for name, held in sets.items()}


def _first(rows: list[QA], count: int) -> list[QA]:
    return rows[:count] if count else rows


def _measure(model: object, prompts: Prompts, sets: dict[str, list[QA]], max_new_tokens: int, title: str) -> dict:
    known = ("forget", "retain", "paraphrased")
    with bar(sum(map(len, sets.values())), title) as progress, _ops_errors():
        return measure(
            getattr(model, "lm", model),
            prompts,
            forget=sets["forget"],
            retain=sets["retain"],
            paraphrased=sets.get("paraphrased"),
            utility={name: rows for name, rows in sets.items() if name not in known},
            max_new_tokens=max_new_tokens,
            progress=progress,
        )


@contextmanager
def _ops_errors():
    """The ops' refusal of NaN and the like, as an error without a traceback."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def _report(run: Run, options: argparse.Namespace, before: dict, after: dict, timing: dict) -> dict:
    return {
        "config": run.config,
        "environment": environment(choose_device(options.device)),
        "before": before,
        "after": after,
        "timing": timing,
    }


def _already_finished(run: Run, show: Callable[[dict], None]) -> int:
    print(f"{run.folder}: this run is finished")
    show(run.report)
    return 0


def _finetune_table(report: dict) -> None:
    values = [f"{report[when]['rouge_l']:.4f}" for when in ("before", "after")]
    print_table(("", "before", "after"), [("ROUGE-L on the data", *values)])
