"""`python -m benchmarks parallel` checks before it times, refuses what it cannot do, and writes its schema."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from benchmarks import parallel, report
from benchmarks.__main__ import main
from benchmarks.bench import OURS, Wrong


def test_parallel_writes_its_schema(tmp_path, capsys, rng_seed):
    out = tmp_path / "parallel.json"
    options = ["--divide", "16", "--repeats", "2", "--threads", "1", "--seed", str(rng_seed)]
    assert main(["parallel", *options, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["schema"] == parallel.SCHEMA
    assert result["config"] == {"ranks": 2, "threads_per_rank": 1, "repeats": 2}
    assert [row["contestant"] for row in result["rows"]] == [OURS, "pmc_fast.parallel, 2 ranks"] * 4
    for one, ours in zip(result["rows"][::2], result["rows"][1::2], strict=True):
        assert (one["op"], one["title"]) == (ours["op"], ours["title"]) and one["ratio"] == 1
        assert ours["ratio"] > 0
        assert "d_weight" in ours["evidence"] or ours["evidence"] == "the same tokens"
    assert len(report.sections(out)) == 4
    assert "pmc_fast.parallel, 2 ranks" in capsys.readouterr().out


def test_ratios_compare_within_turns(monkeypatch, rng_seed):
    seconds = [3.0, 1.0, 1.0, 6.0, 6.0, 2.0]  # the parts, the whole; the whole, the parts; the parts, the whole
    clock = iter([moment for taken in seconds for moment in (0.0, taken)])
    monkeypatch.setattr(parallel, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole, parts = parallel._measure(parallel.cases(16)[0], 0, 1, rng_seed, 3)
    finally:
        dist.destroy_process_group()
    assert (whole.seconds.median, parts.seconds.median) == (1.0, 6.0)
    assert (whole.ratio, parts.ratio) == (1.0, 3.0)


@pytest.mark.parametrize("case", parallel.cases(16), ids=lambda case: f"{case.op}, {case.about}")
def test_nothing_wrong_is_timed(case, monkeypatch, rng_seed):
    monkeypatch.setattr(parallel, "_most", float)
    shards = type("Shards", (), {"begin": 0, "end": 3})
    if case.op == "linear_sample":
        want = (torch.tensor([1, 2]),)
        wrong = (torch.tensor([1, 3]),)
    else:
        want = (torch.tensor(1.0), torch.randn(2, 3), torch.randn(3, 3))
        wrong = (*want[:2], want[2] + 0.1)
    assert parallel._agreement(case, want, want, shards)
    with pytest.raises(Wrong, match=case.op):
        parallel._agreement(case, want, wrong, shards)


@pytest.mark.parametrize(
    "options, complaint", [(["--ranks", "1"], "--ranks: got 1"), (["--divide", "161"], "--divide: got 161")]
)
def test_bad_input_is_one_line_and_exit_code_2(options, complaint, capsys):
    assert main(["parallel", *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {complaint}")
