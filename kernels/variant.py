"""A kernel at one production configuration: all that its compilation needs, so that none of it needs a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


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


class Model(NamedTuple):
    """A head of a model that `pmc_fast` is measured on."""

    name: str
    vocab: int
    size: int
    bias: bool = False
    softcap: bool = False

    def optional(self, kind: str) -> dict[str, str | None]:
        """The optional arguments that the head brings, where the bias is of `kind`."""
        return {"bias": kind if self.bias else None, "softcap": "fp32" if self.softcap else None}


MODELS = (
    Model("SmolLM2-135M", 49152, 576),
    Model("Phi-1.5", 51200, 2048, bias=True),
    Model("Llama-3.2-3B", 128256, 3072),
    Model("Gemma-3-12B", 262208, 3840, softcap=True),
)


class Attention(NamedTuple):
    """The attention of a model that `pmc_fast` is measured on."""

    model: str
    heads: int
    kv_heads: int
    dim: int


ATTENTIONS = (
    Attention("SmolLM2-135M", 9, 3, 64),
    Attention("Phi-1.5", 32, 32, 64),
    Attention("Gemma-3-12B", 16, 8, 256),
    Attention("Llama-3.2-3B", 24, 8, 128),
)


def present(optional: Mapping[str, str | None]) -> dict[str, str]:
    """Of a variant's optional arguments those that are given: for its signature."""
    return {argument: kind for argument, kind in optional.items() if kind is not None}


def absent(optional: Mapping[str, str | None]) -> dict[str, None]:
    """The others: for its constants."""
    return {argument: None for argument, kind in optional.items() if kind is None}
