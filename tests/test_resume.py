"""A run that was killed and resumed ends like one that was never stopped."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

from pmc_fast import PMC, PMCConfig, UserError, cli, commands, training
from pmc_fast.data import QA, write_jsonl
from pmc_fast.runs import Run


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
        data += ["--max-new-tokens", "6", "--min-words", "9"]  # no score of 0: every visit to a question samples again
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


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """One of two steps, of which the second was not taken."""
    folder = tmp_path_factory.mktemp("stopped")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "forget.jsonl", [QA(f"Who is {c}?", f"A poet, {c}.") for c in "abc"])
    write_jsonl(folder / "retain.jsonl", [QA(f"What is {c}?", f"The river {c}.") for c in "uvw"])
    again = [*arguments(folder, "out"), "--checkpoint-every", "1"]
    with pytest.MonkeyPatch.context() as patch:
        take_step = training._Loop._step
        stop = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
        patch.setattr(training._Loop, "_step", lambda loop, loss: (stop if loop.step else take_step)(loop, loss))
        assert cli.main(again) == 130
    return folder, again


def changed_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def changed_checkpoint(path, change):
    state = torch.load(path, weights_only=True)
    ledger = json.loads(state["pmc"])
    change(state, ledger["ledger"])
    torch.save({**state, "pmc": state["pmc"] if isinstance(state.get("pmc"), bytes) else json.dumps(ledger)}, path)


DAMAGES = {
    "start.json cut": ("start.json", lambda p: p.write_text(p.read_text()[:-40]), "not JSON"),
    "start.json lacks seconds": ("start.json", lambda p: changed_json(p, lambda v: v["seconds"].pop("initialise")), "its seconds lacks 'initialise'"),
    "start.json lacks a measure": ("start.json", lambda p: changed_json(p, lambda v: v["before"].pop("utility")), "its before lacks 'utility'"),
    "start.json of other answers": ("start.json", lambda p: changed_json(p, lambda v: v["pmc"]["ledger"]["initial_answers"].pop()), "state: ledger: initial_answers: got 2, expected one for each of the 3 questions"),
    "report.json is none": ("report.json", lambda p: p.write_text('{"before": {}, "after": {}}'), "its before lacks 'unlearn_quality'"),
    **{
        f"checkpoint cut to {part}": ("checkpoint.pt", lambda p, part=part: os.truncate(p, int(part * p.stat().st_size)), "torch cannot load it")
        for part in (0, 0.02, 0.5, 0.99)
    },
    "checkpoint lacks weights": ("checkpoint.pt", lambda p: changed_checkpoint(p, lambda s, _: s["model"].popitem()), "it is none of this model"),
    "checkpoint lacks the model": ("checkpoint.pt", lambda p: changed_checkpoint(p, lambda s, _: s.pop("model")), "it is none of this model"),
    "checkpoint of other moments": ("checkpoint.pt", lambda p: changed_checkpoint(p, lambda s, _: s["optimizer"].pop("state")), "it is none of this model"),
    "checkpoint beyond the end": ("checkpoint.pt", lambda p: changed_checkpoint(p, lambda s, _: s.update(step=99)), "it is none of this model"),
    "checkpoint with seconds that are none": ("checkpoint.pt", lambda p: changed_checkpoint(p, lambda s, _: s.update(seconds="ab")), "it is none of this model"),
    "checkpoint of other visits": ("checkpoint.pt", lambda p: changed_checkpoint(p, lambda s, ledger: ledger["visits"].pop()), "state: ledger: visits: got 2, expected one for each of the 3 questions"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_refused_before_the_first_step(stopped_run, tmp_path, monkeypatch, capsys, damage):
    name, make, reason = DAMAGES[damage]
    folder, again = stopped_run
    shutil.copytree(folder / "out", tmp_path / "out")
    make(tmp_path / "out" / name)
    monkeypatch.setattr(training._Loop, "_step", None)
    words = [word.replace(str(folder / "out"), str(tmp_path / "out")) for word in again]
    assert cli.main([*words, "--resume"]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith(f"pmc-fast unlearn: {tmp_path / 'out' / name}: the file is damaged ({reason}"), told
    assert "; delete this file, and --resume does again what it held" in told


def test_a_checkpoint_that_does_not_fit_changes_nothing(stopped_run, tmp_path):
    folder, _ = stopped_run
    changed_checkpoint(shutil.copy(folder / "out" / "checkpoint.pt", tmp_path), lambda s, ledger: ledger.pop("visits"))
    run = Run(tmp_path / "run", {})
    run.start()
    (tmp_path / "checkpoint.pt").rename(tmp_path / "run" / "checkpoint.pt")
    config = PMCConfig(epochs=3, batch_size=2, max_new_tokens=6, num_samples=3)
    pmc = PMC(make_model(seed=1), make_tokenizer(), config)
    pmc.initialise(["Who is a?", "Who is b?", "Who is c?"], answers=["a", "b", "c"])
    before = copy.deepcopy(pmc.lm.model.state_dict()), pmc.state_dict()
    with pytest.raises(UserError, match="checkpoint.pt: the file is damaged .state: ledger: got a dict of"):
        training.unlearn(pmc, [QA("What is u?", "The river u.")], config, run=run, progress=False)
    assert all(torch.equal(before[0][name], value) for name, value in pmc.lm.model.state_dict().items())
    assert pmc.state_dict() == before[1]


def test_training_leaves_torchs_random_state_alone(files):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert cli.main(arguments(files, "out")) == 0
    assert torch.equal(torch.rand(3), expected)
