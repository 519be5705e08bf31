"""`python -m benchmarks run` runs both fairly, from the same start, and writes its schema as it goes."""

import argparse
import json
import math
from dataclasses import replace

import pytest
import torch
from tiny import make_model, make_tokenizer
from tqdm import tqdm

from benchmarks import run
from benchmarks.__main__ import main
from benchmarks.run import Record
from pmc_fast.config import PMCConfig
from pmc_fast.data import QA, write_jsonl
from pmc_fast.demo import run as demo

PARTS = {"seconds", "before", "after", "curve", "area", "peak_bytes", "sampled_tokens"}
CONTESTANTS = ("published", "pmc_fast")


@pytest.fixture
def small(monkeypatch):
    """The demo at a size that takes seconds: enough to learn some words, too little to learn any fact."""
    monkeypatch.setattr(demo, "SIZES", {"people": 3, "forget_people": 1, "places": 2})
    monkeypatch.setattr(demo, "LEARNING", {**demo.LEARNING, "epochs": 12, "warmup_epochs": 1.0})
    monkeypatch.setattr(demo, "UNLEARNING", {**demo.UNLEARNING, "epochs": 3, "num_samples": 3, "max_new_tokens": 8})


def parsed(*options):
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    args = parser.parse_args(options)
    args.seed = 0
    return args


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for one in value for number in numbers(one)]
    return [value]


def test_run_writes_its_schema_and_prints_a_table(small, tmp_path, capsys, monkeypatch, rng_seed):
    written = []
    write = run.results.write

    def spy(path, schema, content):
        written.append(json.loads(json.dumps(content)))
        write(path, schema, content)

    monkeypatch.setattr(run.results, "write", spy)
    out = tmp_path / "run.json"
    options = ["--evaluate-every", "2", "--evaluation-rows", "5", "--batch-size", "4", "--accumulation", "2"]
    assert main(["run", *options, "--seed", str(rng_seed), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["schema"] == "pmc_fast.benchmarks.run/1"
    for name in CONTESTANTS:
        found = result[name]
        assert set(found) == PARTS
        assert all(math.isfinite(number) for number in numbers({**found, "peak_bytes": 0}))
        assert [point["epoch"] for point in found["curve"]] == [0, 2, 3]
        times = [point["seconds"] for point in found["curve"]]
        assert times[0] == 0 and times == sorted(set(times)) and times[-1] == found["seconds"]
        for measure in ("unlearn_quality", "utility"):
            assert found["before"][measure] == found["curve"][0][measure]
            assert found["after"][measure] == found["curve"][-1][measure]
        assert found["sampled_tokens"] > 0
    published, ours = (result[name] for name in CONTESTANTS)
    assert published["before"] == ours["before"]
    assert result["ratio"]["seconds"] == published["seconds"] / ours["seconds"]
    assert result["ratio"]["area"] == pytest.approx(ours["area"] / published["area"])
    assert result["environment"]["seed"] == result["config"]["seed"] == rng_seed
    assert result["config"]["accumulation"] == 2 and result["config"]["num_samples"] == 3
    assert result["command"].startswith("python -m benchmarks run ")
    assert f"--seed {rng_seed}" in result["command"] and "--evaluate-every 2" in result["command"]
    printed = capsys.readouterr().out
    for text in ("unlearn quality after", "sampled tokens", f"{result['ratio']['seconds']:.2f}x"):
        assert text in printed

    # after each of the three evaluations and at the end of each run
    assert [content["published"] is None for content in written] == [True] * 4 + [False] * 4
    assert len(written[1]["pmc_fast"]["curve"]) == 2 and written[1]["ratio"] is None
    assert written[4]["pmc_fast"] == written[3]["pmc_fast"]


def test_both_get_the_same_weights_micro_batches_and_learning_rates(small, monkeypatch):
    started, seen, rates = [], {}, {}

    def recorded(kind):
        class Recorded(kind):
            def __init__(self, task):
                started.append({name: value.clone() for name, value in task.model.state_dict().items()})
                assert task.model.training and task.model.config._attn_implementation == task.attention
                super().__init__(task)

            def gradients(self, indices, retain):
                seen.setdefault(kind, []).append((indices, retain))
                rates.setdefault(kind, []).append(self.optimizer.param_groups[0]["lr"])
                return super().gradients(indices, retain)

        return Recorded

    kinds = run._PmcFast, run._Published
    for kind in kinds:
        monkeypatch.setattr(run, kind.__name__, recorded(kind))
    assert main(["run", "--batch-size", "2", "--accumulation", "2", "--epochs", "2", "--evaluation-rows", "2"]) == 0
    first, second = started
    assert all(torch.equal(first[name], second[name]) for name in first)
    ours, theirs = kinds
    assert seen[ours] == seen[theirs] and rates[ours] == rates[theirs]
    asked = [index for indices, _ in seen[ours] for index in indices]
    assert sorted(asked) == sorted([*range(len(asked) // 2)] * 2)
    steps = len(set(rates[ours]))
    assert max(rates[ours]) == demo.UNLEARNING["learning_rate"] and steps > 1


@pytest.mark.parametrize("kind", [run._PmcFast, run._Published])
def test_the_outcome_does_not_depend_on_the_order(small, kind):
    task = run.load(parsed("--evaluation-rows", "3", "--epochs", "2"), torch.device("cpu"))
    ends = []
    for turn in (kind, run._PmcFast, kind):
        record = Record()
        run.take_run(task, "it", turn, record, 2, tqdm(disable=True), lambda: None)
        ends.append([record.sampled_tokens, *([point["unlearn_quality"], point["utility"]] for point in record.curve)])
    assert ends[0] == ends[2]


def test_both_unlearn(monkeypatch):
    monkeypatch.setattr(demo, "SIZES", {"people": 4, "forget_people": 1, "places": 2})
    monkeypatch.setattr(demo, "LEARNING", {**demo.LEARNING, "epochs": 40, "warmup_epochs": 4.0})
    task = run.load(parsed("--epochs", "12", "--num-samples", "10"), torch.device("cpu"))
    for kind in (run._PmcFast, run._Published):
        record = Record()
        run.take_run(task, "it", kind, record, 12, tqdm(disable=True), lambda: None)
        before, after = record.curve
        assert before["unlearn_quality"] < 60 and before["utility"] > 80
        assert after["unlearn_quality"] > before["unlearn_quality"] + 20 and after["utility"] > 60


def test_a_named_model_runs_as_published(tmp_path, rng_seed):
    make_model(seed=rng_seed % 1000).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [QA(f"Who is {name}?", f"{name} is {name}.") for name in ("Ada", "Bo", "Cy")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    files = [
        "--model",
        str(tmp_path / "model"),
        *(f"--{name}={tmp_path / 'rows.jsonl'}" for name in ("forget", "retain")),
    ]
    out = tmp_path / "run.json"
    options = ["--epochs", "1", "--num-samples", "2", "--max-length", "40", "--dtype", "bfloat16"]
    assert main(["run", *files, *options, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    config = result["config"]
    assert config["max_length"] == 40 and config["max_new_tokens"] is None and config["dtype"] == "bfloat16"
    published = PMCConfig.published("llama-3.2-3b")
    for name in ("temperature", "batch_size", "accumulation", "learning_rate", "retain_weight", "min_words"):
        assert config[name] == getattr(published, name)
    assert [point["epoch"] for point in result["published"]["curve"]] == [0, 1]


def curve(*points):
    return [{"seconds": seconds, "unlearn_quality": quality, "utility": 90.0} for seconds, quality in points]


@pytest.mark.parametrize(
    "points, until, want",
    [
        ([(0.0, 40.0)], 0.0, 40.0),
        ([(0.0, 40.0)], 10.0, 40.0),
        ([(0.0, 0.0), (10.0, 100.0)], 10.0, 50.0),
        ([(0.0, 0.0), (10.0, 100.0)], 40.0, (500 + 3000) / 40),
        ([(0.0, 20.0), (2.0, 60.0), (10.0, 80.0)], 10.0, (80 + 560) / 10),
    ],
)
def test_area_is_the_mean_over_time(points, until, want):
    assert run.area(curve(*points), until) == pytest.approx(want)


def test_areas_reach_to_the_slower_one():
    def record(seconds, tokens, *points):
        made = [{"epoch": epoch, **point} for epoch, point in enumerate(curve(*points))]
        return Record(seconds, tokens, None, made)

    ours = record(10.0, 5, (0.0, 0.0), (10.0, 100.0))
    half = run.summary({"pmc_fast": ours})
    assert half["published"] is None and half["ratio"] is None and half["pmc_fast"]["area"] == pytest.approx(50)
    theirs = record(40.0, 7, (0.0, 0.0), (40.0, 100.0))
    whole = run.summary({"pmc_fast": ours, "published": theirs})
    assert whole["pmc_fast"]["area"] == pytest.approx(87.5) and whole["published"]["area"] == pytest.approx(50)
    assert whole["ratio"] == pytest.approx({"seconds": 4.0, "area": 1.75})
    flat = run.summary({"pmc_fast": ours, "published": record(40.0, 7, (0.0, 0.0), (40.0, 0.0))})
    assert flat["ratio"] == {"seconds": 4.0, "area": None}
    assert "4.00x" in run.table(flat)


def test_micro_batches_come_from_the_seed():
    config = PMCConfig(epochs=3, batch_size=4, seed=7)
    retain = [QA(str(number), "a") for number in range(5)]
    epochs = run.micro_batches(config, 10, retain)
    assert epochs == run.micro_batches(config, 10, retain)
    assert epochs != run.micro_batches(replace(config, seed=8), 10, retain)
    for batches in epochs:
        assert [len(indices) for indices, _ in batches] == [4, 4, 2]
        assert sorted(index for indices, _ in batches for index in indices) == list(range(10))
        assert all(len({row.question for row in rows}) == 4 for _, rows in batches)
    few = run.micro_batches(config, 10, retain[:2])
    assert all(len(rows) == 4 for batches in few for _, rows in batches)


def test_a_run_that_diverges_says_so(small, capsys):
    assert main(["run", "--learning-rate", "1e30", "--evaluation-rows", "2"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--model", "m"], "--forget, --retain: missing"),
        (["--epochs", "0"], "--epochs: got 0"),
        (["--batch-size", "0"], "--batch-size: got 0"),
        (["--accumulation", "-1"], "--accumulation: got -1"),
        (["--num-samples", "0"], "--num-samples: got 0"),
        (["--evaluate-every", "0"], "--evaluate-every: got 0"),
        (["--evaluation-rows", "0"], "--evaluation-rows: got 0"),
        (["--temperature", "0"], "--temperature: got 0"),
        (["--learning-rate", "nan"], "--learning-rate: got nan"),
        (["--max-length", "9"], "--max-length: got 9"),
        (["--seed", "-1"], "seed: got -1"),
        (["--json", "no/such/folder/out.json"], "--json: "),
        (["--model", "no/such/model", "--forget", "{rows}", "--retain", "{rows}"], "no/such/model"),
        (["--model", "m", "--forget", "{bad}", "--retain", "{rows}"], "bad.jsonl:2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_before_any_work(options, complaint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(run, "_learn", None)
    write_jsonl(tmp_path / "rows.jsonl", [QA("Who?", "Nobody.")] * 9)
    (tmp_path / "bad.jsonl").write_text('{"question": "Who?", "answer": "Nobody."}\n{\n')
    files = {"rows": tmp_path / "rows.jsonl", "bad": tmp_path / "bad.jsonl"}
    assert main(["run", *(option.format(**files) for option in options)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and complaint in said
    assert "Traceback" not in said
