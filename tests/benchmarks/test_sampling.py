"""`python -m benchmarks sampling` checks before it times, and writes its schema."""

import json

import pytest
import torch

from benchmarks import report, sampling
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


def test_in_16_bits_only_first_tokens_must_agree(case):
    ours = case.contestants()[OURS]()
    later, first = (sampling.Drawn(ours.tokens.clone(), ours.lengths, "", 0) for _ in range(2))
    later.tokens[:, 1] += 1
    first.tokens[:, 0] += 1
    assert "100% of the first tokens" in sampling.agreement(case, sampling.MODULES, later, ours, torch.bfloat16)
    for drawn, dtype in ((later, torch.float32), (first, torch.bfloat16)):
        with pytest.raises(Wrong, match="only 0%"):
            sampling.agreement(case, sampling.MODULES, drawn, ours, dtype)
