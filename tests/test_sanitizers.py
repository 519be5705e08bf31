"""The CPU's kernels, and the CUDA kernel on an emulated GPU, under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
from pathlib import Path

from pmc_fast.native import library

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 15


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_kernels_on_random_and_adversarial_inputs(cmake, tmp_path, rng_seed):
    runnable = ";".join(name for name in library().instruction_sets() if name != "baseline")  # what this CPU can run
    run(cmake, "-S", ROOT, "-B", tmp_path, "-DPMC_FAST_FUZZ=ON", f"-DPMC_FAST_INSTRUCTION_SETS={runnable}")
    run(cmake, "--build", tmp_path, "--parallel", "2")
    # Threads that wait must not spin: most cases are far shorter than the time libgomp would let them.
    said = run(tmp_path / "fuzz", "--seed", str(rng_seed), "--seconds", str(SECONDS), OMP_WAIT_POLICY="passive")
    assert "no findings" in said
