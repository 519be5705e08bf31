"""Runs bench_*.py under pytest-benchmark: every contestant of every bench, judged before it is timed."""

import gc
import sys
from pathlib import Path

import pytest
import torch

# behind an installed pmc_fast, so that the source tree, which may hold no compiled module, does not hide it
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.bench import CannotRun  # noqa: E402
from benchmarks.ops import contestants_of  # noqa: E402
from pmc_fast import BackendUnavailable  # noqa: E402

_SEED = 20250704


def pytest_addoption(parser):
    parser.addoption("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of the benches to run")


def pytest_generate_tests(metafunc):
    if "contest" not in metafunc.fixturenames:
        return
    wanted = getattr(torch, metafunc.config.getoption("--dtype"))
    contests = [
        pytest.param((bench, name), id=f"{bench.title}-{name}")
        for bench in metafunc.module.BENCHES
        if bench.dtype in (None, wanted) and not bench.large
        for name in contestants_of(bench, None, torch.device("cpu"))
    ]
    metafunc.parametrize("contest", contests, indirect=True)


class _Judged:
    """The inputs and oracle of the bench at hand; only one bench's are held at a time."""

    def __init__(self):
        self.bench = None

    def of(self, bench):
        if bench is not self.bench:
            self.bench = self.inputs = self.oracle = self.budget = None
            gc.collect()
            self.inputs = bench.make_inputs(_SEED, torch.device("cpu"))
            self.oracle = bench.oracle(self.inputs)
            if bench.yardstick:
                run = bench.contestants()[bench.yardstick]
                self.budget = bench.judge(run, run(self.inputs), self.inputs, self.oracle, None).errors
            self.bench = bench
        return self


@pytest.fixture(scope="session")
def judged():
    return _Judged()


@pytest.fixture
def contest(request, judged):
    """A function of the `benchmark` fixture: judge one contestant, then time it."""
    bench, name = request.param

    def run_contest(benchmark):
        case = judged.of(bench)
        run = bench.contestants()[name]
        budget = None if name == bench.yardstick else case.budget
        try:
            result = run(case.inputs)
        except (BackendUnavailable, CannotRun, ImportError, NotImplementedError) as error:
            pytest.skip(str(error))
        verdict = bench.judge(run, result, case.inputs, case.oracle, budget)
        assert verdict.right, verdict.evidence
        benchmark.group = f"{bench.op} {bench.title}"
        benchmark.extra_info["evidence"] = verdict.evidence
        benchmark.pedantic(run, args=(case.inputs,), rounds=5, warmup_rounds=1)

    return run_contest
