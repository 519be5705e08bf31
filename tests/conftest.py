"""For every test a fresh seed, printed so that a failure can be repeated, as many threads, and the GPU, if any."""

import fcntl
import gc
import math
import os
import resource
import secrets
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: the threads of workers side by side must not spin

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on the CPU
    if find_spec("triton"):
        import interpreter

        interpreter.keep_what_is_looked_up()

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # for `benchmarks`; last, so an installed pmc_fast wins

from pmc_fast.native import library  # noqa: E402

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads())


# Of the files that pytest collects last; a worker that began with one of them at the end would leave the other idle.
LONGEST = ("test_sanitizers.py", "test_static_decoder.py", "test_static_modules.py", "test_tensor_parallel.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish():
    """What has been imported stays: no later collection, of which some tests ask for many, looks at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def threads(request):
    """Two for ops, whose kernels divide rows among threads; no test inherits --threads, which holds for a process."""
    torch.set_num_threads(2 if "ops" in request.path.parts else THREADS)


@pytest.fixture(params=library().instruction_sets())
def isa(request):
    """Each instruction set that the compiled module has and this CPU, too."""
    before = library().instruction_set()
    library().use_instruction_set(request.param)
    yield request.param
    library().use_instruction_set(before)


@pytest.fixture
def each_isa():
    """Goes through these instruction sets within a test."""
    before = library().instruction_set()

    def go_through():
        for name in library().instruction_sets():
            library().use_instruction_set(name)
            yield name

    yield go_through
    library().use_instruction_set(before)


@pytest.fixture(autouse=True)
def what_a_process_keeps():
    """The next test starts without accelerate's state, which a Trainer or an Accelerator fixes, and without what was compiled, of
    which torch keeps so much for a function and then refuses to compile it again."""
    yield
    if "accelerate.state" in sys.modules:
        state = sys.modules["accelerate.state"]
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def cmake() -> Path:
    """That of this environment, which need not be activated."""
    return Path(sysconfig.get_path("scripts")) / "cmake"


@pytest.fixture(scope="session")
def emulated_module(cmake, tmp_path_factory):
    """pmc_fast._cuda, its kernels compiled for an emulated GPU, by the first worker that asks for it."""
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.getbasetemp()
    build = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "emulated"  # that of all workers
    configure = [cmake, "-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DPMC_FAST_CUDA=EMULATED"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    with open(build.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not next(build.glob("*.so"), None):
            for command in (configure, [cmake, "--build", build, "--target", "_cuda_emulated", "--parallel", "2"]):
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                assert done.returncode == 0, done.stdout
    spec = spec_from_file_location("_cuda_emulated", next(build.glob("*.so")))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulated_gpu(emulated_module, monkeypatch):
    """The CUDA implementations take tensors on the CPU."""
    from pmc_fast import backend, cuda

    monkeypatch.setattr(backend, "_why_not_cuda", lambda device_type: None)
    monkeypatch.setattr(cuda, "library", lambda: emulated_module)  # for what the package itself asks
    module = import_module("pmc_fast.cuda.sample")
    monkeypatch.setattr(module, "library", lambda: emulated_module)
    monkeypatch.setattr(module, "queue", lambda tensor: (0, 0))


@pytest.fixture
def file_size_limit():
    """A with block in which no file can grow beyond so many bytes, as on a full disk."""

    @contextmanager
    def limit(size):
        held = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, held[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, held)

    return limit


def _fresh_seed() -> int:
    return int(os.environ.get("PMC_FAST_TEST_SEED") or secrets.randbelow(2**31))


@pytest.fixture
def rng_seed() -> int:
    """A fresh seed, or PMC_FAST_TEST_SEED; torch's generator starts from it."""
    seed = _fresh_seed()
    print(f"PMC_FAST_TEST_SEED={seed}")
    torch.manual_seed(seed)
    return seed


@pytest.fixture(scope="module")
def module_seed() -> int:
    """One for what the tests of a module share; who hands that to a test prints it."""
    return _fresh_seed()


@pytest.fixture(autouse=True)
def on_the_gpu_if_there_is_one(request):
    """Tests of kernels for GPUs make their tensors there; without one the kernels run in Triton's interpreter or, as C++, on
    an emulated GPU."""
    parameters = getattr(request.node, "callspec", None)
    impl = parameters and parameters.params.get("impl")
    if not torch.cuda.is_available():
        if impl == "cuda":
            request.getfixturevalue("emulated_gpu")
        yield
        return
    if "kernels" not in request.path.parts and impl not in ("triton", "cuda"):
        yield
        return
    if request.node.get_closest_marker("refuses_values"):
        pytest.skip("a GPU refuses values by itself, and the process cannot use it afterwards")
    with torch.device("cuda"):
        torch.empty(0)  # torch notes then what makes tensors: before a test puts something in the place of torch.empty
        yield


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody has written to holds NaN, or a token that is not there by chance."""
    empty = torch.empty

    def poison(*args, **options):
        made = empty(*args, **options)
        return made.fill_(math.nan if made.is_floating_point() else 3)

    monkeypatch.setattr(torch, "empty", poison)
