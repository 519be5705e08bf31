"""`python -m benchmarks report --readme`: the committed README holds what it writes, and what it makes of any results."""

import json
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from benchmarks import readme
from benchmarks.__main__ import main
from benchmarks.ops import OPS, benches_of

ROOT = Path(__file__).resolve().parents[2]
WHERE = {
    "device": "cpu",
    "device_name": "made-up CPU",
    "isa": {"torch": "AVX512", "pmc_fast": "avx512"},
    "threads": 2,
    "versions": {"torch": "2.13.0"},
    "started": "2026-01-02T00:00:00+00:00",
}
CONFIG = {
    "batch_size": 8,
    "num_samples": 20,
    "parameters": 135e6,
    "dtype": "bfloat16",
    "epochs": 3,
    "forget_rows": 40,
    "evaluation_rows": 24,
}
PUBLISHED = {"sample_s": 6.0, "train_s": 3.0, "total_s": 9.5, "peak_bytes": 7 * 10**9}
OURS = {"sample_s": 2.0, "train_s": 1.0, "total_s": 3.5, "peak_bytes": None}
STEP = {
    "schema": "pmc_fast.benchmarks.step/1",
    "published": PUBLISHED,
    "pmc_fast": OURS,
    "ratio": {"sample_per_token": 2.9, "train": 3.0, "total_at_equal_tokens": 2.6},
    "turns": {"published": [PUBLISHED], "pmc_fast": [OURS]},
    "config": CONFIG,
    "environment": WHERE,
}


def course(seconds, peak_bytes):
    points = [{"seconds": seconds * i / 4, "unlearn_quality": 25.0 * i, "utility": 99.0 - i} for i in range(5)]
    return {"seconds": seconds, "before": points[0], "after": points[-1], "curve": points, "peak_bytes": peak_bytes}


RUN = {
    "schema": "pmc_fast.benchmarks.run/1",
    "published": course(80.0, 3 * 10**9),
    "pmc_fast": course(20.0, 10**9),
    "ratio": {"seconds": 4.0, "area": 1.75},
    "config": CONFIG,
    "environment": WHERE,
}


def ops(*rows, **environment):
    return {"schema": "pmc_fast.benchmarks.ops/1", "rows": rows, "environment": {**WHERE, **environment}}


def row(contestant, seconds, ours=0.02, repeats=3, key=readme.SHOWN[4]):
    named = dict(zip(("op", "title", "dtype"), key, strict=True))
    spread = seconds and {"median": seconds, "p20": seconds, "p80": seconds}
    measured = {"seconds": spread, "right": seconds and True, "repeats": repeats, "ratio": seconds and seconds / ours}
    return {**named, "contestant": contestant, **measured, "peak_bytes": seconds and 10**6}


@pytest.fixture
def write(tmp_path):
    """Make a README and results beside it; returns what `report --readme` returns and the README."""
    path = tmp_path / "README.md"
    path.write_text(f"# Before\n\n{readme.BEGIN}\nold\n{readme.END}\n\nAfter.\n")

    def run(**contents):
        files = [tmp_path / f"{name}.json" for name in contents]
        for file, content in zip(files, contents.values(), strict=True):
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        return main(["report", *map(str, files), "--readme", str(path)]), path.read_text()

    return run


def cells(text, *first):
    """The cells of the line of a table that begins with those given."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    (found,) = [line[len(first) :] for line in lines if line[: len(first)] == list(first)]
    return found


def test_the_committed_readme_is_what_the_command_writes():
    path = ROOT / "README.md"
    text, figures = readme.updated(path, readme.committed())
    assert path.read_text() == text, "run `python -m benchmarks report --readme README.md`"
    assert all(f"]({readme.PICTURES}/{name})" in text for name in figures)
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", text)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_what_is_shown_exists():
    benches = {
        (bench.op, bench.title, str(bench.dtype).removeprefix("torch.")): bench
        for op in OPS
        for bench in benches_of(op)
    }
    for op, title, dtype in readme.SHOWN:
        assert set(readme.USUAL[op]) <= benches[op, title, str(dtype)].contestants().keys()
    assert len(readme.SHOWN) <= 15 and {op for op, *_ in readme.SHOWN} == set(OPS)


def test_only_what_stands_between_the_comments_changes(write, tmp_path):
    code, text = write(step=STEP)
    assert code == 0 and "old" not in text
    assert text.startswith(f"# Before\n\n{readme.BEGIN}\n\n") and text.endswith(f"\n\n{readme.END}\n\nAfter.\n")
    assert write(step=STEP) == (0, text)


def test_a_step(write):
    _, text = write(first=STEP, second={**STEP, "turns": {"pmc_fast": [OURS] * 3}})
    assert "8 questions x 20 samples, a model of 135 M parameters" in text
    assert "- made-up CPU, AVX-512, 2 threads, torch 2.13.0\n" in text
    label = "made-up CPU, AVX-512, bfloat16"
    assert cells(text, "published vs pmc_fast") == [f"[{label}](first.json), one turn", f"[{label}](second.json)"]
    assert cells(text, "sampling")[0] == "6 s vs **2 s** (2.90x)"
    assert cells(text, "peak extra memory")[0] == "7 GB vs **-**"


def test_a_step_that_was_taken_with_pruning_too(write):
    pruned = {**OURS, "sample_s": 1.5}
    newer = {**STEP, "pmc_fast_pruned": pruned, "ratio": {**STEP["ratio"], "sample_per_pick_pruned": 4.0}}
    _, text = write(first=STEP, second=newer)
    assert cells(text, "sampling with pruning") == ["-", "6 s vs **1.5 s** (4.00x)"]


def test_a_run_and_its_picture(write, tmp_path):
    _, text = write(run=RUN)
    assert "3 epochs over 40 questions" in " ".join(text.split())
    assert cells(text, "time") == ["80 s vs **20 s** (4.00x)"]
    assert cells(text, "unlearn quality before") == ["0.0 % vs **0.0 %**"]
    assert cells(text, "utility after") == ["95.0 % vs **95.0 %**"]
    assert f"]({readme.PICTURES}/run.png)" in text
    assert (imread(tmp_path / readme.PICTURES / "run.png")[..., :3] < 0.9).any(axis=2).mean() > 0.003


def test_a_run_that_is_not_finished(write):
    code, text = write(run={**RUN, "published": None, "ratio": None})
    assert code == 0 and cells(text, "time") == ["- vs **20 s**"]


def test_steps_come_first_and_other_kinds_are_left_out(write):
    profile = {"schema": "pmc_fast.benchmarks.profile/1"}
    code, text = write(a=profile, b=RUN, c=STEP)
    assert code == 0 and text.index("sampling") < text.index("utility") and "a.json" not in text


def test_the_ops_with_the_usual_peers_and_the_fastest(write, tmp_path):
    timed = [row("pmc_fast", 0.02), row("pmc_fast, reference", 0.001), row("torch eager", 0.04, repeats=1)]
    others = [row("chunked torch", 0.05), row("linear_cross_entropy", None), row("torch.compile", 0.018)]
    _, text = write(ops=ops(*timed, *others, row("pmc_fast", 1.0, key=("sample", "elsewhere", "float32"))))
    assert cells(text, "`collapse_loss`", "2048 x 576 x 49152, float32") == [
        "**pmc_fast**<br>torch eager<br>torch.compile",
        "20 ms<br>2.00x, one turn<br>0.90x",
        "1 MB<br>1 MB<br>1 MB",
    ]
    assert "elsewhere" not in text and "`sample`" not in text
    assert (imread(tmp_path / readme.PICTURES / readme.OPS_PICTURE)[..., :3] < 0.9).any(axis=2).mean() > 0.003


def test_the_latest_result_of_a_machine_counts_and_each_machine_has_columns(write):
    old = ops(row("pmc_fast", 0.5), row("torch eager", 1.0, 0.5), started="2026-01-01T00:00:00+00:00")
    gpu = ops(row("pmc_fast", 0.001), row("liger-kernel", 0.002, 0.001), device="cuda", device_name="made-up GPU")
    _, text = write(new=ops(row("pmc_fast", 0.02)), old=old, gpu=gpu)
    assert cells(text, "op", "size", "") == ["made-up CPU, AVX-512", "memory", "made-up GPU", "memory"]
    found = cells(text, "`collapse_loss`", "2048 x 576 x 49152, float32")
    assert found == ["**pmc_fast**<br>liger-kernel", "20 ms<br>-", "1 MB<br>-", "1 ms<br>2.00x", "1 MB<br>1 MB"]


def test_a_machine_with_few_benches_gets_no_column(write):
    shown = readme.SHOWN[: readme.FEWEST]
    some = ops(*(row("pmc_fast", 0.01, key=key) for key in shown))
    few = ops(*(row("pmc_fast", 0.02, key=key) for key in shown[1:]), device_name="Another CPU")
    _, text = write(some=some, few=few)
    assert "Another CPU" not in text.split("| op |")[1] and "few.json" in text
    _, text = write(few=few)
    assert "Another CPU" in text.split("| op |")[1]


@pytest.mark.parametrize(
    "content, complaint",
    [
        (
            {key: STEP[key] for key in STEP if key != "turns"},
            "bad.json: not what pmc_fast.benchmarks.step/1 should hold",
        ),
        ({**RUN, "pmc_fast": 3}, "bad.json: not what"),
        (ops({"op": "sample"}), "bad.json: not what"),
        ("{", "bad.json: not JSON"),
    ],
)
def test_a_bad_result_is_named_and_nothing_is_written(content, complaint, write, tmp_path, capsys):
    code, text = write(good=STEP, bad=content)
    assert code == 2 and "\nold\n" in text and not (tmp_path / "docs").exists()
    said = capsys.readouterr().err
    assert said.startswith("error: ") and complaint in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("text", [None, "", f"{readme.END}\n{readme.BEGIN}\n", f"{readme.BEGIN}\n" * 2 + readme.END])
def test_a_readme_without_the_comments_is_refused(text, tmp_path, capsys):
    path = tmp_path / "README.md"
    if text is not None:
        path.write_text(text)
    assert main(["report", "--readme", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --readme: {path}: ")
    assert text is None or path.read_text() == text
