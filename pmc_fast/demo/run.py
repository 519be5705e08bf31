"""The demo: invent facts, train a small model on them, make it forget some, show what changed."""

from __future__ import annotations

import argparse
import time
from typing import Any

from pmc_fast import training
from pmc_fast.commands import (
    MEASURED,
    bar,
    initialise,
    load_beginning,
    print_comparison,
    print_table,
    set_threads,
    timed,
)
from pmc_fast.config import PMCConfig
from pmc_fast.data import QA, write_jsonl
from pmc_fast.demo.fiction import Fiction, make_fiction
from pmc_fast.demo.model import new_model, train_tokenizer
from pmc_fast.doctor import environment
from pmc_fast.evaluation import evaluate, greedy_answers
from pmc_fast.plots import plot_unlearning
from pmc_fast.pmc import PMC
from pmc_fast.runs import Run

SIZES = {"people": 20, "forget_people": 4, "places": 12}

LEARNING = {
    "epochs": 25,
    "batch_size": 16,
    "accumulation": 1,
    "learning_rate": 3e-3,
    "weight_decay": 0.01,
    "warmup_epochs": 2.0,
}

UNLEARNING = {
    "num_samples": 20,
    "temperature": 1.5,
    "top_k": 50,
    "top_p": 0.95,
    "min_words": 3,
    "max_length": None,
    "max_new_tokens": 32,
    "retain_weight": 1.25,
    "epochs": 20,
    "batch_size": 8,
    "accumulation": 1,
    "learning_rate": 5e-4,
    "weight_decay": 0.01,
    "warmup_epochs": 1.0,
}

_ANSWER_TOKENS = 40

# What the files of a run hold that is read again, see `runs.Form`.
_BEGINNING = {"before": MEASURED, "answers": list, "pmc": dict, "seconds": float}
_REPORT = {"before": MEASURED, "after": MEASURED, "examples": list, "timing": dict}


def demo(options: argparse.Namespace) -> int:
    """All of it, in options.out; see `pmc-fast demo --help`."""
    set_threads(options.threads)
    config = {"command": "demo", "seed": options.seed, "sizes": SIZES, "learning": LEARNING, "unlearning": UNLEARNING}
    run = Run(options.out, config, options.resume, report=_REPORT)
    if run.report is not None:
        print(f"{run.folder}: this demo is finished")
        _print(run.report)
        return 0
    run.start()
    started = time.perf_counter()
    fiction = make_fiction(options.seed, **SIZES)
    people = f"{SIZES['people']} people and {SIZES['places']} places"
    print(f"Invented {people}: {len(fiction.training)} facts to learn, {len(fiction.forget)} of them to forget.\n")
    for name in ("forget", "forget_paraphrased", "retain", "world", "training"):
        write_jsonl(run.folder / "data" / f"{name}.jsonl", getattr(fiction, name))
    tokenizer = train_tokenizer(fiction.training)
    model = new_model(tokenizer, options.seed)
    learned = _learn(options, run, model, tokenizer, fiction)
    report = _unlearn(options, run, model, tokenizer, fiction, config)
    report["timing"]["learn"] = learned
    report["timing"]["total"] = time.perf_counter() - started
    run.finish(report)
    _print(report)
    print(f"\nEverything is in {run.folder}: report.json, unlearning.png, model-before/, model-after/, data/")
    return 0


def _learn(options: argparse.Namespace, run: Run, model: Any, tokenizer: Any, fiction: Fiction) -> float:
    """Train the model until it knows the facts; returns the seconds it took."""
    config = PMCConfig(seed=options.seed, **LEARNING)
    part = Run(run.folder / "learning", config.__dict__, resume=True)
    part.start()
    pmc = PMC(model, tokenizer, config)
    every = options.checkpoint_every
    seconds = training.finetune(pmc, fiction.training, config, run=part, checkpoint_every=every, max_grad_norm=1.0)
    run.save_model("model-before", model, tokenizer)
    return seconds["train"]


def _unlearn(
    options: argparse.Namespace, run: Run, model: Any, tokenizer: Any, fiction: Fiction, config: dict
) -> dict[str, Any]:
    """Measure, unlearn, measure again; returns the report."""
    pmc_config = PMCConfig(seed=options.seed, **UNLEARNING)
    part = Run(run.folder / "unlearning", pmc_config.__dict__, resume=True, beginning=_BEGINNING)
    part.start()
    pmc = PMC(model, tokenizer, pmc_config)
    examples = [*fiction.forget[:: max(1, len(fiction.forget) // 3)][:3], fiction.retain[0]]
    beginning = part.beginning
    if beginning is None:
        before, measuring = timed(_measure, pmc, fiction, "measuring before")
        answers = _answers(pmc, examples)
        remembering = initialise(pmc, [row.question for row in fiction.forget])
        beginning = {"before": before, "answers": answers, "pmc": pmc.state_dict(), "seconds": measuring + remembering}
        part.save_beginning(beginning)
    else:
        load_beginning(part, pmc)
    phases = training.unlearn(pmc, fiction.retain, pmc_config, run=part, checkpoint_every=options.checkpoint_every)
    run.save_model("model-after", model, tokenizer)
    after, measuring = timed(_measure, pmc, fiction, "measuring after")
    plot_unlearning(run.folder / "unlearning.png", part.metrics())
    told = zip(examples, beginning["answers"], _answers(pmc, examples), strict=True)
    return {
        "config": config,
        "environment": environment(),
        "before": beginning["before"],
        "after": after,
        "examples": [
            {"forget": row in fiction.forget, "question": row.question, "true": row.answer, "before": old, "after": new}
            for row, old, new in told
        ],
        "timing": {**phases, "evaluate": beginning["seconds"] + measuring},
    }


def _measure(pmc: PMC, fiction: Fiction, title: str) -> dict:
    utility = {"world": fiction.world}
    rows = len(fiction.forget) + len(fiction.forget_paraphrased) + len(fiction.retain) + len(fiction.world)
    with bar(rows, title) as progress:
        return evaluate(
            pmc.lm,
            pmc.prompts,
            forget=fiction.forget,
            paraphrased=fiction.forget_paraphrased,
            retain=fiction.retain,
            utility=utility,
            max_new_tokens=_ANSWER_TOKENS,
            batch_size=64,
            progress=progress,
        )


def _answers(pmc: PMC, rows: list[QA]) -> list[str]:
    return greedy_answers(pmc.lm, pmc.prompts, [row.question for row in rows], max_new_tokens=_ANSWER_TOKENS)


def _print(report: dict) -> None:
    print()
    print_comparison(report)
    for example in report["examples"]:
        print(f"\n{'To forget' if example['forget'] else 'To keep'}: {example['question']}")
        print(f"  before: {example['before']}\n  after:  {example['after']}")
    timing = report["timing"]
    names = {
        "learn": "learning the facts",
        "sample": "unlearning: sample",
        "score": "unlearning: score",
        "train": "unlearning: train",
        "checkpoint": "checkpoints",
        "evaluate": "measuring",
        "total": "total",
    }
    print()
    print_table(("where the time went", "seconds"), [(names[k], f"{timing[k]:.1f}") for k in names if k in timing])
