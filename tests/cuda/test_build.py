"""What nvcc made of the CUDA kernel: read from the built module, no GPU needed."""

import re
import subprocess
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from pmc_fast.cuda import library

MOST_REGISTERS = 128  # of a thread: two blocks of 256 threads fill an SM's 65536
RESERVED_SHARED_BYTES = 1024  # the driver's own, from sm_90 on
INSTANCES = {"sample_kernel": 2}  # float32 and bfloat16


@pytest.fixture(scope="module")
def cuobjdump():
    """Runs cuobjdump, which Triton ships, on the module."""
    module = find_spec("pmc_fast._cuda")
    if module is None:
        pytest.skip("pmc_fast was built without CUDA (no nvcc, or PMC_FAST_CUDA=0)")
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    def run(*options):
        return subprocess.run([tool, *options, module.origin], capture_output=True, text=True, check=True).stdout

    return run


@pytest.fixture(scope="module")
def targets(cuobjdump):  # asks for the module only where it is
    return library().TARGETS.split(", ")


def kernel_of(symbol):
    return next(name for name in INSTANCES if name in symbol)


def test_registers_stack_and_shared_memory(cuobjdump, targets):
    seen, target = defaultdict(list), None
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if found := re.match(r"arch = (\w+)", line):
            target = found[1]
        elif found := re.match(r"\s*Function (\w+):", line):
            symbol = found[1]
        elif "REG:" in line:
            used = {name: int(size) for name, size in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            seen[target, kernel_of(symbol)].append(used)
    assert {key: len(kernels) for key, kernels in seen.items()} == {
        (target, name): count for target in targets for name, count in INSTANCES.items()
    }
    for key, kernels in seen.items():
        for used in kernels:
            assert used["STACK"] == 0 and used["LOCAL"] == 0, (key, used)  # neither spills nor local arrays
            assert used["REG"] <= MOST_REGISTERS, (key, used)
            assert used["SHARED"] <= RESERVED_SHARED_BYTES, (key, used)  # the rest is sized by the launch


def test_instructions(cuobjdump, targets):
    for target in targets:
        functions = re.split(r"\n\s*Function : ", cuobjdump("-sass", "-arch", target))[1:]
        assert len(functions) == sum(INSTANCES.values())
        for function in functions:
            symbol, code = function.split("\n", 1)
            has = {name for name in re.findall(r"\b(LDG\.E\.128|STG\.E\.128|LDL|STL|ATOMS\.CAS|UCGABAR_ARV)", code)}
            expected = {"LDG.E.128"} if target == "sm_80" else {"LDG.E.128", "UCGABAR_ARV"}  # a barrier of a cluster
            assert has == expected, (target, kernel_of(symbol))
