"""`python -m benchmarks profile`: phases that add up, and a trace that can be opened."""

import gzip
import json

import pytest

from benchmarks.__main__ import main
from pmc_fast.phases import PHASES

SMALL = ["--batch-size", "2", "--num-samples", "3", "--max-length", "40", "--threads", "2"]


def test_a_step_by_phases(tmp_path, capsys):
    trace, out = tmp_path / "trace.json.gz", tmp_path / "out.json"
    assert main(["profile", "step", *SMALL, "--trace", str(trace), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["schema"] == "pmc_fast.benchmarks.profile/1"
    phases = {line["name"]: line for line in result["phases"]}
    assert set(PHASES) - {"retire"} <= set(phases)
    assert sum(line["seconds"] for line in result["phases"]) == pytest.approx(result["seconds"])
    assert all(line["seconds"] > 0 and name in printed for name, line in phases.items())
    assert phases["forward"]["allocated_bytes"] > 0 and phases["prefill"]["calls"] == 1
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {"pmc_fast.decode", "pmc_fast.backward"} <= {event.get("name") for event in events}


def test_an_op_by_operators(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main(["profile", "rouge_l_recall", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["phases"] == [] and result["seconds"] > 0
    assert "rouge_l_recall" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--trace", "no/such/folder/trace.json"], "--trace: "),
        (["step", "--batch-size", "0"], "--batch-size: got 0"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert main(["profile", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_target_is_listed_with_the_known(capsys):
    with pytest.raises(SystemExit):
        main(["profile", "teapot"])
    assert "'teapot'" in capsys.readouterr().err
