"""A run's folder: what it refuses, and what is left when it is killed."""

import json

import pytest
import torch

from pmc_fast.errors import UserError
from pmc_fast.runs import Run


def start(folder, resume=False, **config):
    run = Run(folder, config, resume)
    run.start()
    return run


def test_refuses_a_folder_with_another_run(tmp_path):
    start(tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match="holds another run"):
        Run(tmp_path / "run", {"epochs": 1})


def test_refuses_a_folder_with_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(UserError, match="not empty"):
            Run(tmp_path, {}, resume)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # a model's folder is no run either
    with pytest.raises(UserError, match="not empty"):
        Run(tmp_path, {}, True)


def test_refuses_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        Run(tmp_path / "out", {})


def test_writes_nothing_before_start(tmp_path):
    Run(tmp_path / "run", {})
    assert not (tmp_path / "run").exists()


def test_resume_wants_the_same_options(tmp_path):
    start(tmp_path, epochs=1, seed=0)
    with pytest.raises(UserError, match="epochs was 1, now 2") as caught:
        Run(tmp_path, {"epochs": 2, "seed": 0}, resume=True)
    assert "seed" not in str(caught.value)
    assert Run(tmp_path, {"epochs": 1, "seed": 0}, resume=True).resumed


def test_resume_starts_where_nothing_is(tmp_path):
    assert not start(tmp_path / "missing", resume=True).resumed
    (tmp_path / "empty").mkdir()
    assert not start(tmp_path / "empty", resume=True).resumed
    (tmp_path / "killed" / ".tmp-config.json").parent.mkdir()
    (tmp_path / "killed" / ".tmp-config.json").write_text('{"pmc')  # killed while it wrote its first file
    assert not start(tmp_path / "killed", resume=True).resumed
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["config.json"]


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    run = start(tmp_path)
    for step in range(1, 6):
        run.log({"step": step, "loss": 1 / step})
        if step == 3:
            run.save_checkpoint({"step": 3, "weight": torch.arange(4.0)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed half way through a line
    resumed = start(tmp_path, resume=True)
    assert torch.equal(resumed.load_checkpoint()["weight"], torch.arange(4.0))
    assert [record["step"] for record in resumed.metrics()] == [1, 2, 3]
    resumed.log({"step": 4, "loss": 0.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_metrics_without_a_checkpoint_start_over(tmp_path):
    run = start(tmp_path)
    run.log({"step": 1})
    assert start(tmp_path, resume=True).load_checkpoint() is None
    assert run.metrics() == []


@pytest.mark.parametrize("dies_in", ["write", "rename"])
def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, dies_in):
    run = start(tmp_path)
    run.save_checkpoint({"step": 1})

    def die(*arguments):
        if dies_in == "write":
            arguments[1].write_bytes(b"half a check")
        raise KeyboardInterrupt

    monkeypatch.setattr(*((torch, "save") if dies_in == "write" else ("os.replace",)), die)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint({"step": 2})
    monkeypatch.undo()
    resumed = start(tmp_path, resume=True)
    assert resumed.load_checkpoint() == {"step": 1}
    assert not list(tmp_path.glob(".tmp-*"))


def test_finish_leaves_the_report_and_no_checkpoint(tmp_path):
    run = start(tmp_path)
    assert run.report is None
    run.save_checkpoint({"step": 1})
    run.finish({"after": 1.5})
    assert start(tmp_path, resume=True).report == {"after": 1.5}
    assert not (tmp_path / "checkpoint.pt").exists()
