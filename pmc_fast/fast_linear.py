"""The linear layers of a model on a CPU, while it samples: weights packed for few rows, in the dtype that the CPU multiplies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import MethodType

import torch
from torch import Tensor, nn

from pmc_fast import huge_pages
from pmc_fast.backend import missing_library
from pmc_fast.memory import free_bytes
from pmc_fast.native.packed_linear import (
    PackedWeight,
    in_place,
    multiplies_bfloat16,
    pack,
    packed_bytes,
    packed_linear,
)
from pmc_fast.sharding import is_dtensor, kind

# Of the memory that is free, how much copies of weights in the library's own layout take at most, for one sampling call.
PACKED_SHARE = 0.25

# On an Intel Xeon oneDNN's products take up to 15 % less time than MKL's with 16 rows, 2 to 22 % more with 384 and 557.
MKL_ROWS = 384

# From so many rows on, torch's products of bfloat16, where they are fast, take less time than this library's by pairs.
TORCH_ROWS = 256

# The copies of the block under way; None outside of one.
_copies: ContextVar[_Copies | None] = ContextVar("pmc_fast_copies", default=None)


class _Copies:
    """Packed weights, by the identity of what they are copies of: in this order, as many as so many bytes have room for."""

    def __init__(self, weights: Sequence[Tensor], room: int) -> None:
        parts: dict[tuple, tuple[Tensor, int, int]] = {}
        end = 0
        for weight in weights:
            if _identity(weight) not in parts and end + (needed := packed_bytes(weight, _rounded(weight))) <= room:
                parts[_identity(weight)] = weight, end, end + needed
                end += needed
        memory = huge_pages.empty(end)
        self._held = {
            name: pack(weight, memory[begin:end], _rounded(weight)) for name, (weight, begin, end) in parts.items()
        }
        self._scratch = torch.empty(0, dtype=torch.uint8, device="cpu")

    def of(self, weight: Tensor) -> PackedWeight | None:
        """The copy of this weight, if there is one."""
        return self._held.get(_identity(weight))

    def scratch(self, nbytes: int) -> Tensor:
        if len(self._scratch) < nbytes:
            self._scratch = torch.empty(0, dtype=torch.uint8, device="cpu")  # goes first
            self._scratch = huge_pages.empty(nbytes)
        return self._scratch[:nbytes]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, without gradients, written to `out` [N, out_features] of the same dtype if that is given.

    float32 on a CPU goes through oneDNN where it is built in: MKL, which torch prefers, reaches only half to nine tenths of
    that rate on AMD's CPUs. On Intel's it leads with many rows.
    """
    if _takes_onednn(x, weight) and not (x.numel() >= MKL_ROWS * x.shape[-1] and _has_good_mkl()):
        product = _onednn(x, weight, bias)
        return product if out is None else out.copy_(product)
    if out is None:
        return nn.functional.linear(x, weight, bias)
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def add_linear(x: Tensor, weight: Tensor, to: Tensor) -> None:
    """to += x @ weight.T, without gradients. oneDNN adds up through a copy, and so does a `to` of another dtype."""
    if _takes_onednn(x, weight) and not _has_good_mkl():
        to += _onednn(x, weight, None)
    elif to.dtype == x.dtype:
        to.addmm_(x, weight.T)
    else:
        to += nn.functional.linear(x, weight)


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    float32 = x.dtype == torch.float32 and x.device.type == "cpu"
    return bool(float32 and x.numel() and weight.numel() and _has_onednn() and _is_dense(weight))


def _is_dense(weight: Tensor) -> bool:
    """Whether it lies row by row, or column by column, without gaps: oneDNN's products with any other are a thousand times as slow."""
    return weight.is_contiguous() or weight.T.is_contiguous()


def _has_good_mkl() -> bool:
    return _is_intel() and torch.backends.mkl.is_available()


@cache
def has_fast_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 faster than float32 here.

    Without instructions for it, it is several times slower. With AVX-512's alone an AMD EPYC takes half as long as for float32, an
    Intel Xeon 1.6 to 1.9 times as long, so there it takes AMX.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    return torch.cpu._is_amx_tile_supported() or not _is_intel()


def rounds_inputs() -> bool:
    """Whether this library's products with bfloat16 weights round their inputs to bfloat16, too, and multiply two at a time.

    On AMD's CPUs with an instruction for it, whether or not torch's products are fast, since a step of few rows is no large product.
    """
    return not _is_intel() and missing_library() is None and multiplies_bfloat16()


@cache
def _is_intel() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in file)
    except OSError:
        return False


@contextmanager
def fast_linear(model: nn.Module, head: Tensor | None = None) -> Iterator[None]:
    """Within a with block, the model's linear layers on a CPU multiply faster where no gradients are asked for.

    Their weights must not change meanwhile: they are packed once into the layout that the library multiplies from (as many as
    PACKED_SHARE has room for), which pays when few rows are multiplied many times. See `operand` for the others.

    Args:
        model: its layers of type nn.Linear and transformers' Conv1D are changed and, in the end, restored; its weights are whole.
        head: a weight [V, D] that is multiplied outside of the model's layers: see `packed`.
    """
    for module in model.modules():
        if getattr(module, "merged", False) and getattr(module, "disable_adapters", False):
            module.unmerge()  # as PEFT does when the layer is called next, which is too late for a copy
    layers = {
        module: matrix
        for module in model.modules()
        if "forward" not in vars(module) and (matrix := matrix_of(module)) is not None and _gains(matrix)
    }
    copies = None
    if missing_library() is None:
        weights = [*layers.values(), *([] if head is None or not _gains(head) else [head])]
        copies = _Copies(weights, int(free_bytes(torch.device("cpu")) * PACKED_SHARE))
    token = _copies.set(copies)
    try:
        for layer, matrix in layers.items():
            if packed(matrix) or (_has_onednn() and matrix.is_contiguous()):
                layer.forward = MethodType(_forward, layer)
        yield
    finally:
        _copies.reset(token)
        for layer in layers:
            vars(layer).pop("forward", None)


def matrix_of(layer: nn.Module) -> Tensor | None:
    """The weight [O, D] by which a layer of type nn.Linear or transformers' Conv1D multiplies; None if it is another, or in parts."""
    weight = weight_of(layer)
    return None if weight is None or is_dtensor(weight) else weight


def weight_of(layer: nn.Module) -> Tensor | None:
    """As `matrix_of`, in parts, too."""
    cls = kind(layer)
    if cls is nn.Linear:
        return layer.weight
    is_conv1d = (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")
    return layer.weight.T if is_conv1d else None


def is_fast(layer: nn.Module) -> bool:
    """Whether a `fast_linear` block around replaces the layer's forward."""
    return getattr(vars(layer).get("forward"), "__func__", None) is _forward


def packed(weight: Tensor) -> PackedWeight | None:
    """The copy of this weight in the library's own layout, if there is a `fast_linear` block around that made one."""
    copies = _copies.get()
    return None if copies is None else copies.of(weight)


def scratch(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory [rows, columns] for what lives shorter than the next call of this, kept by the `fast_linear` block around, if any.

    malloc would have the system make fresh pages for more than 32 MiB each time.
    """
    copies, size = _copies.get(), (rows, columns)
    if copies is None:
        return torch.empty(size, dtype=dtype, device="cpu")
    return copies.scratch(rows * columns * dtype.itemsize).view(dtype).view(size)


def operand(weight: Tensor, begin: int = 0, end: int | None = None) -> PackedWeight | None:
    """weight[begin:end] for the library's own product, within a `fast_linear` block: of the copy, or where there is none, or no
    panel begins there, as it lies in memory; None where torch's product is the faster one, or the only one."""
    if _copies.get() is None or not _gains(weight):
        return None
    end = len(weight) if end is None else end
    copy = packed(weight)
    return (copy and copy.rows(begin, end)) or in_place(weight[begin:end], _rounded(weight))


def _identity(weight: Tensor) -> tuple:
    return weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def _gains(weight: Tensor) -> bool:
    narrow = weight.dtype == torch.bfloat16 and (rounds_inputs() or not has_fast_bfloat16())
    return weight.device.type == "cpu" and weight.numel() > 0 and (weight.dtype == torch.float32 or narrow)


def _rounded(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and rounds_inputs()


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    matrix = matrix_of(layer)  # None of one parametrized since, as PEFT does for the time of a layer's call
    differentiated = x.requires_grad and torch.is_grad_enabled()  # in the trial of `LanguageModel.unpackable`
    if matrix is None or differentiated or x.dtype != matrix.dtype or not x.numel():
        return type(layer).forward(layer, x)
    multiply = _multiply_unseen if torch.compiler.is_compiling() else _multiply
    return multiply(x, matrix, layer.bias)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float32, from the copy of the weight, if there is one, or from the weight as it is: oneDNN where it need not be widened.

    Many rows of bfloat16 by torch where it multiplies it fast.
    """
    if weight.dtype == torch.bfloat16 and has_fast_bfloat16() and x.numel() >= TORCH_ROWS * x.shape[-1]:
        return nn.functional.linear(x, weight, bias)
    wide, bias = x.float(), None if bias is None else bias.float()
    own = operand(weight) if packed(weight) or weight.dtype != torch.float32 else None
    product = _onednn(wide, weight.float(), bias) if own is None else packed_linear(wide, own, bias)
    return product.to(x.dtype)


# For a compiler, since copies are those of a call, and what is compiled serves many.
_multiply_unseen = torch.library.custom_op("pmc_fast::fast_linear", _multiply, mutates_args=())


@_multiply_unseen.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.contiguous()  # its stride would be taken for 1
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
