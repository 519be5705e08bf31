"""`python -m benchmarks report`: tables, pictures and wording of every kind of result, and clear words about bad files."""

import copy
import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from benchmarks import pictures, report, results, tables
from benchmarks.__main__ import main
from benchmarks.wording import amount, clock, failure, ratio, share, size

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
WHERE = {
    "device_name": "made-up CPU",
    "threads": 2,
    "versions": {"torch": "2.13.0", "triton": "3.7.1"},
    "commit": {"hash": "0123456789abcdef", "changed": True},
}


def test_every_kind_of_result_has_sections():
    assert sorted(report._SECTIONS) == sorted(results.SCHEMAS)


def row(contestant, seconds=None, right=True, evidence="value 1e-07", **changes):
    spread = None if seconds is None else {"median": seconds, "p20": 0.9 * seconds, "p80": 1.2 * seconds}
    return {
        "op": "collapse_loss",
        "title": "37 x 24 x 1511",
        "dtype": "float32",
        "contestant": contestant,
        "right": right,
        "evidence": evidence,
        "seconds": spread,
        "repeats": 3 if seconds else 0,
        "ratio": seconds and seconds / 0.02,
        "peak_bytes": 1_500_000 if seconds else None,
        **changes,
    }


OPS = {
    "schema": "pmc_fast.benchmarks.ops/1",
    "environment": WHERE,
    "limits": {"bytes_per_s": 1e10, "flops_per_s": {"float32": 1e11}},
    "rows": [
        row("pmc_fast", 0.02, share_of_limit=0.5, flops=1e9, bytes=2e6),
        row("pmc_fast, reference", 0.03, share_of_limit=0.3, flops=1e9, bytes=2e6),
        row("torch | eager", 0.04, share_of_limit=0.25, flops=1e9, bytes=2e6, repeats=1),
        row("liger-kernel", right=None, evidence="its kernels need a GPU"),
        row("squares", right=False, evidence="value 1e-01\nd_hidden 2e-01"),
    ],
    "command": "python -m benchmarks ops --json out.json",
}
PART = {"sample_s": 6.0, "score_s": 0.5, "train_s": 3.0, "total_s": 9.5, "sampled_tokens": 600, "peak_bytes": 7 * 10**9}
OUR_PART = {**PART, "sample_s": 2.0, "train_s": 1.0, "total_s": 3.5, "peak_bytes": 3 * 10**9}
RATIOS = {"sample_per_token": 3.0, "train": 3.0, "total_at_equal_tokens": 2.714}
STEP = {
    "schema": "pmc_fast.benchmarks.step/1",
    "published": PART,
    "pmc_fast": OUR_PART,
    "ratio": RATIOS,
    "spread": {
        "published": {key: [0.9 * value, 1.1 * value] for key, value in PART.items()},
        "pmc_fast": {key: [0.9 * value, 1.1 * value] for key, value in OUR_PART.items()},
        "ratio": {key: [0.9 * value, 1.1 * value] for key, value in RATIOS.items()},
    },
    "turns": {"published": [PART] * 3, "pmc_fast": [OUR_PART] * 3},
    "config": {"model": "a-model", "parameters": 135e6, "batch_size": 8, "num_samples": 20, "dtype": "bfloat16"},
    "environment": WHERE,
}


def course(seconds):
    points = [{"seconds": seconds * i / 4, "unlearn_quality": 25.0 * i, "utility": 99.0 - i} for i in range(5)]
    ends = {"before": points[0], "after": points[-1], "curve": points}
    return {"seconds": seconds, **ends, "area": 50.0, "peak_bytes": 10**9, "sampled_tokens": 5}


RUN = {
    "schema": "pmc_fast.benchmarks.run/1",
    "published": course(80.0),
    "pmc_fast": course(20.0),
    "ratio": {"seconds": 4.0, "area": 1.75},
    "config": STEP["config"],
    "environment": WHERE,
}


def line(name, seconds, calls=3, device_seconds=None):
    memory = {"allocated_bytes": 2_000_000 * calls, "peak_bytes": 1_000_000 if calls else None}
    return {"name": name, "seconds": seconds, "calls": calls, "device_seconds": device_seconds, **memory}


PROFILE = {
    "schema": "pmc_fast.benchmarks.profile/1",
    "title": "PMC step",
    "seconds": 2.0,
    "phases": [line("decode", 1.0), line("backward", 0.9), line("between phases", 0.1, 0)],
    "operators": [line("aten::mm", 1.5), line("aten::add", 0.0001)],
    "kernels": [],
    "config": {"dtype": "float32"},
    "environment": WHERE,
}
GPU_PROFILE = {
    **PROFILE,
    "phases": [line("decode", 0.2, 3, 1.0), line("backward", 1.7, 3, 0.8), line("between phases", 0.1, 0, 0.0)],
    "kernels": [{**line("gemm", 0.0, 12, 1.6), "allocated_bytes": 0, "peak_bytes": None}],
}
KERNEL = {
    "op": "sample",
    "kernel": "sample.draw SmolLM2",
    "capability": 90,
    "num_warps": 8,
    "num_stages": 2,
    "matmul": False,
    "registers": 64,
    "spill_store_bytes": 0,
    "spill_load_bytes": 0,
    "stack_bytes": 0,
    "static_shared_bytes": 0,
    "dynamic_shared_bytes": 4096,
    "matrix_instructions": {"wgmma 16-bit": 4},
    "global_loads": {"TMA": 1, "16": 3},
    "violations": [],
}
COMPILE = {
    "schema": "pmc_fast.benchmarks.compile/1",
    "environment": {"versions": WHERE["versions"]},
    "limits": {"spill_bytes": 0},
    "rows": [KERNEL, {**KERNEL, "kernel": "broken", "registers": 0, "violations": ["does not compile: why"]}],
}
GPU = {
    "schema": "pmc_fast.benchmarks.gpu/1",
    "device": "cuda",
    "minutes": 9.0,
    "parts": [{"name": "tests", "status": "ok", "seconds": 61.5}, {"name": "ops", "status": "failed", "seconds": 0.0}],
}
MODELS = {
    "schema": "pmc_fast.benchmarks.models/1",
    "environment": {**WHERE, "versions": {"transformers": "5.23.0"}},
    "rows": [
        {
            "model": "llama",
            "built": "right",
            "sampled": "right",
            "trained": "right",
            "decoder": "native",
            "layers": "native",
        },
        {
            "model": "bart",
            "built": "right",
            "sampled": "UserError: no",
            "trained": "right",
            "decoder": None,
            "layers": "padded rows",
        },
        {
            "model": "qwen3",
            "built": "right",
            "sampled": "right",
            "trained": "right",
            "decoder": "native",
            "layers": "native",
        },
        {"model": "fuyu", "built": "ValueError: too large"},
    ],
    "command": "python -m benchmarks models",
}
ALL = {
    "ops": OPS,
    "step": STEP,
    "run": RUN,
    "profile": PROFILE,
    "gpu-profile": GPU_PROFILE,
    "compile": COMPILE,
    "gpu": GPU,
    "models": MODELS,
}


def write(folder, name, content):
    path = folder / f"{name}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def changed(content, **changes):
    return {**copy.deepcopy(content), **changes}


def is_drawn(path):
    """Whether the picture shows more than paper."""
    image = imread(path)[..., :3]
    return min(image.shape[:2]) > 100 and (image < 0.9).any(axis=2).mean() > 0.003


def test_all_kinds_of_results_in_one_report(tmp_path, capsys):
    files = [write(tmp_path, name, content) for name, content in ALL.items()]
    out = tmp_path / "made" / "report"
    assert main(["report", *map(str, files), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    printed = capsys.readouterr().out
    assert all(f"### {name}: " in printed and f"### {name}: " in text for name in ALL)
    drawn = {path.name for path in out.glob("*.png")}
    assert drawn == {
        "ops-collapse_loss-37-x-24-x-1511-float32.png",
        "ops-collapse_loss-limits-float32.png",
        "step.png",
        "run.png",
        "profile.png",
        "gpu-profile.png",
    }
    for name in drawn:
        assert f"]({name})" in text and is_drawn(out / name)
    assert "made-up CPU, 2 threads, torch 2.13.0, commit 0123456 (changed), float32" in text
    assert "Remake it with `python -m benchmarks ops --json out.json`." in text
    assert "Compiled, not run, with triton 3.7.1, torch 2.13.0." in text


def test_pictures_alone_go_to_the_default_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(write(tmp_path, "step", STEP))]) == 0
    assert [path.name for path in report.DEFAULT_OUT.iterdir()] == ["step.png"]
    assert "1 pictures in benchmark-report" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", [path for path in RESULTS.glob("*.json") if "schema" in json.loads(path.read_text())], ids=lambda p: p.stem
)
def test_committed_results_can_be_reported(path):
    parts = report.sections(path)
    assert parts and all(part.text.startswith(f"### {path.stem}: ") for part in parts)


def cells(table, first):
    """The cells of the line of a table whose first one is given."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    (found,) = [line[1:] for line in lines if line[0] == first]
    return found


def test_a_table_of_contestants():
    table = tables.ops(OPS["rows"])
    assert cells(table, "contestant")[:4] == ["median", "20-80 %", "times ours", "extra memory"]
    assert cells(table, "**pmc_fast**") == ["20 ms", "18 ms - 24 ms", "1.00", "1.5 MB", "1 G", "2 MB", "50 %"]
    assert cells(table, "torch \\| eager")[:3] == ["40 ms", "one run", "2.00"]
    assert "- liger-kernel did not run: its kernels need a GPU" in table
    assert "- squares wrong, so not timed: value 1e-01 d_hidden 2e-01" in table


def test_a_table_of_models():
    """Kinds that are run alike share a line; what is not done is told with its reason."""
    text = tables.models(MODELS)
    assert "| native | native | `llama` `qwen3` |" in text and "| - | padded rows | `bart` |" in text
    assert "- `bart` is not sampled: UserError: no\n" in text and text.endswith("Not built at these sizes: `fuyu`")


def test_columns_that_no_row_knows_are_left_out():
    plain = [row("pmc_fast", 0.02), row("peer", 0.04)]
    assert len(cells(tables.ops(plain), "contestant")) == 4
    forward = {"median": 0.01, "p20": 0.01, "p80": 0.01}
    table = tables.ops([row("pmc_fast", 0.02, forward=forward), row("peer", 0.04)])
    assert cells(table, "contestant")[4:] == ["forward"]
    assert cells(table, "**pmc_fast**")[4:] == ["10 ms"] and cells(table, "peer")[4:] == ["-"]


def test_nobody_timed_is_a_list_without_a_picture(tmp_path):
    rows = [row("pmc_fast", right=None, evidence="no device")]
    (part,) = report.sections(write(tmp_path, "ops", changed(OPS, rows=rows)))
    assert "- **pmc_fast** did not run: no device" in part.text and not part.pictures


def test_tables_of_a_step():
    table = tables.step(STEP)
    assert cells(table, "sample") == ["6 s", "5.4 s - 6.6 s", "2 s", "1.8 s - 2.2 s"]
    assert cells(table, "peak extra memory")[2] == "3 GB"
    assert cells(table, "sampling, per token") == ["3.00", "2.70 - 3.30"]
    once = changed(STEP, turns={"published": [PART], "pmc_fast": [OUR_PART]})
    assert cells(tables.step(once), "train") == ["3 s", "one run", "1 s", "one run"]


def test_a_table_of_a_run_finished_or_not():
    assert cells(tables.run(RUN), "time") == ["80 s", "20 s", "4.00x"]
    assert cells(tables.run(RUN), "unlearn quality, after") == ["100.00 %", "100.00 %", ""]
    half = tables.run(changed(RUN, published=None, ratio=None))
    assert cells(half, "time") == ["20 s", "-"] and "not finished" in half


def test_tables_of_a_profile():
    table = tables.profile(PROFILE)
    assert cells(table, "phase") == ["seconds", "share", "calls", "allocated", "peak"]
    assert cells(table, "decode") == ["1 s", "50 %", "3", "6 MB", "1 MB"]
    assert cells(table, "between phases") == ["100 ms", "5.0 %", "-", "-", "-"]
    assert cells(table, "aten::add")[:2] == ["100 us", "<0.1 %"] and "kernel" not in table
    table = tables.profile(GPU_PROFILE)
    assert cells(table, "decode")[:4] == ["200 ms", "10 %", "1 s", "50 %"]
    assert cells(table, "GPU kernel") == ["GPU", "GPU share", "calls"]
    assert cells(table, "gemm") == ["1.6 s", "80 %", "12"]


def test_an_op_without_phases_has_no_picture(tmp_path):
    (part,) = report.sections(write(tmp_path, "profile", changed(PROFILE, phases=[])))
    assert "aten::mm" in part.text and not part.pictures


def test_a_table_of_compiled_kernels(tmp_path):
    (part,) = report.sections(write(tmp_path, "compile", COMPILE))
    assert "kernels of sample for sm_90" in part.text
    assert cells(part.text, "sample.draw SmolLM2") == [
        "64",
        "0 / 0",
        "4.1 kB",
        "8 / 2",
        "4 wgmma 16-bit",
        "1 x TMA, 3 x 16 B",
    ]
    assert cells(part.text, "broken") == ["-"] * 6
    assert "Over the limit:\n\n- broken: does not compile: why" in part.text


@pytest.mark.parametrize(
    "content, complaint",
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[1]", "schema: got None"),
        ({"schema": ["a"]}, "schema: got ['a']"),
        ({"schema": "pmc_fast.benchmarks.ops/9"}, "schema: got 'pmc_fast.benchmarks.ops/9', want one of pmc_fast"),
        ({"schema": None}, "schema: got None"),
        (changed(OPS, rows=[]), "rows: got none"),
        ({key: OPS[key] for key in OPS if key != "environment"}, "it lacks 'environment'"),
        ({key: STEP[key] for key in STEP if key != "turns"}, "it lacks 'turns'"),
        (changed(RUN, pmc_fast=3), "not what pmc_fast.benchmarks.run/1 should hold"),
        (changed(PROFILE, operators=None), "not what pmc_fast.benchmarks.profile/1 should hold"),
        (changed(COMPILE, rows=[{"op": "sample", "capability": 90}]), "it lacks 'registers'"),
    ],
)
def test_a_bad_file_is_named_and_nothing_is_written(content, complaint, tmp_path, capsys):
    good, bad = write(tmp_path, "good", STEP), tmp_path / "bad.json"
    if content is not None:
        write(tmp_path, "bad", content)
    assert main(["report", str(good), str(bad), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {bad}: ") and complaint in said.err and len(said.err.splitlines()) == 1
    assert said.out == "" and not (tmp_path / "out").exists()


def test_files_that_no_benchmark_wrote_are_skipped_and_named(tmp_path, capsys):
    good, other = write(tmp_path, "step", STEP), write(tmp_path, "report", {"config": {"command": "demo"}})
    for more in ([good, other], [other, good]):
        assert main(["report", *map(str, more), "--out", str(tmp_path / "out")]) == 0
        said = capsys.readouterr()
        assert said.out.startswith("### step: ") and f"{other}: skipped, it names no schema" in said.err
    for target in ("--out", "--readme"):
        assert main(["report", str(other), target, str(tmp_path / "none")]) == 2
        assert "RESULTS.json: got none that names a schema" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_table_of_what_ran_on_a_gpu(tmp_path):
    (part,) = report.sections(write(tmp_path, "summary", GPU))
    assert cells(part.text, "tests") == ["ok", "61.5 s"] and cells(part.text, "ops") == ["failed", "0"]
    assert "9 minutes were given on cuda." in part.text


def test_two_files_that_would_write_the_same_picture(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    first, second = write(tmp_path, "step", STEP), write(tmp_path / "other", "step", STEP)
    assert main(["report", str(first), str(second), "--out", str(tmp_path / "out")]) == 2
    assert f"{second}: step.png would be written twice, first for {first}" in capsys.readouterr().err
    assert main(["report", str(first), str(first), "--out", str(tmp_path / "out")]) == 2


def test_no_results_are_refused(capsys):
    assert main(["report"]) == 2
    assert "RESULTS.json: got none" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    path = write(tmp_path, "step", STEP)
    assert main(["report", str(path), "--out", str(path)]) == 2
    assert f"--out: {path} cannot be written" in capsys.readouterr().err


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_far_times_are_dots_and_near_ones_bars():
    near, far = ([row("pmc_fast", 0.02), row("peer", seconds)] for seconds in (0.1, 10.0))
    axes = pictures.bench("near", "here", near).axes[0]
    assert axes.get_xscale() == "linear" and axes.get_xlim()[0] == 0
    assert len([bar for bar in axes.patches if bar.get_width()]) == 2
    axes = pictures.bench("far", "here", far).axes[0]
    assert axes.get_xscale() == "log" and "logarithmic" in axes.get_title(loc="left") and not axes.patches
    assert "10 s  (500x)" in texts(axes)


def test_one_run_has_no_error_bar():
    axes = pictures.bench("ops", "here", OPS["rows"]).axes[0]
    assert len(axes.containers) == 3 + 2  # bars, and error bars of those that ran more than once
    assert {"20 ms", "40 ms  (2.00x, one run)"} <= set(texts(axes))


def test_who_has_no_time_is_named_below():
    figure = pictures.bench("ops", "here", [*OPS["rows"], row("quack", right=None)])
    below = figure.get_supxlabel()
    assert below == "here\ndid not run: liger-kernel; quack\nwrong, so not timed: squares"
    assert len(figure.axes[0].get_yticklabels()) == 3


def test_an_axis_has_one_unit():
    axes = pictures.bench("ops", "here", [row("pmc_fast", 0.4), row("peer", 1.2)]).axes[0]
    labels = [axes.xaxis.get_major_formatter()(value, 0) for value in (0.0, 0.5, 1.5)]
    assert labels == ["0", "0.5 s", "1.5 s"]


@pytest.mark.parametrize(
    "wording, value, text",
    [
        (clock, 60.123, "60.1 s"),
        (clock, 0.99996, "1 s"),
        (clock, 0.0601, "60.1 ms"),
        (clock, 3.2e-10, "0.32 ns"),
        (clock, 0, "0"),
        (size, 236_100_000, "236 MB"),
        (size, 999_900, "1 MB"),
        (size, 12, "12 B"),
        (amount, 47.1e9, "47.1 G"),
        (amount, 512, "512"),
        (ratio, 0.6012, "0.60"),
        (ratio, 9.996, "10"),
        (ratio, 36.76, "36.8"),
        (ratio, 412.3, "412"),
        (share, 0.0, "0.0 %"),
        (share, 0.00049, "<0.1 %"),
        (share, 0.073, "7.3 %"),
        (share, 1.32, "132 %"),
    ],
)
def test_numbers_are_worded_for_reading(wording, value, text):
    assert wording(value) == text


def test_a_unit_can_be_asked_for():
    assert clock(0.25, like=3.0) == "0.25 s" and size(5e8, like=2e9) == "0.5 GB"


def test_why_a_row_has_no_time():
    assert failure(row("a", 1.0)) is None
    assert failure(row("a", right=None, evidence="whatever")) == "did not run"
    assert failure(row("a", right=False, evidence="cannot run")) == "wrong, so not timed"
