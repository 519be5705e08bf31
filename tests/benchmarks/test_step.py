"""`python -m benchmarks step` measures what it says, refuses what it cannot, and writes its schema."""

import argparse
import json

import pytest
import torch

from benchmarks import step
from benchmarks.__main__ import main
from benchmarks.bench import Wrong
from benchmarks.step import Turn
from pmc_fast.flops import FORMULAS

PARTS = {"sample_s", "score_s", "train_s", "total_s", "sampled_tokens", "peak_bytes"}
RATIOS = {"sample_per_token", "train", "total_at_equal_tokens"}
SMALL = ["step", "--batch-size", "2", "--num-samples", "3", "--max-length", "44", "--repeats", "2"]


def test_step_writes_its_schema(tmp_path, capsys, rng_seed):
    out = tmp_path / "step.json"
    assert main([*SMALL, "--seed", str(rng_seed), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["schema"] == step.SCHEMA
    for contestant in ("published", "pmc_fast", "pmc_fast_pruned"):
        medians = result[contestant]
        assert set(medians) == PARTS | {"decoded_tokens"}
        assert all(medians[name] > 0 for name in PARTS - {"peak_bytes"})
        assert medians["sample_s"] + medians["score_s"] + medians["train_s"] == pytest.approx(
            medians["total_s"], rel=0.2
        )
        assert isinstance(medians["sampled_tokens"], int) and 6 <= medians["sampled_tokens"] <= 6 * 43
        turns = result["turns"][contestant]
        assert len(turns) == 2
        for name in PARTS - {"peak_bytes"}:
            low, high = result["spread"][contestant][name]
            assert min(turn[name] for turn in turns) <= low <= high <= max(turn[name] for turn in turns)
        assert turns[0]["sampled_tokens"] == turns[1]["sampled_tokens"]  # every turn finds the same weights and seed
    assert set(result["ratio"]) == set(result["spread"]["ratio"]) == RATIOS | {"sample_per_pick_pruned"}
    assert result["published"]["decoded_tokens"] is None
    assert 0 < result["pmc_fast"]["decoded_tokens"] < result["pmc_fast"]["sampled_tokens"]
    assert result["pmc_fast_pruned"]["sampled_tokens"] <= result["pmc_fast"]["sampled_tokens"]
    assert result["environment"]["seed"] == rng_seed
    assert {"cpu", "isa", "threads", "versions", "commit", "device"} <= set(result["environment"])
    assert result["config"]["num_samples"] == 3 and result["config"]["top_k"] == 50
    assert result["agreement"]["loss_error"] < 1e-4
    printed = capsys.readouterr().out
    assert f"{result['ratio']['train']:.2f}x" in printed
    assert 0 < result["train_share_of_limit"] < 1
    assert result["train_flops"] == pytest.approx(
        result["train_share_of_limit"] * result["limits"]["flops_per_s"]["float32"] * result["pmc_fast"]["train_s"]
    )
    assert f"{result['train_share_of_limit']:.0%}" in printed


def test_training_counts_the_products_of_layers_and_head(monkeypatch, rng_seed):
    for op in (torch.ops.pmc_fast.packed_attention, torch.ops.pmc_fast.packed_attention_backward):
        monkeypatch.setitem(FORMULAS, op, lambda *args, out_shape: 0)
    options = argparse.Namespace(
        model=None, forget=None, retain=None, batch_size=2, num_samples=1, max_length=44, dtype="float32", seed=rng_seed
    )
    task = step.load(options, torch.device("cpu"))
    ours = step.PmcFast(task)
    ours.turn()
    tokens = ours._pmc.stats["trained_tokens"]
    layers = {name: p.numel() for name, p in task.model.named_parameters() if p.dim() == 2 and "layers" in name}
    last = f"layers.{task.model.config.num_hidden_layers - 1}."
    # What follows the last layer's attention and the head are asked of labels alone.
    of_labels = sum(size for name, size in layers.items() if last in name and ("o_proj" in name or "mlp" in name))
    head = task.model.get_output_embeddings().weight.numel()
    labels = (ours.train_flops() - 6 * (sum(layers.values()) - of_labels) * tokens) / (6 * (head + of_labels))
    assert labels == int(labels) and 4 <= labels < tokens  # four answers of a token at least


def test_ratios_compare_time_per_sampled_token():
    published = {"sample_s": 40.0, "score_s": 0.5, "train_s": 30.0, "total_s": 70.5, "sampled_tokens": 2000}
    ours = {"sample_s": 5.0, "score_s": 0.1, "train_s": 10.0, "total_s": 15.1, "sampled_tokens": 1000}
    assert step.ratios(published, ours) == pytest.approx(
        {"sample_per_token": 4.0, "train": 3.0, "total_at_equal_tokens": 70.5 / (10.0 + 0.1 + 10.0)}
    )


def test_summary_takes_medians():
    turns = [Turn(s, 0.1, 2 * s, 3 * s + 0.1, 10, 9, None) for s in (3.0, 1.0, 2.0)]
    result = step.summary({"published": turns, "pmc_fast": turns})
    assert result["published"]["sample_s"] == 2.0 and result["published"]["peak_bytes"] is None
    assert result["spread"]["published"]["sample_s"] == pytest.approx([1.4, 2.6])
    assert result["ratio"] == pytest.approx({name: 1.0 for name in RATIOS})


class Fake:
    """A contestant whose loss is `scale` times the sum of the weights' squares."""

    def __init__(self, model, references, scale=1.0):
        self.model, self.references, self.scale = model, references, scale

    def collapse_gradients(self, answers):
        loss = self.scale * self.model.weight.square().sum()
        loss.backward()
        return loss.item()


@pytest.mark.parametrize(
    "ours, refused",
    [
        ({}, None),
        ({"references": ["a", "b", "?"]}, None),
        ({"references": ["a", "?", "?"]}, "1 of 3 greedy answers"),
        ({"scale": 1.01}, "losses differ by 1.0e-02"),
    ],
)
def test_nothing_is_timed_unless_both_compute_the_same(ours, refused, rng_seed):
    torch.manual_seed(rng_seed)
    model = torch.nn.Linear(5, 3, bias=False)
    task = step.Task(model, None, [], [], None, torch.device("cpu"))
    references = ["a", "b", "c"]
    contestants = {
        "published": Fake(model, references),
        "pmc_fast": Fake(model, **{"references": references, **ours}),
    }
    if refused is None:
        assert step.check(task, contestants)["gradient_error"] < 1e-6
        assert model.weight.grad is None
    else:
        with pytest.raises(Wrong, match=refused):
            step.check(task, contestants)


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--model", "m"], "--forget, --retain: missing"),
        (["--batch-size", "0"], "--batch-size: got 0"),
        (["--batch-size", "1000"], "--forget: got 48 rows"),
        (["--num-samples", "0"], "num_samples: got 0"),
        (["--max-length", "9"], "--max-length: got 9"),
        (["--json", "no/such/folder/out.json"], "--json: "),
        (["--device", "toaster"], "device: got 'toaster'"),
        (["--model", "no/such/model", "--forget", "{rows}", "--retain", "{rows}"], "no/such/model"),
        (["--model", "m", "--forget", "{bad}", "--retain", "{rows}"], "bad.jsonl:2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, complaint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    row = json.dumps({"question": "Who?", "answer": "Nobody."}) + "\n"
    (tmp_path / "rows.jsonl").write_text(row * 9)
    (tmp_path / "bad.jsonl").write_text(row + "{\n")
    files = {"rows": tmp_path / "rows.jsonl", "bad": tmp_path / "bad.jsonl"}
    assert main(["step", *(option.format(**files) for option in options)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and complaint in said
    assert "Traceback" not in said


def test_unknown_command_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["stp"])
    assert stop.value.code == 2
    assert "step" in capsys.readouterr().err


def test_without_the_compiled_module_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr("pmc_fast.backend.missing_library", lambda: "it is hidden by the source tree")
    assert main(SMALL) == 2
    assert "it is hidden by the source tree" in capsys.readouterr().err


def test_on_a_gpu_there_is_something_to_measure_without_the_compiled_module(monkeypatch, capsys):
    monkeypatch.setattr("pmc_fast.backend.missing_library", lambda: "it is hidden by the source tree")
    monkeypatch.setattr("pmc_fast.loading.choose_device", torch.device)
    monkeypatch.setattr(step, "run", lambda args, device: print("measured on", device))
    assert main([*SMALL, "--device", "cuda"]) == 0
    assert "measured on cuda" in capsys.readouterr().out
