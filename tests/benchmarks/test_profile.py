"""`python -m benchmarks profile`: phases that add up, of the host and of a GPU, and a trace that can be opened."""

import gzip
import json
from types import SimpleNamespace

import pytest

from benchmarks import profile, report
from benchmarks.__main__ import main
from benchmarks.profile import Allocation
from pmc_fast.phases import PHASES

SMALL = ["--batch-size", "2", "--num-samples", "3", "--max-length", "32", "--threads", "1"]


def profiled(tmp_path, *arguments):
    out = tmp_path / "out.json"
    assert main(["profile", *arguments, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["schema"] == profile.SCHEMA and result["seconds"] > 0
    assert result["command"].startswith(f"python -m benchmarks profile {arguments[0]}")
    assert result["config"]["what"] == arguments[0] and result["environment"]["versions"]["torch"]
    assert report.sections(out)
    return result


def test_a_step_by_phases(tmp_path, capsys):
    trace = tmp_path / "trace.json.gz"
    result = profiled(tmp_path, "step", *SMALL, "--trace", str(trace))
    printed = capsys.readouterr().out
    phases = {line["name"]: line for line in result["phases"]}
    assert set(PHASES) - {"retire"} <= set(phases)  # random weights may end no answer early
    assert sum(line["seconds"] for line in result["phases"]) == pytest.approx(result["seconds"])
    assert all(line["seconds"] > 0 and name in printed for name, line in phases.items())
    assert phases["prefill"]["calls"] == 1
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {"pmc_fast.decode", "pmc_fast.backward"} <= {event.get("name") for event in events}


def test_a_run_goes_through_every_phase(tmp_path):
    result = profiled(tmp_path, "run", *SMALL, "--micro-batches", "2")
    phases = {line["name"]: line for line in result["phases"]}
    assert list(phases) == [*PHASES, profile.BETWEEN]
    assert phases["optimizer"]["calls"] == phases["backward"]["calls"] == phases["score"]["calls"] == 2
    assert result["config"]["num_samples"] == 3 and result["config"]["batch_size"] == 2
    weights = 4 * result["config"]["parameters"]
    gradients = phases["backward"]
    assert gradients["allocated_bytes"] >= 2 * weights and gradients["peak_bytes"] >= weights
    # weights' gradients and two moments each; the moments are made once
    assert phases["optimizer"]["peak_bytes"] >= 3 * weights > phases["optimizer"]["allocated_bytes"] >= 2 * weights
    assert phases["retire"]["allocated_bytes"] > 0 and phases["detokenise"]["allocated_bytes"] == 0


def test_an_op_by_operators(tmp_path, capsys):
    result = profiled(tmp_path, "rouge_l_recall")
    assert result["phases"] == [] and result["kernels"] == []
    printed = capsys.readouterr().out
    assert "rouge_l_recall" in printed and ("saw no operator" in printed) == (result["operators"] == [])


def event(name, start, end, kind="CPU", id=0, annotation=False, **more):
    time = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    device = SimpleNamespace(name=kind)
    return SimpleNamespace(name=name, time_range=time, device_type=device, id=id, is_user_annotation=annotation, **more)


# Microseconds. The kernels of the decode phase run while the host is already in the head; one was launched by no call
# that the trace holds, and is found through its operator; the last one belongs to no phase.
EVENTS = [
    event("pmc_fast.decode", 0, 10, annotation=True),
    event("aten::mm", 1, 9, id=7),
    event("cudaLaunchKernel", 2, 3, id=1),
    event("cudaGraphLaunch", 5, 6, id=2),
    event("pmc_fast.head", 10, 30, annotation=True),
    event("cuLaunchKernel", 12, 13, id=3),
    event("cudaMemcpyAsync", 35, 36, id=4),
    event("pmc_fast.decode", 40, 50, annotation=True),
    event("aten::add", 41, 42, id=8),
    event("gemm", 12, 16, "CUDA", id=1),
    event("in a graph", 16, 17, "CUDA", id=2),
    event("in a graph", 17, 19, "CUDA", id=2),
    event("draw", 20, 25, "CUDA", id=3),
    event("copy", 37, 39, "CUDA", id=4),
    event("sum", 60, 66, "CUDA", id=99, linked_correlation_id=8),
    event("pmc_fast.decode", 12, 19, "CUDA", annotation=True),
]
MEMORY = [
    Allocation(-5_000, 50),
    Allocation(1_000, 100),
    Allocation(2_000, -100),
    Allocation(3_000, 200),
    Allocation(20_000, -250),
    Allocation(45_000, 30),
]


def test_a_kernel_belongs_to_the_phase_that_launched_it():
    decode, head = profile.phase_lines(EVENTS, MEMORY, "cuda")
    assert (decode.name, decode.calls, decode.seconds) == ("decode", 2, pytest.approx(20e-6))
    assert decode.device_seconds == pytest.approx((4 + 1 + 2 + 6) * 1e-6)
    assert (head.calls, head.device_seconds) == (1, pytest.approx(5e-6))
    rest = profile.with_the_rest([decode, head], EVENTS, 100e-6, "cuda")[-1]
    assert rest.seconds == pytest.approx(60e-6) and rest.device_seconds == pytest.approx(2e-6)


def test_memory_belongs_to_the_phase_in_which_it_came_and_went():
    decode, head = profile.phase_lines(EVENTS, MEMORY, "cpu")
    assert (decode.allocated_bytes, decode.peak_bytes) == (330, 250)
    assert (head.allocated_bytes, head.peak_bytes) == (0, 250)
    assert decode.device_seconds is None


def average(key, kind, host, device, count=1, memory=0):
    return SimpleNamespace(
        key=key,
        device_type=SimpleNamespace(name=kind),
        is_user_annotation=key.startswith("pmc_fast."),
        self_cpu_time_total=host,
        self_device_time_total=device,
        count=count,
        cpu_memory_usage=0,
        device_memory_usage=memory,
    )


def test_operators_and_kernels_are_sorted_by_the_time_of_the_gpu():
    averages = [
        average("aten::add", "CPU", 9e6, 1e6),
        average("aten::mm", "CPU", 1e6, 5e6, 4, 100),
        average("pmc_fast.decode", "CPU", 20e6, 0),
        average("pmc_fast.decode", "CUDA", 0, 6e6),
        average("add_kernel", "CUDA", 0, 1e6),
        average("gemm", "CUDA", 0, 5e6, 4),
    ]
    operators, kernels = profile.operator_lines(averages, "cuda"), profile.kernel_lines(averages)
    assert [line.name for line in operators] == ["aten::mm", "aten::add"]
    assert [(line.name, line.device_seconds, line.calls) for line in kernels] == [("gemm", 5, 4), ("add_kernel", 1, 1)]
    assert operators[0].allocated_bytes == 100
    assert [line.name for line in profile.operator_lines(averages, "cpu")] == ["aten::add", "aten::mm"]
    lines = [
        {"name": "gemm", "seconds": 0, "calls": 4, "allocated_bytes": 0, "peak_bytes": None, "device_seconds": 5.0}
    ]
    assert "GPU" in profile.table("GPU kernel", lines, 10.0) and "50 %" in profile.table("GPU kernel", lines, 10.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--trace", "no/such/folder/trace.json"], "--trace: "),
        (["step", "--batch-size", "0"], "--batch-size: got 0"),
        (["run", "--micro-batches", "0"], "--micro-batches: got 0"),
        (["sample", "--model", "m", "--retain", "r.jsonl"], "--model, --retain: of step and run alone, got sample"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert main(["profile", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_target_is_listed_with_the_known(capsys):
    with pytest.raises(SystemExit):
        main(["profile", "teapot"])
    assert "'teapot'" in capsys.readouterr().err
