"""A run that was killed and resumed ends like one that was never stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

from pmc_fast import cli, commands, training
from pmc_fast.data import QA, write_jsonl


@pytest.fixture
def files(tmp_path, rng_seed):
    make_model(seed=rng_seed, attention_dropout=0.2).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "forget.jsonl", [QA(f"Who is {c}?", f"A poet, {c}.") for c in "abcde"])
    write_jsonl(tmp_path / "retain.jsonl", [QA(f"What is {c}?", f"The river {c}.") for c in "uvwxyz"])
    return tmp_path


def arguments(files, out, command="unlearn"):
    """3 epochs of 2 optimizer steps; dropout in the model, so that resuming has random state to get right."""
    data = {
        "unlearn": ["--forget", "forget.jsonl", "--retain", "retain.jsonl", "--num-samples", "3"],
        "finetune": ["--data", "retain.jsonl"],
    }[command]
    data = [str(files / word) if word.endswith(".jsonl") else word for word in data]
    if command == "unlearn":
        data += ["--max-new-tokens", "6"]
    numbers = "--epochs 3 --batch-size 2 --accumulation 2 --lr 1e-2 --evaluation-tokens 4 --device cpu --threads 1"
    return [command, "--model", str(files / "model"), *data, "--out", str(files / out), *numbers.split(), "--seed", "7"]


def test_a_checkpoint_that_cannot_be_written(files, capsys, file_size_limit):
    """The run ends with its name and goes on once there is room."""
    command = arguments(files, "out")
    with file_size_limit(20000):
        assert cli.main(command) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith(f"pmc-fast unlearn: {files / 'out' / 'checkpoint.pt'}: cannot be written (File too large); ")
    assert cli.main([*command, "--resume"]) == 0
    assert cli.main(arguments(files, "whole")) == 0
    assert_same(files / "out", files / "whole")


def outcome(folder: Path):
    ledger = (folder / "ledger.json").read_text() if (folder / "ledger.json").exists() else None
    metrics = [line.split('"seconds"')[0] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return load_file(folder / "model" / "model.safetensors"), ledger, metrics


def assert_same(first: Path, second: Path):
    (weights, ledger, metrics), (other_weights, other_ledger, other_metrics) = outcome(first), outcome(second)
    assert metrics == other_metrics and len(metrics) > 3
    assert ledger == other_ledger
    assert weights.keys() == other_weights.keys()
    for name in weights:
        assert torch.equal(weights[name], other_weights[name]), name


@pytest.mark.parametrize("command", ["unlearn", "finetune"])
@pytest.mark.parametrize("stop, every", [(0, 1), (1, 2), (3, 2), (5, 1)])
def test_interrupted_and_resumed(files, monkeypatch, capsys, command, stop, every):
    assert cli.main(arguments(files, "whole", command)) == 0
    take_step = training._Loop._step

    def interrupted(loop, loss):
        if loop.step == stop:
            raise KeyboardInterrupt
        return take_step(loop, loss)

    again = [*arguments(files, "resumed", command), "--checkpoint-every", str(every)]
    monkeypatch.setattr(training._Loop, "_step", interrupted)
    assert cli.main(again) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.undo()
    torch.manual_seed(99)  # a resumed run leans on nobody's random state
    assert cli.main([*again, "--resume"]) == 0
    assert_same(files / "whole", files / "resumed")


def test_killed_at_any_moment(files):
    """kill -9 at a new moment each time, until the run gets through."""
    assert cli.main(arguments(files, "whole")) == 0
    command = [sys.executable, "-m", "pmc_fast", *arguments(files, "killed"), "--checkpoint-every", "1", "--resume"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    metrics, killed = files / "killed" / "metrics.jsonl", 0
    for wanted in (2, 5):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and len(metrics.read_text().splitlines()) >= wanted:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert killed, "the run ended before it could be killed"
    if not (files / "killed" / "report.json").exists():
        assert cli.main([*arguments(files, "killed"), "--resume"]) == 0
    assert_same(files / "whole", files / "killed")


def test_a_finished_run_is_not_run_again(files, capsys):
    assert cli.main(arguments(files, "out")) == 0
    before = (files / "out" / "report.json").read_text()
    assert cli.main([*arguments(files, "out"), "--resume"]) == 0
    assert "finished" in capsys.readouterr().out
    assert (files / "out" / "report.json").read_text() == before


def test_resume_notices_changed_data(files, monkeypatch, capsys):
    monkeypatch.setattr(training._Loop, "_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(arguments(files, "out")) == 130
    write_jsonl(files / "retain.jsonl", [QA("What is u?", "Another river.")])
    capsys.readouterr()
    assert cli.main([*arguments(files, "out"), "--resume"]) == 2
    assert f"--retain: {files / 'retain.jsonl'} holds other text than then" in capsys.readouterr().err


def test_resume_takes_the_same_files_by_other_paths(files, monkeypatch):
    assert cli.main(arguments(files, "whole")) == 0
    monkeypatch.setattr(training._Loop, "_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(arguments(files, "out")) == 130
    monkeypatch.undo()
    monkeypatch.chdir(files)
    (files / "moved").mkdir()
    (files / "retain.jsonl").rename(files / "moved" / "rows.jsonl")
    words = [word.replace(f"{files}{os.sep}", "./") for word in arguments(files, "out")]
    words[words.index("./retain.jsonl")] = "moved/rows.jsonl"
    assert cli.main([*words, "--resume"]) == 0
    assert_same(files / "whole", files / "out")


@pytest.mark.parametrize("stop", ["before", "remembering answers"])
def test_stopped_before_the_first_step_leaves_nothing(files, monkeypatch, capsys, stop):
    bar = commands.bar

    def stopped(total, title):
        if title == stop:
            raise KeyboardInterrupt
        return bar(total, title)

    monkeypatch.setattr(commands, "bar", stopped)
    assert cli.main(arguments(files, "out")) == 130
    assert not (files / "out").exists()
    told = capsys.readouterr().err
    assert "interrupted" in told and "the run is in" not in told and "--resume" not in told
    monkeypatch.undo()
    assert cli.main([*arguments(files, "out"), "--epochs", "1"]) == 0


def test_a_checkpoint_of_another_model_is_refused(files, monkeypatch, capsys):
    take_step = training._Loop._step
    monkeypatch.setattr(training._Loop, "_step", lambda loop, loss: loop.step and loop._stop() or take_step(loop, loss))
    monkeypatch.setattr(training._Loop, "_stop", lambda loop: (_ for _ in ()).throw(KeyboardInterrupt), raising=False)
    again = [*arguments(files, "out"), "--checkpoint-every", "1"]
    assert cli.main(again) == 130
    monkeypatch.undo()
    make_model(hidden_size=48).save_pretrained(files / "model")
    capsys.readouterr()
    assert cli.main([*again, "--resume"]) == 2
    assert "checkpoint.pt: the file is damaged (it is none of this model" in capsys.readouterr().err


def test_training_leaves_torchs_random_state_alone(files):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert cli.main(arguments(files, "out")) == 0
    assert torch.equal(torch.rand(3), expected)
