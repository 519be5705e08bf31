"""What configuring says where there is no nvcc, and of unknown instruction sets."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("value", "succeeds", "says"),
    [
        ("1", False, "PMC_FAST_CUDA=1 asks for the CUDA kernels, but no nvcc was found on PATH or in CUDACXX"),
        ("AUTO", True, "without CUDA kernels, no nvcc was found on PATH or in CUDACXX"),
        ("yes", False, "PMC_FAST_CUDA: got 'yes', expected 0, 1, AUTO or EMULATED"),
    ],
)
def test_without_nvcc(value, succeeds, says, cmake, tmp_path, monkeypatch):
    pybind11 = pytest.importorskip("pybind11")
    monkeypatch.setenv("CUDACXX", str(tmp_path / "no-nvcc"))
    done = subprocess.run(
        [cmake, "-S", ROOT, "-B", tmp_path, f"-DPMC_FAST_CUDA={value}", f"-DPython_EXECUTABLE={sys.executable}"]
        + [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode == 0) == succeeds, done.stdout
    assert says in " ".join(done.stdout.split())


def test_unknown_instruction_sets_are_refused(cmake, tmp_path):
    command = [cmake, "-S", ROOT, "-B", tmp_path, "-DPMC_FAST_FUZZ=ON", "-DPMC_FAST_INSTRUCTION_SETS=avx2;sse"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode
    assert "PMC_FAST_INSTRUCTION_SETS: got 'sse', expected avx2, avx512, both or neither" in " ".join(
        done.stdout.split()
    )
