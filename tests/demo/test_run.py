"""The demo as a command: what it writes and that it resumes, at a size that takes seconds; what it ends with, at its own."""

import io
import json
from contextlib import contextmanager, redirect_stdout

import pytest
import torch
from safetensors.torch import load_file

from pmc_fast import cli, training
from pmc_fast.demo import run as demo


@contextmanager
def sizes_that_take_seconds():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SIZES", {"people": 3, "forget_people": 1, "places": 2})
        patch.setattr(demo, "LEARNING", {**demo.LEARNING, "epochs": 3, "warmup_epochs": 1.0})
        unlearning = {"epochs": 2, "num_samples": 4, "max_new_tokens": 8}
        patch.setattr(demo, "UNLEARNING", {**demo.UNLEARNING, **unlearning})
        patch.setattr(demo, "_ANSWER_TOKENS", 8)
        yield


@pytest.fixture
def small():
    with sizes_that_take_seconds():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a small run that nobody interrupts, and what it prints."""
    out, printed = tmp_path_factory.mktemp("demo") / "whole", io.StringIO()
    with sizes_that_take_seconds(), redirect_stdout(printed):
        assert cli.main(arguments(out)) == 0
    return out, printed.getvalue()


def arguments(out, *more):
    return ["demo", "--out", str(out), "--threads", "1", "--seed", "5", "--checkpoint-every", "2", *more]


def test_what_it_writes_and_prints(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, printed = whole
    report = json.loads((out / "report.json").read_text())
    assert {"config", "environment", "before", "after", "examples", "timing"} <= report.keys()
    assert {"sample", "score", "train", "total"} <= report["timing"].keys()
    assert (out / "unlearning.png").read_bytes().startswith(b"\x89PNG")
    for name in ("model-before", "model-after"):
        assert (
            len(AutoTokenizer.from_pretrained(out / name))
            == AutoModelForCausalLM.from_pretrained(out / name).get_output_embeddings().weight.shape[0]
        )
    for text in ("unlearn quality %", "utility %", "unlearning: sample", "unlearning: score", "unlearning: train"):
        assert text in printed
    told = [example["forget"] for example in report["examples"]]
    assert told.count(True) in (2, 3) and told.count(False) == 1
    for example in report["examples"]:
        assert example["question"] in printed and example["before"] in printed


@pytest.mark.parametrize("stop", [1, 9, 11])  # while learning, and while unlearning
def test_interrupted_and_resumed(whole, small, tmp_path, monkeypatch, capsys, stop):
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
    runs = [whole[0], tmp_path / "resumed"]
    for name in ("model-before", "model-after"):
        want, resumed = (load_file(run / name / "model.safetensors") for run in runs)
        assert all(torch.equal(want[key], resumed[key]) for key in want)
    reports = [json.loads((run / "report.json").read_text()) for run in runs]
    assert all(reports[0][key] == reports[1][key] for key in ("before", "after", "examples"))


def test_the_whole_demo_forgets_what_it_is_to_forget_and_no_more(tmp_path):
    """With its default seed; half a minute on a core."""
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    before, after = report["before"], report["after"]
    assert before["forget_rouge_l"] > 0.9  # else there would be nothing to forget
    assert after["forget_rouge_l"] < 0.15
    assert before["utility"] - after["utility"] < 5
