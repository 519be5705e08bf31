"""`python -m benchmarks train` checks before it times, and writes its schema."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import report, train
from benchmarks.__main__ import main
from benchmarks.bench import OURS
from benchmarks.limits import Limits
from pmc_fast import packed_layers


def test_train_writes_its_schema(tmp_path, capsys, rng_seed):
    out = tmp_path / "train.json"
    assert main(["train", "--batch-size", "3", "--repeats", "2", "--seed", str(rng_seed), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["schema"] == train.SCHEMA and result["config"]["batch_size"] == 3
    ours, modules = result["rows"]
    assert (ours["contestant"], modules["contestant"]) == (OURS, train.MODULES)
    assert ours["evidence"] == "layers by native" and modules["evidence"].startswith("layers by modules, loss off by")
    assert ours["ratio"] == 1 and modules["ratio"] > 0
    # The last layer's products after attention see fewer rows.
    assert 0 < ours["flops"] < modules["flops"] and ours["share_of_limit"] > 0
    assert len(report.sections(out)) == 2  # the table, and the limits
    assert train.MODULES in capsys.readouterr().out


@pytest.fixture
def case(task):
    return train.Case(task)


@pytest.mark.parametrize("fault", ["loss", "gradients"])
def test_nothing_wrong_is_timed(fault, case, monkeypatch):
    forward = packed_layers._forward

    def wrong(*args):
        hidden = forward(*args)
        return 1.01 * hidden if fault == "loss" else hidden + 0.01 * (hidden - hidden.detach())

    case.contestants()[OURS]()  # the layers were looked at
    case.clear()
    monkeypatch.setattr(packed_layers, "_forward", wrong)
    ours, modules = train.measure(case, 1, Limits(1e9, {"float32": 1e9}))
    assert ours.right and ours.seconds and modules.right is False and modules.seconds is None
    assert "gradients by" in modules.evidence
    assert all(parameter.grad is None for parameter in case.task.model.parameters())


def test_modules_are_not_timed_as_layers(case, monkeypatch):
    monkeypatch.setattr(case, "contestants", lambda: {name: lambda: case._pass({}) for name in (OURS, train.LAYERS)})
    ours, layers = train.measure(case, 1, Limits(1e9, {"float32": 1e9}))
    assert ours.right and layers.right is False and layers.seconds is None
    assert layers.evidence == "layers by modules: its layers do not take this model"


def test_the_way_is_put_back(case):
    held = packed_layers.KERNELS
    loss = case.contestants()[train.MODULES]()
    assert packed_layers.KERNELS is held and case.lm.packed_by == "modules" and loss > 0
    assert any(gradient is not None for gradient in case.gradients())


def test_on_a_gpu_the_layers_are_the_others(case, monkeypatch):
    monkeypatch.setattr(case, "task", replace(case.task, device=torch.device("cuda")))
    assert list(case.contestants()) == [OURS, train.LAYERS]
