"""A run's folder: what it refuses, and what is left when it is killed."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

from pmc_fast.errors import UserError
from pmc_fast.runs import Run, file_option, holds_run


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
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("out", "link"):
        with pytest.raises(UserError, match="not a folder"):
            Run(tmp_path / name, {})


@pytest.mark.parametrize("name", ["notes.txt/run", "notes.txt/deep/run", "n" * 300])
def test_refuses_a_folder_that_cannot_be_made(tmp_path, name):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match="choose another --out"):
        Run(tmp_path / name, {})


def test_refuses_a_folder_without_permission(tmp_path, monkeypatch):
    start(tmp_path / "run").finish({"before": 1, "after": 2})
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match="cannot be written to; choose another --out"):
        Run(tmp_path / "new" / "run", {})
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert Run(tmp_path / "run", {}, resume=True).report  # a finished run is only read


def test_writes_nothing_before_start(tmp_path):
    run = Run(tmp_path / "run", {})
    assert not (tmp_path / "run").exists() and not holds_run(tmp_path / "run")
    run.start()
    assert holds_run(tmp_path / "run")


def test_another_run_may_begin_meanwhile(tmp_path):
    late = Run(tmp_path / "run", {"seed": 2})
    start(tmp_path / "run", seed=1)
    with pytest.raises(UserError, match="another run began there"):
        late.start()
    assert Run(tmp_path / "run", {"seed": 1}, resume=True).resumed


@pytest.mark.parametrize(
    "name, content, reason, advice",
    [
        ("config.json", '{"pmc_fast_run": 2}', "lacks 'options'", "delete the folder"),
        ("config.json", '{"pmc_fast_run": 2, "options": 3}', "its options is 3, no object", "delete the folder"),
        ("start.json", '{"bef', "not JSON", "delete this file"),
        ("start.json", "[1]", "it is a value of type list, no object", "delete this file"),
        ("start.json", "{}", "it lacks 'before'", "delete this file"),
        (
            "start.json",
            '{"before": [], "seconds": 2}',
            "its before is a value of type list, no object",
            "delete this file",
        ),
        ("start.json", '{"before": {}, "seconds": 2}', "its before lacks 'rouge'", "delete this file"),
        ("start.json", '{"before": {"rouge": true}, "seconds": 2}', "its rouge is True, no number", "delete this file"),
        ("start.json", '{"before": {"rouge": "1"}, "seconds": 2}', "its rouge is '1', no number", "delete this file"),
        ("report.json", "", "not JSON", "delete this file"),
        ("report.json", '{"before": 1}', "lacks 'after'", "delete this file"),
        ("checkpoint.pt", "garbage", "torch cannot load it", "delete this file"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, name, content, reason, advice):
    run = start(tmp_path)
    run.save_beginning({"before": {"rouge": 1}, "seconds": 2})
    run.save_checkpoint({"step": 1})
    (tmp_path / name).write_text(content)
    forms = {"beginning": {"before": {"rouge": float}, "seconds": float}, "report": {"before": float, "after": float}}
    with pytest.raises(UserError) as caught:
        run = Run(tmp_path, {}, resume=True, **forms)
        assert run.beginning and run.load_checkpoint()
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: ") and reason in message and advice in message
    assert "weights_only" not in message
    if "delete this file" in advice:
        (tmp_path / name).unlink()
        run = Run(tmp_path, {}, resume=True)
        assert (run.beginning is None) == (name == "start.json")
        assert (run.load_checkpoint() is None) == (name == "checkpoint.pt")


def test_a_run_of_another_version(tmp_path):
    start(tmp_path)
    (tmp_path / "config.json").write_text('{"pmc_fast_run": 1, "options": {}}')
    with pytest.raises(UserError, match=f"^{tmp_path}: .* run of another version of pmc-fast; choose another --out"):
        Run(tmp_path, {}, resume=True)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=repr,
)
def test_a_checkpoint_that_finds_no_room_is_not_damaged(error, tmp_path, monkeypatch):
    def load(*args, **options):
        raise error

    run = start(tmp_path)
    run.save_checkpoint({"step": 1})
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(type(error)) as caught:
        run.load_checkpoint()
    assert caught.value is error


def test_a_checkpoint_that_cannot_be_read(tmp_path, monkeypatch):
    def load(*args, **options):
        raise PermissionError(13, "Permission denied")

    run = start(tmp_path)
    run.save_checkpoint({"step": 1})
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(UserError, match="checkpoint.pt: cannot be read \\(Permission denied\\)"):
        run.load_checkpoint()


@pytest.mark.parametrize("state", [{"weight": torch.ones(2)}, {"step": True}, [1]], ids=repr)
def test_a_file_of_tensors_that_is_no_checkpoint(tmp_path, state):
    run = start(tmp_path)
    run.save_checkpoint(state)
    with pytest.raises(UserError, match="checkpoint.pt: .*no checkpoint"):
        run.load_checkpoint()


@pytest.mark.parametrize("name", ["start.json", "report.json", "checkpoint.pt", "metrics.jsonl"])
def test_a_folder_in_a_files_place(tmp_path, name):
    start(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name}: cannot be read \\(Is a directory\\)"):
        run = Run(tmp_path, {}, resume=True)
        assert run.beginning is None and run.load_checkpoint() is None


@pytest.mark.parametrize("line", [b"[1]", b'{"loss": 1}', b"\xff\xfe", b"{"])
def test_metrics_end_at_a_line_that_is_none(tmp_path, line):
    run = start(tmp_path)
    run.log({"step": 1})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line + b'\n{"step": 2}\n')
    assert run.metrics() == [{"step": 1}]


def test_files_are_what_they_hold(tmp_path, monkeypatch):
    for folder, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)

    def options(*paths):
        retain, *utility = map(file_option, paths)
        return {"retain": retain, "utility": {f"set{i}": file for i, file in enumerate(utility)}}

    start("other", utility={"file": file_option("a/rows.jsonl"), "sha256": file_option("a/rows.jsonl")})
    with pytest.raises(UserError, match="--utility sha256: c/rows.jsonl holds other text than a/rows.jsonl did"):
        named = {"file": file_option("a/rows.jsonl"), "sha256": file_option("c/rows.jsonl")}
        Run("other", {"utility": named}, resume=True)

    start("run", **options("a/rows.jsonl", "a/rows.jsonl"))
    assert Run("run", options(tmp_path / "b" / "rows.jsonl", "./a/rows.jsonl"), resume=True).resumed
    changed = options("c/rows.jsonl", "a/rows.jsonl", "b/rows.jsonl")
    (tmp_path / "a" / "rows.jsonl").write_text("three")
    changed["utility"]["set0"] = file_option("a/rows.jsonl")
    with pytest.raises(UserError) as caught:
        Run("run", changed, resume=True)
    _, told = str(caught.value).split("started with: ")
    assert told.split("; ") == [
        "--retain: c/rows.jsonl holds other text than a/rows.jsonl did",
        "--utility set0: a/rows.jsonl holds other text than then",
        "--utility set1 was not given, now b/rows.jsonl",
    ]


def test_a_run_of_another_command_is_no_change_of_options(tmp_path):
    start(tmp_path, command="finetune", epochs=1)
    with pytest.raises(UserError, match="a run of finetune, not of unlearn") as caught:
        Run(tmp_path, {"command": "unlearn", "epochs": 2}, resume=True)
    assert "epochs" not in str(caught.value)


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
            arguments[1].write(b"half a check")
        raise KeyboardInterrupt

    monkeypatch.setattr(*((torch, "save") if dies_in == "write" else ("os.replace",)), die)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint({"step": 2})
    monkeypatch.undo()
    resumed = start(tmp_path, resume=True)
    assert resumed.load_checkpoint() == {"step": 1}
    assert not list(tmp_path.glob(".tmp-*"))


def test_what_cannot_be_written_is_named_and_leaves_what_was_there(tmp_path, file_size_limit):
    run, state = start(tmp_path), {"step": 1, "weight": torch.arange(9.0)}
    run.save_checkpoint(state)
    run.log({"step": 1})
    run.save_beginning({"before": 1, "seconds": 2})
    model, tokenizer = make_model(), make_tokenizer()
    calls = {
        "checkpoint.pt": lambda: run.save_checkpoint({"step": 2, "weight": torch.ones(9999)}),
        "start.json": lambda: run.save_beginning({"before": "x" * 30000}),
        "metrics.jsonl": lambda: run.log({"step": 2, "x": "x" * 30000}),
        "model": lambda: run.save_model("model", model, tokenizer),
    }
    for name, call in calls.items():
        with file_size_limit(20000), pytest.raises(UserError) as caught:
            call()
        told = str(caught.value)
        assert (
            told.startswith(f"{tmp_path / name}: cannot be written (") and "File too large" in told and "\n" not in told
        )
    assert not list(tmp_path.glob(".tmp-*")) and not (tmp_path / "model").exists()
    resumed = start(tmp_path, resume=True)
    assert resumed.beginning == {"before": 1, "seconds": 2}
    assert torch.equal(resumed.load_checkpoint()["weight"], state["weight"]) and resumed.metrics() == [{"step": 1}]


def test_a_model_takes_the_place_of_one_that_a_killed_process_left(tmp_path):
    run, tokenizer = start(tmp_path), make_tokenizer()
    for seed in (1, 2):
        model = make_model(seed=seed)
        assert run.save_model("model", model, tokenizer) == tmp_path / "model"
    held = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(held[name], value) for name, value in model.state_dict().items())
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_state_that_torch_cannot_save_is_no_matter_of_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="^a bug$"):
        start(tmp_path).save_checkpoint({"step": 1})


def test_finish_leaves_the_report_and_no_checkpoint(tmp_path):
    run = start(tmp_path)
    assert run.report is None
    run.save_checkpoint({"step": 1})
    run.finish({"before": 0.5, "after": 1.5})
    assert start(tmp_path, resume=True).report == {"before": 0.5, "after": 1.5}
    assert not (tmp_path / "checkpoint.pt").exists()
