"""For every test a fresh seed, printed so that a failure can be repeated, as many threads, and the GPU, if any."""

import os
import secrets
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: the threads of workers side by side must not spin

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on the CPU

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `benchmarks`; last, so an installed pmc_fast wins
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads())


@pytest.fixture(autouse=True)
def threads(request):
    """Two for ops, whose kernels divide rows among threads; no test inherits --threads, which holds for a process."""
    torch.set_num_threads(2 if "ops" in request.path.parts else THREADS)


@pytest.fixture
def rng_seed() -> int:
    """A fresh seed, or PMC_FAST_TEST_SEED; torch's generator starts from it."""
    seed = int(os.environ.get("PMC_FAST_TEST_SEED") or secrets.randbelow(2**31))
    print(f"PMC_FAST_TEST_SEED={seed}")
    torch.manual_seed(seed)
    return seed


@pytest.fixture(autouse=True)
def on_the_gpu_if_there_is_one(request):
    """Tests of Triton's kernels make their tensors on the GPU; without one the kernels run in the interpreter."""
    parameters = getattr(request.node, "callspec", None)
    triton = "kernels" in request.path.parts or (parameters and parameters.params.get("impl") == "triton")
    if not (triton and torch.cuda.is_available()):
        yield
        return
    if request.node.get_closest_marker("refuses_values"):
        pytest.skip("a GPU refuses values by itself, and the process cannot use it afterwards")
    with torch.device("cuda"):
        yield
