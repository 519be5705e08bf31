"""The choice of implementation: the fastest that can run, or exactly the one named."""

import builtins
import inspect
import warnings
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from tiny import make_model

import pmc_fast
from pmc_fast import Sampler, backend, cuda, native
from pmc_fast.backend import IMPLEMENTATIONS, choose, load, why_not
from pmc_fast.errors import BackendUnavailable


@pytest.fixture
def no_library(monkeypatch):
    """A machine on which the compiled module cannot be loaded."""
    real = builtins.__import__

    def refuse(name, globals=None, locals=None, fromlist=(), level=0):
        if name == "pmc_fast" and "_C" in (fromlist or ()):
            raise ImportError("libgomp.so.1: cannot open shared object file")
        return real(name, globals, locals, fromlist, level)

    caches = (native.library, backend.missing_library, backend._warn_once)
    for function in caches:
        function.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    yield
    monkeypatch.undo()
    for function in caches:
        function.cache_clear()


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_every_implementation_takes_the_same_arguments(op):
    reference = inspect.signature(load(op, "reference")).parameters
    for impl in IMPLEMENTATIONS[op]:
        assert callable(load(op, impl))
        parameters = inspect.signature(load(op, impl)).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in (*parameters.values(), *reference.values())):
            assert set(reference) <= set(parameters)


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", torch.float32, "native"),
        ("cpu", torch.bfloat16, "native"),
        ("cpu", torch.float16, "reference"),
        ("cpu", torch.float64, "reference"),
        ("cpu", "float32", "native"),
        ("cuda", torch.float16, "triton"),
        ("cuda", torch.float64, "reference"),
    ],
)
def test_the_fastest_that_can_run(op, device, dtype, expected):
    expected = expected if expected in IMPLEMENTATIONS[op] else "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the library is there
        assert choose(op, None, device, dtype) == expected


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_the_one_named_or_an_error(op):
    assert choose(op, "reference") == "reference" and choose(op, "native") == "native"
    with pytest.raises(BackendUnavailable, match=rf"{op}\(impl='native'\).*not float16"):
        choose(op, "native", "cpu", torch.float16)
    with pytest.raises(BackendUnavailable, match="the tensors are on cuda"):
        choose(op, "native", "cuda", torch.float32)
    with pytest.raises(ValueError, match=r"impl: got 'Native', expected None or one of 'cuda', 'triton', 'native'"):
        choose(op, "Native")


def test_what_is_no_op_or_type_of_device():
    for ask in (choose, why_not):
        with pytest.raises(ValueError, match="^op: got 'rouge', expected one of 'collapse_loss', "):
            ask("rouge", "native")
        for device in (torch.device("cpu"), "cuda:0", None):
            with pytest.raises(ValueError, match="^device_type: got .*, expected a device's type, such as 'cpu'"):
                ask("sample", "reference", device)


@pytest.fixture(params=["built with CUDA", "built without CUDA"])
def cuda_module(request, monkeypatch):
    """The compiled module for GPUs, or what happens where there is none."""

    def library():
        if request.param == "built without CUDA":
            raise BackendUnavailable("pmc_fast was built without its CUDA kernels")
        return SimpleNamespace(TARGETS="sm_80, sm_90a")

    monkeypatch.setattr(cuda, "library", library)
    return request.param


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_cuda_runs_on_gpus_and_only_if_named_or_preferred(op, cuda_module, monkeypatch):
    with monkeypatch.context() as patch:
        for missing in (None, "Triton is not installed"):
            patch.setattr(backend, "missing_triton", lambda missing=missing: missing)
            assert choose(op, None, "cuda", torch.bfloat16) != "cuda"
    if "cuda" not in IMPLEMENTATIONS[op]:
        reason = f"no cuda implementation of {op}"
    elif cuda_module == "built with CUDA":
        reason = r"run on GPUs \(built for sm_80, sm_90a\), the tensors are on cpu"
        if not torch.cuda.is_available():
            assert choose(op, "cuda", "cuda", torch.bfloat16) == "cuda"
            assert choose(op, None, "cuda", torch.bfloat16, "cuda") == "cuda"
        with pytest.raises(BackendUnavailable, match="takes float32, bfloat16, not float16"):
            choose(op, "cuda", "cuda", torch.float16)
    else:
        reason = "built without its CUDA kernels"
    with pytest.raises(BackendUnavailable, match=reason):
        choose(op, "cuda")


@pytest.mark.parametrize("op", ["sample", "linear_sample"])
def test_what_is_preferred_must_be_able_to_run(op, cuda_module):
    assert choose(op, None, "cuda", torch.float16, "cuda") == "triton"
    assert choose(op, None, "cpu", torch.float32, "cuda") == "native"
    assert choose(op, "reference", "cuda", torch.float32, "cuda") == "reference"
    if cuda_module == "built without CUDA":
        assert choose(op, None, "cuda", torch.float32, "cuda") == "triton"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_p": 0.95}, "cuda"),
        ({"top_p": 0.95, "temperature": 0.7}, "cuda"),
        ({"top_p": 0.95, "min_p": 0.1}, None),
        ({}, None),
        ({"min_p": 0.1}, None),
        ({"top_p": 0.95, "top_k": 50}, None),
        ({"top_p": 0.95, "temperature": 0.0}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["sample", "linear_sample"])
def test_top_p_alone_prefers_cuda_on_gpus(op, options, expected, monkeypatch):
    """What the ops ask for: the tensors stay on the CPU, only their device's name is another."""
    asked = []

    def on_a_gpu(op, impl, device_type, dtype, prefer):
        asked.append((op, impl, dtype, prefer))
        return "reference"

    module = import_module(f"pmc_fast.ops.{op}")
    monkeypatch.setattr(backend, "choose", on_a_gpu)
    tensors = [torch.zeros(2, 5)] if op == "sample" else [torch.zeros(2, 3), torch.zeros(5, 3)]
    getattr(pmc_fast, op)(*tensors, **options)
    rule = module.preferred
    monkeypatch.setattr(module, "preferred", lambda device_type, *given: rule("cuda", *given))
    getattr(pmc_fast, op)(*tensors, **options)
    assert asked == [(op, None, torch.float32, None), (op, None, torch.float32, expected)]


def test_a_gpu_too_old_for_the_kernels(cuda_module, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for capability, old in (((7, 5), True), ((8, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        reason = why_not("sample", "cuda", "cuda", torch.float32)
        if cuda_module == "built with CUDA":
            assert reason == (
                "the CUDA kernels (built for sm_80, sm_90a) need a GPU of compute capability 8.0 or later, Tesla T4 has 7.5"
                if old
                else None
            )
        else:
            assert "built without" in reason


def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("sample", "triton", "cpu", torch.float16) == "triton"
    assert "the tensors are on mps" in why_not("sample", "triton", "mps", torch.float16)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(
        BackendUnavailable, match=r"sample\(impl='triton'\): Triton's kernels run on GPUs.*TRITON_INTERPRET"
    ):
        choose("sample", "triton", "cpu", torch.float32)
    assert choose("sample", "triton", "cuda", torch.float32) == "triton"
    with pytest.raises(BackendUnavailable, match="takes float32, bfloat16, float16, not float64"):
        choose("sample", "triton", "cuda", torch.float64)


@pytest.mark.parametrize(
    ("value", "interprets"),
    [("1", True), ("True", True), ("yes", True), ("ON", True), ("y", True), ("0", False), ("", False), ("no", False)],
)
def test_what_turns_tritons_interpreter_on(value, interprets, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert backend.interpreting() == interprets


def test_whether_triton_is_there(monkeypatch):
    for found in (None, object()):
        monkeypatch.setattr(backend, "find_spec", lambda name, found=found: found)
        assert (backend.missing_triton.__wrapped__() is None) == (found is not None)


def test_without_triton_naming_it_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(backend, "missing_triton", lambda: "Triton is not installed: run `pip install triton`")
    with pytest.raises(BackendUnavailable, match="pip install triton"):
        choose("collapse_loss", "triton", "cuda", torch.float32)
    assert choose("collapse_loss", None, "cuda", torch.float32) == "reference"


def test_without_the_compiled_module_the_reference_runs_and_says_so_once(no_library, recwarn):
    assert choose("sample", None, "cpu", torch.float32) == "reference"
    assert choose("sample", None, "cpu", torch.float32) == "reference"
    assert len([w for w in recwarn if "slow reference implementations" in str(w.message)]) == 1


def test_the_warning_names_the_line_that_called_the_op(no_library, recwarn):
    pmc_fast.sample(torch.zeros(1, 3))
    (warned,) = (w for w in recwarn if "slow reference implementations" in str(w.message))
    assert warned.filename == __file__


def test_without_the_compiled_module_the_sampler_samples(no_library, rng_seed):
    model, prompt = make_model(seed=rng_seed), torch.tensor([[1, 2, 3]])
    options = {"num_samples": 3, "max_new_tokens": 5, "eos_token_id": 257, "seed": rng_seed}
    with pytest.warns(UserWarning, match="slow reference implementations"):
        samples = Sampler(model).sample(prompt, **options)
    assert samples.tokens.shape[:2] == (1, 3)


def test_without_the_compiled_module_naming_it_is_an_error(no_library):
    reason = why_not("collapse_loss", "native")
    assert reason and ("libgomp" in reason or "pip install -e ." in reason)
    with pytest.raises(BackendUnavailable, match="collapse_loss"):
        choose("collapse_loss", "native")


def test_triton_runs_on_the_device_of_the_tensors(monkeypatch):
    """Which need not be the current one."""
    entered, left = [], []

    class DeviceOf:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            entered.append(self.tensor)

        def __exit__(self, *_):
            left.append(self.tensor)

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    values = torch.randn(3, 5)
    load("collapse_loss", "triton", "scale")(values, torch.ones(()))
    assert entered == left == [values]
    assert load("sample", "reference") is import_module("pmc_fast.reference.sample").sample
