"""What nvcc made of the CUDA kernels: read from the built module, no GPU needed."""

import re
import subprocess
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from pmc_fast.cuda import library

# Of a thread: two blocks of 256 threads fill an SM's 65536, and one of 384, which then divides them anew.
MOST_REGISTERS = {"sample_kernel": 128, "head_kernel": 168, "join_kernel": 128}
RESERVED_SHARED_BYTES = 1024  # the driver's own, from sm_90 on
# sample_kernel: float32 and bfloat16. head_kernel: by rows of a product of two warpgroups; empty but on Hopper.
INSTANCES = {"sample_kernel": 2, "head_kernel": 7, "join_kernel": 1}
HEAD_COLUMNS = {32: 1, 64: 1, 96: 2, 128: 2, 160: 1}  # of a warpgroup's product: how many instances


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


@pytest.fixture(scope="module")
def kernels(cuobjdump, targets):
    """Of each target, every kernel's name and instructions."""
    listed = {target: re.split(r"\n\s*Function : ", cuobjdump("-sass", "-arch", target))[1:] for target in targets}
    return [(target, kernel_of(code.split("\n", 1)[0]), code) for target, codes in listed.items() for code in codes]


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
            assert used["REG"] <= MOST_REGISTERS[key[1]], (key, used)
            assert used["SHARED"] <= RESERVED_SHARED_BYTES, (key, used)  # the rest is sized by the launch


def test_instructions(kernels):
    for target, name, code in kernels:
        if name == "head_kernel":
            continue
        has = set(re.findall(r"\b(LDG\.E\.128|STG\.E\.128|LDL|STL|ATOMS\.CAS|UCGABAR_ARV)", code))
        expected = {"LDG.E.128"} if target == "sm_80" else {"LDG.E.128", "UCGABAR_ARV"}  # a barrier of a cluster
        assert has == expected, (target, name)


def test_products_and_copies_by_hopper(kernels, targets):
    """Each step of 64 columns is four products for each half of a tile; copies are the tile and a share of the rows."""
    columns = Counter()
    for target, name, code in kernels:
        products = re.findall(r"\bHGMMA\.64x(\d+)x16\.F32\.BF16", code)
        copies = re.findall(r"\bUTMALDG\.2D(?:\.MULTICAST)?", code)
        if name != "head_kernel" or target != "sm_90a":
            assert not products and not copies, (target, name)
            continue
        assert len(products) == 8 and len(set(products)) == 1
        columns[int(products[0])] += 1
        assert copies == ["UTMALDG.2D", "UTMALDG.2D.MULTICAST"]
        assert not re.search(r"\b(LDL|STL|HMMA)\b", code)
        for instruction in ("LDG.E.128", "STG.E.128", "LDS.128", "USETMAXREG.TRY_ALLOC", "USETMAXREG.DEALLOC"):
            assert instruction in code
    assert columns == (HEAD_COLUMNS if "sm_90a" in targets else {})
