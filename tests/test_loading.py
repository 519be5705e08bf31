"""Hub names: a model in the hub's local cache loads as its folder does, and what is not there is said in a line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import make_model, make_tokenizer

from pmc_fast import UserError
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
    torch.save(make_model().state_dict(), snapshot(cache, "bare") / "pytorch_model.bin")  # that is not read
    for path in snapshot(cache, "mute").glob("token*"):
        path.unlink()
    write_jsonl(cache / "rows.jsonl", [QA(f"Who is {c}?", f"It is {c}.") for c in "abc"])
    return cache


def snapshot(cache, name):
    return cache / f"models--org--{name}" / "snapshots" / COMMIT


NAMES = ("org/whole", "org/absent", "absent", "org/mute", "org/bare")

# Takes each name as the command line does, and keeps what was printed on the process's own stderr.
TAKE_NAMES = """
import os, sys
from pathlib import Path
from pmc_fast.cli import main
from pmc_fast.loading import load_model

rows, out, *names = sys.argv[1:]
for name in names:
    folder = Path(out, name)
    folder.mkdir(parents=True)
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    words = ["evaluate", "--model", name, "--forget", rows, "--retain", rows, "--evaluation-tokens", "4"]
    code = main([*words, "--device", "cpu", "--json", str(folder / "out.json")])
    sys.stderr.flush()
    (folder / "code").write_text(str(code))
model, tokenizer = load_model("org/whole")
model.save_pretrained(Path(out, "saved"))
tokenizer.save_pretrained(Path(out, "saved"))
"""


@pytest.fixture(scope="module")
def offline(hub, tmp_path_factory):
    """What became of every name, in a process of its own, since the hub's settings are read when it is imported.

    It runs where an owner of models has a folder.
    """
    out, here = (tmp_path_factory.mktemp(name) for name in ("out", "here"))
    (here / "org" / "other").mkdir(parents=True)
    command = [sys.executable, "-c", TAKE_NAMES, str(hub / "rows.jsonl"), str(out), *NAMES]
    subprocess.run(command, env={**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}, cwd=here)
    return out


def test_a_hub_name_loads_as_its_folder_does(hub, offline):
    by_name, its_tokenizer = load_model(offline / "saved")
    by_folder, tokenizer = load_model(snapshot(hub, "whole"))
    weights = by_folder.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in by_name.state_dict().items())
    assert its_tokenizer("Who is a?").input_ids == tokenizer("Who is a?").input_ids


def test_the_command_line_takes_a_hub_name(offline):
    assert (offline / "org/whole/code").read_text() == "0"
    assert "utility" in json.loads((offline / "org/whole/out.json").read_text())


@pytest.mark.parametrize(
    "name, lacks",
    [("org/absent", "tokenizer"), ("absent", "tokenizer"), ("org/mute", "tokenizer"), ("org/bare", "model")],
)
def test_what_the_hub_does_not_have_is_said(offline, name, lacks):
    assert (offline / name / "code").read_text() == "2" and not (offline / name / "out.json").exists()
    said = (offline / name / "stderr").read_text()
    assert said.startswith(f"pmc-fast evaluate: {name}: the {lacks} cannot be loaded: ")
    assert ("there is no such folder" in said) == (lacks == "tokenizer")
    assert "Traceback" not in said


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_weights_are_of_the_dtype_asked_for(dtype, tmp_path):
    """Whatever they are saved as; float32 by default."""
    saved = tmp_path / "saved"
    make_model().to(torch.float32 if dtype == "bfloat16" else torch.bfloat16).save_pretrained(saved)
    make_tokenizer().save_pretrained(saved)
    model, _ = load_model(saved, **({"dtype": dtype} if dtype else {}))
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype or "float32")}


# Says that it was run, then is a class of transformers under another name.
CODE = """
from pathlib import Path
from transformers import {base}
Path({ran!r}).touch()
class Own({base}):
    pass
"""


@pytest.mark.parametrize("trusted", [True, False, None], ids=["trusted", "not trusted", "by default"])
@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_code_that_comes_with_a_model_runs_if_it_is_trusted(what, trusted, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder, ran = tmp_path / f"own_{what}_{trusted}", tmp_path / "ran"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    file, key, base, reference = {
        "model": ("config.json", "AutoModelForCausalLM", "LlamaForCausalLM", "own.Own"),
        "tokenizer": ("tokenizer_config.json", "AutoTokenizer", "PreTrainedTokenizerFast", [None, "own.Own"]),
    }[what]
    (folder / "own.py").write_text(CODE.format(base=base, ran=str(ran)))
    settings = json.loads((folder / file).read_text())
    settings |= {"auto_map": {key: reference}} | ({"tokenizer_class": "Own"} if what == "tokenizer" else {})
    (folder / file).write_text(json.dumps(settings))
    given = {} if trusted is None else {"trust_remote_code": trusted}
    try:
        loaded = load_model(folder, **given)[what == "tokenizer"]
        assert (type(loaded).__name__ == "Own") == bool(trusted)
    except UserError:
        assert not trusted
    assert ran.exists() == bool(trusted)
