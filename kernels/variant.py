"""A kernel at one production configuration: all that its compilation needs, so that none of it needs a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One way in which an op launches one of its kernels; `variants(capability)` of each kernel file lists its own.

    Every argument of the kernel is in `signature` or in `constants`, an absent tensor in `constants` as None.
    """

    name: str  # "forward, Llama-3.2-3B, bfloat16": what a person would call it
    kernel: Any  # the function that @triton.jit made
    signature: Mapping[str, str]  # argument -> "*bf16", "i64", "fp32", ...
    constants: Mapping[str, Any]  # constexpr arguments
    num_warps: int
    num_stages: int
    matmul: bool = False  # multiplies matrices with tl.dot
    aligned: tuple[str, ...] = ()  # arguments, of `signature`, that 16 divides
