"""Which implementations of each op exist on this machine, and which one a call uses."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec

from pmc_fast.errors import BackendUnavailable, described
from pmc_fast.warning import warn

# Every implementation of an op is the function of the op's name in the module of the op's name in one of these.
PACKAGES = {
    "cuda": "pmc_fast.cuda",
    "triton": "pmc_fast.kernels",
    "native": "pmc_fast.native",
    "reference": "pmc_fast.reference",
}

# Fastest first; native is for CPUs, triton and cuda for GPUs.
IMPLEMENTATIONS = {
    "collapse_loss": ("native", "triton", "reference"),
    "decode_attention": ("native", "triton", "reference"),
    "linear_logprob": ("native", "triton", "reference"),
    "linear_sample": ("native", "triton", "cuda", "reference"),
    "packed_attention": ("native", "reference"),
    "rouge_l_recall": ("native", "reference"),
    "sample": ("native", "triton", "cuda", "reference"),
}

DTYPES = {
    "native": ("float32", "bfloat16"),
    "triton": ("float32", "bfloat16", "float16"),
    "cuda": ("float32", "bfloat16"),
}

# Slower than Triton but for some options: for those who ask for it, and ops that prefer it (`pmc_fast.ops.sample.preferred`).
ONLY_IF_NAMED = ("cuda",)


def why_not(op: str, impl: str, device_type: str = "cpu", dtype: object = None) -> str | None:
    """The reason why `impl` cannot run `op` on tensors of this device and dtype, or None if it can.

    Raises ValueError for an `op` that is none, or a `device_type` that is no device's.
    """
    _check_call(op, device_type)
    if impl not in IMPLEMENTATIONS[op]:
        return f"this version has no {impl} implementation of {op}"
    if impl == "native":
        if reason := missing_library():
            return reason
        if device_type != "cpu":
            return f"the native implementation runs on the CPU, the tensors are on {device_type}"
    if impl == "triton" and (reason := _why_not_triton(device_type)):
        return reason
    if impl == "cuda" and (reason := _why_not_cuda(device_type)):
        return reason
    if impl in DTYPES and dtype is not None and (name := str(dtype).removeprefix("torch.")) not in DTYPES[impl]:
        return f"the {impl} implementation takes {', '.join(DTYPES[impl])}, not {name}"
    return None


def _why_not_triton(device_type: str) -> str | None:
    if device_type == "cuda" or (device_type == "cpu" and interpreting()):
        return missing_triton()
    return (
        f"Triton's kernels run on GPUs, the tensors are on {device_type} (to run them on the CPU, slowly, in Triton's "
        "interpreter, set TRITON_INTERPRET=1 before Python starts)"
    )


def _why_not_cuda(device_type: str) -> str | None:
    cuda = import_module("pmc_fast.cuda")
    try:
        targets = cuda.library().TARGETS
    except BackendUnavailable as error:
        return str(error)
    if device_type != "cuda":
        return f"the CUDA kernels run on GPUs (built for {targets}), the tensors are on {device_type}"
    return cuda.too_old()


def choose(op: str, impl: str | None, device_type: str = "cpu", dtype: object = None, prefer: str | None = None) -> str:
    """The implementation to use: the one named, or the fastest that can run these inputs, `prefer` before all others.

    Raises:
        ValueError: `impl` is not the name of an implementation, `op` of an op, or `device_type` of a type of device.
        BackendUnavailable: the one named cannot run; it never falls back to another.
    """
    check(impl)
    _check_call(op, device_type)
    if impl is None:
        if prefer is not None and why_not(op, prefer, device_type, dtype) is None:
            return prefer
        for name in IMPLEMENTATIONS[op]:
            if name in ONLY_IF_NAMED or (name == "triton" and device_type == "cpu"):
                continue  # and the interpreter is for those who ask for it
            reason = why_not(op, name, device_type, dtype)
            if reason is None:
                return name
            if name == "native" and reason == missing_library():
                _warn_once(reason)
        raise BackendUnavailable(f"no implementation of {op} runs on {device_type} with {dtype}")
    if reason := why_not(op, impl, device_type, dtype):
        raise BackendUnavailable(f"{op}(impl={impl!r}): {reason}")
    return impl


def check(impl: str | None) -> None:
    """That it is None or the name of an implementation, of whichever op."""
    if impl is not None and (not isinstance(impl, str) or impl not in PACKAGES):
        raise ValueError(f"impl: got {impl!r}, expected None or one of {', '.join(map(repr, PACKAGES))}")


def _check_call(op: str, device_type: str) -> None:
    if op not in IMPLEMENTATIONS:
        raise ValueError(f"op: got {described(op)}, expected one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if not isinstance(device_type, str) or ":" in device_type:
        raise ValueError(f"device_type: got {device_type!r}, expected a device's type, such as 'cpu' or 'cuda'")


def load(op: str, impl: str, function: str | None = None) -> Callable:
    """The function that implements `op`, or another one of its module; its first argument is a tensor."""
    found = getattr(import_module(f"{PACKAGES[impl]}.{op}"), function or op)
    return _on_its_device(found) if impl == "triton" else found


@cache
def _on_its_device(function: Callable) -> Callable:
    """Triton launches on the current device, whatever the tensors' is."""
    import torch

    @wraps(function)
    def call(tensor, *args, **options):
        with torch.cuda.device_of(tensor):
            return function(tensor, *args, **options)

    return call


@cache
def missing_library() -> str | None:
    """Why the compiled module cannot be loaded, or None if it can."""
    try:
        import_module("pmc_fast.native").library()
    except BackendUnavailable as error:
        return str(error)
    return None


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@cache
def missing_triton() -> str | None:
    """Why Triton cannot be imported, or None if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed: run `pip install triton`"
    return None


@cache
def _warn_once(reason: str) -> None:
    warn(f"pmc_fast runs on its slow reference implementations: {reason}")
