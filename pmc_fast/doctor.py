"""What is installed, and which implementations work on this machine."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pmc_fast import backend
from pmc_fast.errors import BackendUnavailable

_PACKAGES = ("pmc_fast", "torch", "transformers", "tokenizers", "numpy", "nltk", "triton")


def environment(device: Any = "cpu") -> dict[str, Any]:
    """Versions and hardware, as a report holds them."""
    import torch

    native = backend.missing_library() is None
    values = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": cpu_name(),
        "cpus": usable_cpus(),
        "threads": torch.get_num_threads(),
        "instruction_set": _library().instruction_set() if native else None,
        "device": str(device),
        "implementations": {op: backend.choose(op, None, torch.device(device).type) for op in backend.IMPLEMENTATIONS},
    }
    if torch.device(device).type == "cuda":
        values["gpu"] = torch.cuda.get_device_name(device)
    return values


def doctor(options: argparse.Namespace) -> int:
    """Print the environment, and for each op and implementation whether it works here or why not."""
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    found = environment()
    print(f"python {found['python']}, {found['platform']}")
    for name, number in found["packages"].items():
        print(f"{name:<14}{number or 'not installed'}")
    print(f"\nCPU           {found['cpu']}, {found['cpus']} CPUs usable, {found['threads']} threads used")
    if backend.missing_library() is None:
        library = _library()
        usable = ", ".join(library.instruction_sets())
        print(f"instructions  {library.instruction_set()} (usable here: {usable}); threads by {library.THREADING}")
    else:
        print("instructions  unknown: the compiled module is not available")
    print(f"bfloat16      {_bfloat16()}")
    print(f"huge pages    {_huge_pages()}")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        print(f"GPU           {', '.join(names)} (CUDA {torch.version.cuda})")
    else:
        print(f"GPU           none that torch sees (torch built for {torch.version.cuda or 'the CPU'})")
    print(f"CUDA kernels  {_cuda_kernels()}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        print(f"\nimplementations on {device}")
        for op in backend.IMPLEMENTATIONS:
            print(f"  {op} (uses {backend.choose(op, None, device)})")
            for name in backend.PACKAGES:
                reason = backend.why_not(op, name, device)
                print(f"    {name:<11}{'works' if reason is None else 'no: ' + reason}")
    return 0


def _library() -> Any:
    from pmc_fast import native

    return native.library()


def _huge_pages() -> str:
    from pmc_fast import huge_pages

    setting = huge_pages.setting()
    if setting is None:
        return "none that Linux tells of"
    return "switched off here; see Speed in docs/troubleshooting.md" if setting == "never" else f"used ({setting})"


def _bfloat16() -> str:
    from pmc_fast.fast_linear import has_fast_bfloat16, rounds_inputs

    trained = "trained by torch's products" if has_fast_bfloat16() else "trained by products of float32"
    if rounds_inputs():
        return f"sampled by this library's products of pairs, {trained}"
    return f"sampled and {trained}"


def _cuda_kernels() -> str:
    from pmc_fast import cuda

    try:
        built = f"built for {cuda.library().TARGETS}"
    except BackendUnavailable as error:
        return f"none: {error}"
    if reason := cuda.too_old():
        return f"{built}; no: {reason}"
    return f"{built}; sample and linear_sample use them for top-p alone, or with impl='cuda'"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        if name != "pmc_fast":
            return None
    import pmc_fast

    return pmc_fast.__version__


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
