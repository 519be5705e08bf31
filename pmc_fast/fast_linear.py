"""The linear layers of a model on a CPU, by the faster of torch's two libraries and in the dtype that the CPU multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial

import torch
from torch import Tensor, nn

from pmc_fast.errors import BackendUnavailable
from pmc_fast.native import library, packed_linear

# Weights copied into the library's own layout at most, for the time of one sampling call.
PACKED_BYTES = 2 << 30

# The packed weights of the block under way, by the identity of those they are copies of.
_packed: ContextVar[Mapping[tuple, packed_linear.PackedWeight]] = ContextVar("pmc_fast_packed", default={})  # noqa: B039


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, without gradients.

    float32 on a CPU goes through oneDNN where it is built in: MKL, which torch prefers, reaches only half to nine tenths
    of that rate on AMD's CPUs.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() and weight.numel() and _has_onednn():
        return _onednn(x, weight, bias)
    return nn.functional.linear(x, weight, bias)


@cache
def has_fast_bfloat16() -> bool:
    """Without bfloat16 instructions torch multiplies bfloat16 several times slower than float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def fast_linear(model: nn.Module, rows: int, head: Tensor | None = None) -> Iterator[None]:
    """Within a with block, the model's nn.Linear layers on a CPU multiply faster; for use without gradients.

    Their weights must not change meanwhile: they are packed once, as float32, into the layout that the library multiplies
    from (at most PACKED_BYTES of them), which pays when few rows are multiplied many times.

    Args:
        model: its layers of type nn.Linear are changed and, in the end, restored.
        rows: how many rows most products will have, for the choice of layout.
        head: a weight [V, D] that is multiplied outside of the model's layers: see `packed`.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    room, held = PACKED_BYTES, {}
    for layer in layers if _has_onednn() else []:
        if not _gains(layer.weight):
            continue
        if (needed := _packed_bytes(layer.weight)) > room:
            layer.forward = partial(_forward, layer, _widen(layer.weight))
            continue
        room -= needed
        if _multiplies_packed():
            held[_identity(layer.weight)] = panels = packed_linear.pack(layer.weight)
            multiply = partial(_multiply_panels, panels)
        else:
            multiply = _reorder(layer.weight, rows)
        layer.forward = partial(_forward, layer, multiply)
    if head is not None and _gains(head) and _multiplies_packed() and _packed_bytes(head) <= room:
        held[_identity(head)] = packed_linear.pack(head)
    token = _packed.set(held)
    try:
        yield
    finally:
        _packed.reset(token)
        for layer in layers:
            vars(layer).pop("forward", None)


def packed(weight: Tensor) -> packed_linear.PackedWeight | None:
    """The packed copy of this weight, if there is a `fast_linear` block around that made one."""
    return _packed.get().get(_identity(weight))


def _identity(weight: Tensor) -> tuple:
    return weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def _multiplies_packed() -> bool:
    """Whether this library's own product is the faster one: with AVX2, not compared with AVX-512."""
    try:
        return library().instruction_set() == "avx2"
    except BackendUnavailable:
        return False


def _packed_bytes(weight: Tensor) -> int:
    return packed_linear.packed_bytes(weight) if _multiplies_packed() else weight.numel() * 4


def _widen(weight: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    """x, bias -> x @ weight.T + bias in float32, from the weight as it is."""
    return lambda x, bias: _onednn(x, weight.float(), bias)


def _reorder(weight: Tensor, rows: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    """x, bias -> x @ weight.T + bias in float32, from a copy in oneDNN's layout."""
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach().float(), max(1, rows))
    return lambda x, bias: _onednn(x, reordered, bias)


def _multiply_panels(panels: packed_linear.PackedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    return packed_linear.packed_linear(x, panels, bias)


def _gains(weight: Tensor) -> bool:
    slow = weight.dtype == torch.bfloat16 and not has_fast_bfloat16()
    return weight.device.type == "cpu" and weight.numel() > 0 and (weight.dtype == torch.float32 or slow)


def _forward(layer: nn.Linear, multiply: Callable[[Tensor, Tensor | None], Tensor], x: Tensor) -> Tensor:
    changed = type(layer) is not nn.Linear  # parametrized since, as PEFT does for the time of a layer's call
    if changed or x.dtype != layer.weight.dtype or not x.numel():
        return nn.functional.linear(x, layer.weight, layer.bias)
    bias = None if layer.bias is None else layer.bias.float()
    return multiply(x.float(), bias).to(x.dtype)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
