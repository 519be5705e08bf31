"""`python -m benchmarks sampling` checks before it times, and writes its schema."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks import families, report, sampling
from benchmarks.__main__ import main
from benchmarks.bench import OURS, Wrong
from benchmarks.limits import Limits

SMALL = ["--batch-size", "3", "--num-samples", "4", "--max-length", "40"]


def test_sampling_writes_its_schema(tmp_path, capsys, rng_seed):
    out = tmp_path / "sampling.json"
    assert main(["sampling", *SMALL, "--repeats", "2", "--seed", str(rng_seed), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["schema"] == sampling.SCHEMA and result["config"]["num_samples"] == 4
    titles = [f"3 questions x 4 answers, {how}" for how in ("as PMC draws", "greedy")]
    assert [(row["title"], row["contestant"]) for row in result["rows"]] == [
        (title, name) for title in titles for name in (OURS, sampling.MODULES, sampling.GENERATE)
    ]
    for drawn, greedy in zip(result["rows"][:3], result["rows"][3:], strict=True):
        assert drawn["right"] and greedy["right"] and drawn["share_of_limit"] > 0
        for row in (drawn, greedy):
            assert row["ratio"] == 1 if row["contestant"] == OURS else row["ratio"] > 0
    assert "native" in result["rows"][0]["evidence"] and "modules" in result["rows"][1]["evidence"]
    assert result["rows"][3]["flops"] < result["rows"][0]["flops"] == result["rows"][1]["flops"]  # one text a question
    assert len(report.sections(out)) == 3  # two tables, and the limits
    assert sampling.GENERATE in capsys.readouterr().out


@pytest.fixture
def case(task):
    task.model.eval()
    return sampling.Case("a case", task, True)


@pytest.mark.parametrize("name", [sampling.MODULES, sampling.GENERATE])
def test_nothing_wrong_is_timed(name, case, monkeypatch):
    contestants = sampling.Case.contestants

    def spoiled(case):
        found = contestants(case)
        right = found[name]

        def wrong():
            drawn = right()
            drawn.tokens[:8] += 1
            return drawn

        return {**found, name: wrong}

    monkeypatch.setattr(sampling.Case, "contestants", spoiled)
    rows = {row.contestant: row for row in sampling.measure(case, 1, Limits(1e9, {"float32": 1e9}))}
    assert rows[name].right is False and rows[name].seconds is None and "33% of the answers" in rows[name].evidence
    assert all(row.right and row.seconds for other, row in rows.items() if other != name)


def test_on_a_gpu_calls_are_timed_too_that_find_the_graphs_of_the_one_before(case):
    assert sampling.KEPT not in case.contestants()
    object.__setattr__(case, "task", replace(case.task, device=torch.device("cuda")))
    found = case.contestants()
    assert [*found][-1] == sampling.KEPT  # other peaks of memory do not count what it keeps
    ours = found[OURS]()
    for _ in range(2):
        assert sampling.agreement(case, sampling.KEPT, found[sampling.KEPT](), ours, torch.float32).startswith(", 100%")


def test_in_16_bits_only_first_tokens_must_agree(case):
    ours = case.contestants()[OURS]()
    later, first = (sampling.Drawn(ours.tokens.clone(), ours.lengths, "", 0) for _ in range(2))
    later.tokens[:, 1] += 1
    first.tokens[:, 0] += 1
    assert "100% of the first tokens" in sampling.agreement(case, sampling.MODULES, later, ours, torch.bfloat16)
    for drawn, dtype in ((later, torch.float32), (first, torch.bfloat16)):
        with pytest.raises(Wrong, match="only 0%"):
            sampling.agreement(case, sampling.MODULES, drawn, ours, dtype)


@pytest.fixture
def small_families(monkeypatch):
    """A family that is known and one that is not, of a size for tests."""
    sizes = {"vocab_size": 1600, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    small = {"Known": "llama", "Unknown": "cohere"}
    made = {name: {"model_type": kind, "num_hidden_layers": 1, **sizes} for name, kind in small.items()}
    monkeypatch.setattr(families, "FAMILIES", made)


@pytest.mark.parametrize("command", ["sampling", "train"])
def test_families(command, small_families, tmp_path, capsys, rng_seed):
    out = tmp_path / "families.json"
    options = ["--batch-size", "2", "--num-samples", "4", "--max-length", "20", "--repeats", "2"]
    assert main([command, "--families", *options, "--seed", str(rng_seed), "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["title"].split(",")[0], row["contestant"], row["repeats"]) for row in rows] == [
        ("Known", OURS, 2),
        ("Known", sampling.MODULES, 1),
        ("Unknown", OURS, 2),
    ]
    assert all(row["right"] and row["share_of_limit"] > 0 and "1 layer" in row["title"] for row in rows)
    for row, way in zip(rows, ("native", "modules", "modules"), strict=True):
        assert way in row["evidence"]
    assert len(report.sections(out)) == 3  # two tables, and the limits
    assert main([command, "--families", "Known", "--model", "m"]) == 2
    assert "--families, --model: want one of them" in capsys.readouterr().err


def test_every_family_is_one_that_transformers_makes():
    for name, sizes in families.FAMILIES.items():
        config = CONFIG_MAPPING[sizes["model_type"]](**{k: v for k, v in sizes.items() if k != "model_type"})
        assert config.hidden_size % config.num_attention_heads == 0, name
        for size in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            assert getattr(config, size) == sizes[size], name


def test_only_the_experts_that_a_token_meets_count(case):
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING["mixtral"](
            vocab_size=50, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
        )
    )  # fmt: skip
    object.__setattr__(case, "task", replace(case.task, model=model))
    drawn = sampling.Drawn(torch.zeros(1, 3), torch.tensor([3]), "", 7)
    layer = 8 * 8 + 2 * 4 * 8 + 8 * 8 + 4 * 8 + 2 * (3 * 6 * 8)  # attention, router, two of the experts
    flops, moved = sampling._work(case, drawn)
    assert flops == 2 * (7 * (layer + 50 * 8) + int(case.inputs[1].sum()) * layer)
    assert moved == 3 * 4 * (layer + 2 * (3 * 6 * 8) + 50 * 8)
