"""What host code asks about a GPU before it configures a kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def device_of(tensor: Tensor) -> tuple[int, int]:
    """Capability and number of multiprocessors; in the interpreter an H100's."""
    if tensor.device.type == "cpu":
        return 90, 132
    properties = torch.cuda.get_device_properties(tensor.device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def dot_precision() -> str:
    """How kernels may multiply float32: as tf32 only where torch's own products may be.

    The older setting, `allow_tf32`, sets this one too, and refuses to be read once this one was set.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
