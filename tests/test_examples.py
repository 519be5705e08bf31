"""Every example in docs/examples runs, on a tiny model, and saves one that has changed."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from collectives import as_torchrun
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

from pmc_fast.data import QA, write_jsonl

EXAMPLES = sorted((Path(__file__).parents[1] / "docs" / "examples").glob("*.py"))
NEEDS = {"with_accelerate": "accelerate", "with_trainer": "accelerate"}
PROCESSES = {"fsdp": (2,), "with_trainer": (1, 2)}  # where not just one
RUNS = [(path, count) for path in EXAMPLES for count in PROCESSES.get(path.stem, (1,))]


def test_there_are_examples():
    assert {"plain_torch", *NEEDS, *PROCESSES} <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize(("path", "count"), RUNS, ids=lambda value: getattr(value, "stem", str(value)))
def test_example(path, count, tmp_path, monkeypatch, rng_seed):
    pytest.importorskip(NEEDS.get(path.stem, "torch"))
    model = make_model(seed=rng_seed)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "forget.jsonl", [QA(f"Who is {c}?", f"A poet, {c}.") for c in "abcde"])
    write_jsonl(tmp_path / "retain.jsonl", [QA(f"What is {c}?", f"The river {c}.") for c in "uvwxyz"])
    command = [str(path), *(str(tmp_path / name) for name in ("model", "forget.jsonl", "retain.jsonl", "out"))]
    monkeypatch.chdir(tmp_path)
    if count > 1:
        as_torchrun(count, command)
    else:
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(str(path), run_name="__main__")

    trained = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(tmp_path / "model" / "model.safetensors")
    assert trained.keys() == before.keys() and all(torch.isfinite(value).all() for value in trained.values())
    assert not any(torch.equal(trained[name], before[name]) for name in before)
    assert (tmp_path / "out" / "tokenizer.json").exists()
