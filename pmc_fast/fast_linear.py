"""The linear layers of a model on a CPU, while it samples: weights packed for few rows, in the dtype that the CPU multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial

import torch
from torch import Tensor, nn

from pmc_fast.errors import BackendUnavailable
from pmc_fast.memory import free_bytes
from pmc_fast.native import library
from pmc_fast.native.packed_linear import PackedWeight, pack, packed_bytes, packed_linear
from pmc_fast.sharding import is_dtensor, kind

# Of the memory that is free, how much copies of weights in the library's own layout take at most, for one sampling call.
PACKED_SHARE = 0.25

# On an Intel Xeon oneDNN's products take up to 22 % less time than MKL's with 16 to 256 rows, 3 to 12 % more with 557.
MKL_ROWS = 384

# The copies of the block under way, by the identity of the weights that they are of.
_packed: ContextVar[Mapping[tuple, PackedWeight]] = ContextVar("pmc_fast_packed", default={})  # noqa: B039


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """x @ weight.T + bias, without gradients.

    `out` [N, out_features] is written if it is given; with `accumulate`, the result is added to it.

    float32 on a CPU goes through oneDNN where it is built in: MKL, which torch prefers, reaches only half to nine tenths of
    that rate on AMD's CPUs. On Intel's it leads with many rows, and where it can add up without a copy.
    """
    float32 = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() and weight.numel()
    mkl = (accumulate or len(x) >= MKL_ROWS) and _is_intel() and torch.backends.mkl.is_available()
    if float32 and _has_onednn() and not mkl:
        product = _onednn(x, weight, bias)
    elif out is None or out.dtype != x.dtype:
        product = nn.functional.linear(x, weight, bias)
    elif accumulate:
        return out.addmm_(x, weight.T)
    elif bias is None:
        return torch.mm(x, weight.T, out=out)
    else:
        return torch.addmm(bias, x, weight.T, out=out)
    if out is None:
        return product
    return out.add_(product) if accumulate else out.copy_(product)


@cache
def has_fast_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 faster than float32 here.

    Without instructions for it, it is several times slower. With AVX-512's alone an Intel Xeon takes 1.6 to 1.9 times as long as
    for float32, so there it takes AMX; AMD's CPUs were not compared.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    return torch.cpu._is_amx_tile_supported() or not _is_intel()


@cache
def _is_intel() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in file)
    except OSError:
        return False


@contextmanager
def fast_linear(model: nn.Module, head: Tensor | None = None) -> Iterator[None]:
    """Within a with block, the model's nn.Linear layers on a CPU multiply faster; for use without gradients.

    Their weights must not change meanwhile: they are packed once into the layout that the library multiplies from (as many as
    PACKED_SHARE has room for), which pays when few rows are multiplied many times.

    Args:
        model: its layers of type nn.Linear are changed and, in the end, restored; its weights are whole.
        head: a weight [V, D] that is multiplied outside of the model's layers: see `packed`.
    """
    layers = [
        module
        for module in model.modules()
        if kind(module) is nn.Linear and "forward" not in vars(module) and not is_dtensor(module.weight)
    ]
    packs, room, held = _has_library(), int(free_bytes(torch.device("cpu")) * PACKED_SHARE), {}
    token = _packed.set(held)
    try:
        for layer in layers:
            if not _gains(layer.weight):
                continue
            if packs and (needed := packed_bytes(layer.weight)) <= room:
                room -= needed
                held[_identity(layer.weight)] = weight = pack(layer.weight)
                layer.forward = partial(_forward, layer, partial(packed_linear, weight=weight))
            elif _has_onednn():
                layer.forward = partial(_forward, layer, partial(_widened, weight=layer.weight))
        if head is not None and _gains(head) and packs and packed_bytes(head) <= room:
            held[_identity(head)] = pack(head)
        yield
    finally:
        _packed.reset(token)
        for layer in layers:
            vars(layer).pop("forward", None)


def is_fast(layer: nn.Module) -> bool:
    """Whether a `fast_linear` block around replaces the layer's forward."""
    forward = vars(layer).get("forward")
    return isinstance(forward, partial) and forward.func is _forward


def packed(weight: Tensor) -> PackedWeight | None:
    """The copy of this weight in the library's own layout, if there is a `fast_linear` block around that made one."""
    return _packed.get().get(_identity(weight))


def _identity(weight: Tensor) -> tuple:
    return weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def _has_library() -> bool:
    """Whether this library's own product is here."""
    try:
        library()
    except BackendUnavailable:
        return False
    return True


def _gains(weight: Tensor) -> bool:
    slow = weight.dtype == torch.bfloat16 and not has_fast_bfloat16()
    return weight.device.type == "cpu" and weight.numel() > 0 and (weight.dtype == torch.float32 or slow)


def _forward(layer: nn.Linear, multiply: Callable[..., Tensor], x: Tensor) -> Tensor:
    changed = kind(layer) is not nn.Linear  # parametrized since, as PEFT does for the time of a layer's call
    if changed or x.dtype != layer.weight.dtype or not x.numel():
        return nn.functional.linear(x, layer.weight, layer.bias)
    bias = None if layer.bias is None else layer.bias.float()
    return multiply(x.float(), bias=bias).to(x.dtype)


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float32, from the weight as it is."""
    return _onednn(x, weight.float(), bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
