"""What the commands finetune, unlearn and evaluate do."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from itertools import chain
from pathlib import Path

import torch

from pmc_fast import training
from pmc_fast.config import PMCConfig
from pmc_fast.data import QA, read_jsonl
from pmc_fast.doctor import environment
from pmc_fast.errors import UserError
from pmc_fast.evaluation import evaluate as measure
from pmc_fast.evaluation import greedy_answers, leakage
from pmc_fast.ledger import Ledger
from pmc_fast.loading import choose_device, load_model
from pmc_fast.models import LanguageModel
from pmc_fast.ops import rouge_l_recall
from pmc_fast.outputs import check_file, write_file
from pmc_fast.pmc import PMC
from pmc_fast.prompts import Prompts
from pmc_fast.room import check_evaluation, check_sampling, check_training
from pmc_fast.runs import Form, Run, file_option

# Options that do not decide how a run ends, and those that name files.
_HARMLESS = ("resume", "checkpoint_every", "out", "threads")
_FILES = ("data", "forget", "retain", "paraphrased")

_ROUGE_L = "ROUGE-L: the share of a true answer's words that the model says in their order, as a mean over the rows"

# What the files of a run hold that is read again, see `runs.Form`.
_RECALL = {"rouge_l": float}
_FINETUNE = {"beginning": {"before": _RECALL, "seconds": float}, "report": {"before": _RECALL, "after": _RECALL}}
MEASURED = {"unlearn_quality": float, "utility": float, "utility_sets": dict}
_UNLEARN = {
    "beginning": {"before": MEASURED, "pmc": dict, "seconds": {"evaluate": float, "initialise": float}},
    "report": {"before": MEASURED, "after": MEASURED},
}


def finetune(options: argparse.Namespace) -> int:
    defaults = PMCConfig(epochs=5, batch_size=16, accumulation=1)
    config = method(options, defaults)
    rows = read_jsonl(options.data)
    run = open_run(options, _FINETUNE)
    if run.report is not None:
        return _already_finished(run, _finetune_table)
    pmc, tokenizer = _prepare(options, config)
    sample = _first(rows, options.evaluation_rows)
    check_training(pmc.lm.model, pmc.prompts, rows, "--data")
    check_evaluation(pmc.lm.model, pmc.prompts, sample, options.evaluation_tokens)
    started = time.perf_counter()

    def recall(title: str) -> dict[str, float]:
        with bar(len(sample), title) as progress, _ops_errors(title):
            questions = [row.question for row in sample]
            limit = options.evaluation_tokens
            answers = greedy_answers(pmc.lm, pmc.prompts, questions, max_new_tokens=limit, progress=progress)
        return {"rouge_l": float(rouge_l_recall(answers, [row.answer for row in sample]).mean())}

    beginning = run.beginning
    if beginning is None:
        before, seconds = timed(recall, "before")
        beginning = {"before": before, "seconds": seconds}
    _start(run, beginning)
    phases = training.finetune(pmc, rows, config, run=run, checkpoint_every=options.checkpoint_every)
    model = run.save_model("model", pmc.lm.model, tokenizer)
    after, seconds = timed(recall, "after")
    timing = {**phases, "evaluate": beginning["seconds"] + seconds, "last_process": time.perf_counter() - started}
    report = _report(run, options, pmc, beginning["before"], after, timing)
    run.finish(report)
    _finetune_table(report)
    print(f"model: {model}\nreport: {run.folder / 'report.json'}")
    return 0


def unlearn(options: argparse.Namespace) -> int:
    config = method(options, PMCConfig.published(options.preset))
    sets = _read_sets(options)
    _tell_of_overlap(sets)
    run = open_run(options, _UNLEARN)
    if run.report is not None:
        return _already_finished(run, print_comparison)
    pmc, tokenizer = _prepare(options, config)
    check_sampling(pmc.lm.model, pmc.prompts, sets["forget"], config)
    check_training(pmc.lm.model, pmc.prompts, sets["retain"], "--retain")
    evaluated = _limited(sets, options.evaluation_rows)
    check_evaluation(pmc.lm.model, pmc.prompts, chain(*evaluated.values()), options.evaluation_tokens)
    started = time.perf_counter()

    def measured(title: str) -> dict:
        return _measure(pmc.lm, pmc.prompts, evaluated, options.evaluation_tokens, title)

    beginning = run.beginning
    if beginning is None:
        before, evaluate_seconds = timed(measured, "before")
        initialise_seconds = initialise(pmc, [row.question for row in sets["forget"]])
        seconds = {"evaluate": evaluate_seconds, "initialise": initialise_seconds}
        beginning = {"before": before, "pmc": pmc.state_dict(), "seconds": seconds}
    else:
        load_beginning(run, pmc)
    _start(run, beginning)
    _tell_of_the_run(pmc, sets)
    phases = training.unlearn(pmc, sets["retain"], config, run=run, checkpoint_every=options.checkpoint_every)
    model = run.save_model("model", pmc.lm.model, tokenizer)
    run.write_json("ledger.json", pmc.state_dict())
    after, seconds = timed(measured, "after")
    evaluate_seconds = beginning["seconds"]["evaluate"] + seconds
    timing = {**phases, "initialise": beginning["seconds"]["initialise"], "evaluate": evaluate_seconds}
    report = _report(run, options, pmc, beginning["before"], after, timing)
    report["timing"]["last_process"] = time.perf_counter() - started
    run.finish(report)
    print_comparison(report)
    print(f"model: {model}\nreport: {run.folder / 'report.json'}")
    _tell_of_what_stays(pmc.ledger)
    return 0


def evaluate(options: argparse.Namespace) -> int:
    sets = _read_sets(options)
    if options.json is not None:
        check_file(options.json, "--json")
        read = (options.forget, options.retain, options.paraphrased, *options.utility)
        if os.path.realpath(options.json) in [os.path.realpath(file) for file in read if file]:
            raise UserError(f"--json: {options.json} is a file that rows are read from; choose another place")
        if Path(options.json).resolve().parent == Path(options.model).resolve() and not _may_go(Path(options.json)):
            raise UserError(f"--json: {options.json} is a file of the model; choose another place")
    config = PMCConfig(seed=options.seed, **_prompt(options))
    set_threads(options.threads)
    model, tokenizer = load_model(options.model, options.device, options.dtype, options.trust_remote_code)
    lm, prompts = LanguageModel(model), _prompts(options, tokenizer, config)
    sets = _limited(sets, options.evaluation_rows)
    check_evaluation(model, prompts, chain(*sets.values()), options.evaluation_tokens, options.prefill)
    results = _measure(lm, prompts, sets, options.evaluation_tokens, "evaluating")
    rows = [
        ("unlearn quality", f"{results['unlearn_quality']:.2f} %"),
        ("utility", f"{results['utility']:.2f} %"),
        ("forget ROUGE-L", f"{results['forget_rouge_l']:.4f}"),
        ("paraphrased ROUGE-L", f"{results.get('paraphrased_rouge_l', float('nan')):.4f}"),
        ("retain ROUGE-L", f"{results['retain_rouge_l']:.4f}"),
        *((f"{name} ROUGE-L", f"{value:.4f}") for name, value in results["utility_sets"].items()),
    ]
    if options.leakage:
        with bar(len(sets["forget"]), "leakage") as progress, _ops_errors("leakage"):
            results["leakage"] = leakage(
                lm,
                prompts,
                sets["forget"],
                num_samples=options.leakage,
                prefill=options.prefill,
                max_new_tokens=options.evaluation_tokens,
                seed=options.seed,
                progress=progress,
            )
        rows.append((f"leakage, worst of {options.leakage}", f"{results['leakage']:.4f}"))
    if options.json is not None:  # first: a terminal may lack the letters of a set's name
        write_file(options.json, json.dumps(results, indent=2) + "\n")
    print_table(("measure", "value"), [row for row in rows if row[1] != "nan"])
    print(_ROUGE_L)
    return 0


def method(options: argparse.Namespace, defaults: PMCConfig) -> PMCConfig:
    """The hyperparameters: the defaults with what was given on the command line."""
    given = {field.name: getattr(options, field.name, None) for field in fields(PMCConfig)}
    changes = {name: value for name, value in given.items() if value is not None}
    if changes.get("top_k") == 0:
        changes["top_k"] = None
    config = replace(defaults, **_prompt(options), **changes)
    if {"max_length", "max_new_tokens"} <= changes.keys():
        raise UserError("--max-length, --max-new-tokens: got both, want one: either limits an answer")
    if "tau" in changes and config.selection != "bradley_terry":
        raise UserError("--tau: it belongs to --selection bradley_terry, which is missing")
    if changes.get("prune") and config.selection != "best":
        raise UserError(f"--prune: it needs --selection best, got {config.selection}")
    return config


def open_run(options: argparse.Namespace, forms: dict[str, Form]) -> Run:
    """The run in --out, checked against these options and what their files hold; nothing is written yet."""
    config = {name: value for name, value in vars(options).items() if name not in _HARMLESS}
    config |= {name: file_option(config[name]) for name in _FILES if config.get(name)}
    if "utility" in config:
        config["utility"] = {Path(file).stem: file_option(file) for file in options.utility}
    if os.path.isdir(options.model):
        config["model"] = str(Path(options.model).resolve())
    run = Run(options.out, config, options.resume, **forms)
    if options.resume and not run.resumed:
        print(f"{run.folder}: no run to resume there; starting one")
    return run


def load_beginning(run: Run, pmc: PMC) -> None:
    """What `initialise` remembered when the run began."""
    try:
        pmc.load_state_dict(run.beginning["pmc"])
    except UserError as error:
        raise run.damaged("start.json", str(error)) from error


def initialise(pmc: PMC, questions: list[str]) -> float:
    """Remember the model's answers as they are now; returns the seconds it took."""

    def answer(title: str) -> None:
        with bar(len(questions), title) as progress, _ops_errors(title):
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
    print(_ROUGE_L)


def _prepare(options: argparse.Namespace, config: PMCConfig) -> tuple[PMC, object]:
    set_threads(options.threads)
    model, tokenizer = load_model(options.model, options.device, options.dtype, options.trust_remote_code)
    return PMC(model, _prompts(options, tokenizer, config), config), tokenizer


def _prompts(options: argparse.Namespace, tokenizer: object, config: PMCConfig) -> Prompts:
    if options.prompt == "chat" and not getattr(tokenizer, "chat_template", None):
        raise UserError("--prompt: got chat, but the tokenizer has no chat template; want auto, tags or plain")
    prompts = Prompts(tokenizer, style=config.prompt_style, system=config.system_prompt)
    if options.system is not None and prompts.style != "chat":
        raise UserError(
            f"--system: it opens chat prompts, and these are {prompts.style}; leave it out, or --prompt chat"
        )
    return prompts


def _start(run: Run, beginning: dict) -> None:
    """Make the run's folder only now that there is something to keep: a run that fails before leaves none behind."""
    run.start()
    run.save_beginning(beginning)


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


def _tell_of_overlap(sets: dict[str, list[QA]]) -> None:
    """Training keeps every answer in the retain set, also those that are to be forgotten."""
    kept = {row.question.strip() for row in sets["retain"]}
    if both := sum(row.question.strip() in kept for row in sets["forget"]):
        told = (
            f"{both} of {len(sets['forget'])} questions of --forget are in --retain too: training keeps their answers"
        )
        print(told, file=sys.stderr)


def _tell_of_the_run(pmc: PMC, sets: dict[str, list[QA]]) -> None:
    rows = f"{len(sets['forget'])} questions to forget, {len(sets['retain'])} rows to keep"
    weights = str(next(pmc.lm.model.parameters()).dtype).removeprefix("torch.")
    print(f"{rows}; {pmc.prompts.style} prompts; {weights} on {pmc.lm.device}", file=sys.stderr)
    told = "score: how much of the model's first answers is in the answers that it is trained on; 0 is best"
    print(told, file=sys.stderr)


def _tell_of_what_stays(ledger: Ledger) -> None:
    """A model that is sure of its answers draws nothing else, and learns nothing from them."""
    best, first = ledger.entries, ledger.initial_answers
    said = rouge_l_recall([entry.text for entry in best.values()], [first[question] for question in best])
    if stays := int((said == 1).sum()):
        told = f"{stays} of {len(first)} questions: the best answer drawn says all that the model said first"
        advice = "more --epochs, more --num-samples or a higher --temperature may find others"
        print(f"{told}; {advice}", file=sys.stderr)


def _may_go(path: Path) -> bool:
    """Whether there is no such file, or one that holds earlier results of `evaluate`."""
    try:
        return "unlearn_quality" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return not path.exists()


def _limited(sets: dict[str, list[QA]], rows: int) -> dict[str, list[QA]]:
    return {name: _first(held, rows) for name, held in sets.items()}


def _first(rows: list[QA], count: int) -> list[QA]:
    return rows[:count] if count else rows


def _measure(lm: LanguageModel, prompts: Prompts, sets: dict[str, list[QA]], max_new_tokens: int, title: str) -> dict:
    known = ("forget", "retain", "paraphrased")
    with bar(sum(map(len, sets.values())), title) as progress, _ops_errors(title):
        return measure(
            lm,
            prompts,
            forget=sets["forget"],
            retain=sets["retain"],
            paraphrased=sets.get("paraphrased"),
            utility={name: rows for name, rows in sets.items() if name not in known},
            max_new_tokens=max_new_tokens,
            progress=progress,
        )


@contextmanager
def _ops_errors(title: str):
    """The ops' refusal of NaN and the like, as an error without a traceback that says when it was."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        advice = "; try a lower --learning-rate" if title == "after" else ""
        raise UserError(f"{title}: {error}{advice}") from error


def _report(run: Run, options: argparse.Namespace, pmc: PMC, before: dict, after: dict, timing: dict) -> dict:
    return {
        "config": _in_force(run.config, pmc),
        "environment": environment(choose_device(options.device)),
        "before": before,
        "after": after,
        "timing": timing,
    }


def _in_force(options: dict, pmc: PMC) -> dict:
    """The run's options with the values that it had; null is an option without a default, or of no effect beside the others."""
    held = {**asdict(pmc.config), "prompt": pmc.prompts.style, "system": pmc.config.system_prompt}
    unused = {
        "system": pmc.prompts.style != "chat",
        "max_length": pmc.config.max_new_tokens is not None,
        "tau": pmc.config.selection == "best",
        "prune": pmc.config.selection != "best",
    }
    return {name: None if unused.get(name) else held.get(name, value) for name, value in options.items()}


def _already_finished(run: Run, show: Callable[[dict], None]) -> int:
    print(f"{run.folder}: this run is finished")
    show(run.report)
    return 0


def _finetune_table(report: dict) -> None:
    values = [f"{report[when]['rouge_l']:.4f}" for when in ("before", "after")]
    print_table(("", "before", "after"), [("ROUGE-L on the data", *values)])
