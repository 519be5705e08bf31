"""The CUDA C++ implementations: tensors to addresses and sizes. The only importer of pmc_fast._cuda."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from pmc_fast.errors import BackendUnavailable

LEAST_CAPABILITY = (8, 0)


@cache
def library() -> ModuleType:
    """The compiled module.

    Raises:
        BackendUnavailable: pmc_fast was built without CUDA, or the module cannot be loaded.
    """
    if find_spec("pmc_fast._cuda") is None:
        raise BackendUnavailable(
            "pmc_fast was built without its CUDA kernels: build it where nvcc is found (with PMC_FAST_CUDA=1 a missing nvcc "
            "is an error)"
        )
    try:
        return import_module("pmc_fast._cuda")
    except ImportError as error:
        raise BackendUnavailable(f"the compiled module pmc_fast._cuda cannot be loaded: {error}") from error


def too_old(device: torch.device | None = None) -> str | None:
    """Why a GPU, or else the current one, cannot run the kernels; None if it can or there is none."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= LEAST_CAPABILITY:
        return None
    least, got = (".".join(map(str, version)) for version in (LEAST_CAPABILITY, capability))
    return (
        f"the CUDA kernels (built for {library().TARGETS}) need a GPU of compute capability {least} or later, "
        f"{torch.cuda.get_device_name(device)} has {got}"
    )


def queue(tensor: Tensor) -> tuple[int, int]:
    """A GPU and torch's current stream on it, as the kernels take them.

    Raises:
        BackendUnavailable: the tensor is on no GPU, or on one older than the kernels.
    """
    if tensor.device.type != "cuda":
        raise BackendUnavailable(f"the CUDA kernels run on GPUs, the tensors are on {tensor.device}")
    if reason := too_old(tensor.device):
        raise BackendUnavailable(reason)
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def dtype_code(dtype: torch.dtype) -> int:
    """The compiled module's number for a torch dtype."""
    return {torch.float32: library().FLOAT32, torch.bfloat16: library().BFLOAT16}[dtype]
