"""The host side of implementations for GPUs, and what they leave to torch."""

from importlib import import_module
from typing import Any


def kernels(name: str) -> Any:
    """A module of Triton kernels: imported where they run, since Triton need not be installed elsewhere."""
    return import_module(f"pmc_fast.kernels.{name}")
