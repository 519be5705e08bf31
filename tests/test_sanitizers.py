"""The CPU's kernels under AddressSanitizer and UndefinedBehaviorSanitizer, by csrc/fuzz."""

import os
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CMAKE = Path(sysconfig.get_path("scripts")) / "cmake"  # of this environment, which need not be activated
SECONDS = 10


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_kernels_on_random_and_adversarial_inputs(tmp_path, rng_seed):
    run(CMAKE, "-S", ROOT, "-B", tmp_path, "-DPMC_FAST_FUZZ=ON")
    run(CMAKE, "--build", tmp_path, "--parallel", "2")
    # Threads that wait must not spin: most cases are far shorter than the time libgomp would let them.
    said = run(tmp_path / "fuzz", "--seed", str(rng_seed), "--seconds", str(SECONDS), OMP_WAIT_POLICY="passive")
    assert "no findings" in said
