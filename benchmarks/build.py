"""`python -m benchmarks.build`: makes sure that pmc_fast, its kernels and its compiled module can be imported.

Exits with 0 if they can, in the end, and with 1 if not. What is installed and what works here is printed too.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_LOOK = "import pmc_fast.kernels; from pmc_fast.backend import missing_library; print(missing_library() or '')"

# The second one is for a machine without a network that has what a build needs.
_ATTEMPTS = ([], ["--no-build-isolation", "--no-deps"])


def main() -> int:
    """Build only if something is missing; says what it finds."""
    for options in _ATTEMPTS:
        if not (reason := missing()):
            break
        print(f"missing: {reason}", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--retries", "0", "--timeout", "10", *options, "-e", "."]
        subprocess.run(command, cwd=ROOT, check=False)
    reason = missing()
    print(f"missing: {reason}\n" if reason else "nothing is missing\n", flush=True)
    subprocess.run([sys.executable, "-m", "pmc_fast", "doctor"], cwd=ROOT, check=False)
    return 1 if reason else 0


def missing() -> str | None:
    """What cannot be imported, asked of a new process; None if nothing is missing."""
    done = subprocess.run([sys.executable, "-c", _LOOK], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip().split("\n")[-1]
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
