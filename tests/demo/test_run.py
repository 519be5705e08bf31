"""The demo as a command: what it writes and that it resumes, at a size that takes seconds; what it ends with, at its own."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pmc_fast import cli, training
from pmc_fast.demo import run as demo


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo, "SIZES", {"people": 3, "forget_people": 1, "places": 2})
    monkeypatch.setattr(demo, "LEARNING", {**demo.LEARNING, "epochs": 3, "warmup_epochs": 1.0})
    unlearning = {"epochs": 2, "num_samples": 4, "max_new_tokens": 8}
    monkeypatch.setattr(demo, "UNLEARNING", {**demo.UNLEARNING, **unlearning})
    monkeypatch.setattr(demo, "_ANSWER_TOKENS", 8)


def arguments(out, *more):
    return ["demo", "--out", str(out), "--threads", "1", "--seed", "5", "--checkpoint-every", "2", *more]


def test_what_it_writes_and_prints(small, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    assert cli.main(arguments(out)) == 0
    report = json.loads((out / "report.json").read_text())
    assert {"config", "environment", "before", "after", "examples", "timing"} <= report.keys()
    assert {"sample", "score", "train", "total"} <= report["timing"].keys()
    assert (out / "unlearning.png").read_bytes().startswith(b"\x89PNG")
    for name in ("model-before", "model-after"):
        assert (
            len(AutoTokenizer.from_pretrained(out / name))
            == AutoModelForCausalLM.from_pretrained(out / name).get_output_embeddings().weight.shape[0]
        )
    printed = capsys.readouterr().out
    for text in ("unlearn quality %", "utility %", "unlearning: sample", "unlearning: score", "unlearning: train"):
        assert text in printed
    told = [example["forget"] for example in report["examples"]]
    assert told.count(True) in (2, 3) and told.count(False) == 1
    for example in report["examples"]:
        assert example["question"] in printed and example["before"] in printed


@pytest.mark.parametrize("stop", [1, 9, 11])  # while learning, and while unlearning
def test_interrupted_and_resumed(small, tmp_path, monkeypatch, capsys, stop):
    assert cli.main(arguments(tmp_path / "whole")) == 0
    take_step, taken = training._Loop._step, [0]

    def interrupted(loop, loss):
        if taken[0] == stop:
            raise KeyboardInterrupt
        taken[0] += 1
        return take_step(loop, loss)

    monkeypatch.setattr(training._Loop, "_step", interrupted)
    assert cli.main(arguments(tmp_path / "resumed")) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(training._Loop, "_step", take_step)
    torch.manual_seed(99)
    assert cli.main(arguments(tmp_path / "resumed", "--resume")) == 0
    for name in ("model-before", "model-after"):
        whole, resumed = (load_file(tmp_path / run / name / "model.safetensors") for run in ("whole", "resumed"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    reports = [json.loads((tmp_path / run / "report.json").read_text()) for run in ("whole", "resumed")]
    assert all(reports[0][key] == reports[1][key] for key in ("before", "after", "examples"))


def test_the_whole_demo_forgets_what_it_is_to_forget_and_no_more(tmp_path):
    """With its default seed; half a minute on a core."""
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    before, after = report["before"], report["after"]
    assert before["forget_rouge_l"] > 0.9  # else there would be nothing to forget
    assert after["forget_rouge_l"] < 0.15
    assert before["utility"] - after["utility"] < 5
