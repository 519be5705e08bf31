"""The host side of implementations for GPUs: products by torch, the loss in chunks of rows, and how rows that are no distribution are reported."""

from importlib import import_module
from typing import Any


def kernels(name: str) -> Any:
    """A module of Triton kernels: imported where they run, since Triton need not be installed elsewhere."""
    return import_module(f"pmc_fast.kernels.{name}")
