"""Hub names: a model in the hub's local cache loads as its folder does, and what is not there is said in a line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import make_model, make_tokenizer

from pmc_fast.data import QA, write_jsonl
from pmc_fast.loading import load_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub cache with org/whole, org/bare without weights and org/mute without a tokenizer; a data file beside it."""
    cache = tmp_path_factory.mktemp("hub")
    for name in ("whole", "bare", "mute"):
        (cache / f"models--org--{name}" / "refs").mkdir(parents=True)
        (cache / f"models--org--{name}" / "refs" / "main").write_text(COMMIT)
        make_model().save_pretrained(snapshot(cache, name))
        make_tokenizer().save_pretrained(snapshot(cache, name))
    (snapshot(cache, "bare") / "model.safetensors").unlink()
    for path in snapshot(cache, "mute").glob("token*"):
        path.unlink()
    write_jsonl(cache / "rows.jsonl", [QA(f"Who is {c}?", f"It is {c}.") for c in "abc"])
    return cache


def snapshot(cache, name):
    return cache / f"models--org--{name}" / "snapshots" / COMMIT


def offline(hub, code, *words):
    """Python in a process of its own, since the hub's settings are read when it is imported."""
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)


def evaluate(hub, name, out):
    sets = ["--forget", str(hub / "rows.jsonl"), "--retain", str(hub / "rows.jsonl")]
    words = ["evaluate", "--model", name, *sets, "--evaluation-tokens", "4", "--device", "cpu", "--json", str(out)]
    return offline(hub, "import sys; from pmc_fast.cli import main; sys.exit(main())", *words)


def test_a_hub_name_loads_as_its_folder_does(hub, tmp_path):
    code = """
import sys
from pmc_fast.loading import load_model
model, tokenizer = load_model("org/whole")
model.save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
"""
    done = offline(hub, code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    (by_name, its_tokenizer), (by_folder, tokenizer) = load_model(tmp_path), load_model(snapshot(hub, "whole"))
    weights = by_folder.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in by_name.state_dict().items())
    assert its_tokenizer("Who is a?").input_ids == tokenizer("Who is a?").input_ids


def test_the_command_line_takes_a_hub_name(hub, tmp_path):
    done = evaluate(hub, "org/whole", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert "utility" in json.loads((tmp_path / "out.json").read_text())


@pytest.mark.parametrize(
    "name, lacks",
    [("org/absent", "tokenizer"), ("absent", "tokenizer"), ("org/mute", "tokenizer"), ("org/bare", "model")],
)
def test_what_the_hub_does_not_have_is_said(hub, name, lacks, tmp_path):
    done = evaluate(hub, name, tmp_path / "out.json")
    assert done.returncode == 2 and not (tmp_path / "out.json").exists()
    assert done.stderr.startswith(f"pmc-fast evaluate: {name}: the {lacks} cannot be loaded: ")
    assert "Traceback" not in done.stderr
