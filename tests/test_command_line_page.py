"""docs/command-line.md names every file that a run leaves, every key of its report and every field of its metrics."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

from pmc_fast import cli
from pmc_fast.data import QA, write_jsonl
from pmc_fast.demo import run as demo

PAGE = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text()
COMMANDS = cli.make_parser()._subparsers._group_actions[0].choices


@pytest.fixture(scope="module")
def folder(tmp_path_factory, module_seed):
    folder = tmp_path_factory.mktemp("runs")
    make_model(seed=module_seed).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for name in ("forget", "retain", "world"):
        write_jsonl(folder / f"{name}.jsonl", [QA(f"{name} {c}?", f"It is {c}.") for c in "abc"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(demo, "SIZES", {"people": 2, "forget_people": 1, "places": 2})
        patch.setattr(demo, "LEARNING", {**demo.LEARNING, "epochs": 1})
        patch.setattr(demo, "UNLEARNING", {**demo.UNLEARNING, "epochs": 1, "num_samples": 2, "max_new_tokens": 4})
        patch.setattr(demo, "_ANSWER_TOKENS", 4)
        quick = "--model model --device cpu --evaluation-tokens 4"
        sets = "--forget forget.jsonl --paraphrased forget.jsonl --retain retain.jsonl --utility world.jsonl"
        for command in (
            "demo --out demo",
            f"finetune {quick} --data retain.jsonl --out finetune --epochs 1",
            f"unlearn {quick} {sets} --out unlearn --epochs 1 --num-samples 2 --max-new-tokens 4",
            f"evaluate {quick} {sets} --leakage 2 --json evaluate.json",
        ):
            assert cli.main(command.split()) == 0
    return folder


@pytest.fixture
def runs(folder, module_seed):
    """A folder that holds a run of each command, and evaluate's figures, the same for all tests here."""
    print(f"PMC_FAST_TEST_SEED={module_seed}")
    return folder


def test_a_failure_shows_what_made_the_model(capsys, runs):
    seed = int(capsys.readouterr().out.splitlines()[-1].removeprefix("PMC_FAST_TEST_SEED="))
    made = make_model(seed=seed).state_dict()
    assert all(torch.equal(made[name], held) for name, held in load_file(runs / "model" / "model.safetensors").items())


def table(title):
    """What the page's table of that title names in its first column, and the text of each row."""
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {title} |")) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return {
        name.rstrip("/"): line for line in lines[start:end] for name in re.findall("`([^`]+)`", line.split(" | ")[0])
    }


def report(runs, command):
    return json.loads((runs / command / "report.json").read_text())


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_files(runs):
    written = names(runs / "finetune") | names(runs / "unlearn")
    of_a_run = table("file of `finetune`, `unlearn`")
    assert of_a_run.keys() == written | {"checkpoint.pt"}
    assert names(runs / "unlearn") - names(runs / "finetune") == {"ledger.json"}
    of_the_demo = table("file of `demo`")
    assert of_the_demo.keys() == names(runs / "demo")
    assert all(f"`{name}`" in of_the_demo["data"] for name in names(runs / "demo" / "data"))
    parts = names(runs / "demo" / "learning") | names(runs / "demo" / "unlearning")
    assert all(f"`{name}`" in of_the_demo["learning"] for name in parts)
    assert names(runs / "demo" / "unlearning") - names(runs / "demo" / "learning") == {"start.json"}


def test_the_report(runs):
    reports = [report(runs, command) for command in ("finetune", "unlearn", "demo")]
    keys = table("key")
    assert keys.keys() == set().union(*reports)
    assert set(re.findall(r"`(\w+)`", keys["environment"])) - {"environment", "gpu"} == reports[0]["environment"].keys()
    assert all(f"`{name}`" in keys["examples"] for example in reports[2]["examples"] for name in example)
    assert all(f"`{name}`" in keys["config"] for name in reports[2]["config"] if name != "command")
    assert table("seconds").keys() == set().union(*(one["timing"] for one in reports))
    assert reports[0]["timing"].keys() == {"train", "checkpoint", "evaluate", "last_process"}
    measured = [one[when] for one in reports for when in ("before", "after")]
    measured.append(json.loads((runs / "evaluate.json").read_text()))
    assert table("figure").keys() == set().union(*measured)


def test_the_metrics(runs):
    fields = table("field")
    unlearnt, learnt = (records(runs / command / "metrics.jsonl") for command in ("unlearn", "finetune"))
    assert unlearnt and learnt
    of_finetune = {name for name, line in fields.items() if "°" in line.split(" | ")[0]}
    assert all(record.keys() == fields.keys() for record in unlearnt)
    assert all(record.keys() == of_finetune for record in learnt)
    marks = dict(re.findall(r"`(\w+)`( °)?", fields["seconds"].split(" | ")[1]))
    assert all(record["seconds"].keys() == marks.keys() for record in unlearnt)
    assert all(record["seconds"].keys() == {name for name in marks if marks[name]} for record in learnt)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name):
    actions = COMMANDS[name]._actions
    assert len(actions) > 1 and all(action.help for action in actions)
    told = COMMANDS[name].format_help()
    assert all(option in told for action in actions for option in action.option_strings)
    assert ("preset" in told) == any(action.dest == "preset" for action in actions)
