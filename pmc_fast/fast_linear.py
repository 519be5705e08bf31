"""The linear layers of a model on a CPU, by the faster of torch's two libraries and in the dtype that the CPU multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn

# Weights copied into the library's own layout at most, for the time of one sampling call.
PACKED_BYTES = 2 << 30


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
def fast_linear(model: nn.Module, rows: int) -> Iterator[None]:
    """Within a with block, the model's nn.Linear layers on a CPU multiply faster; for use without gradients.

    Their weights must not change meanwhile: they are packed once, as float32, into the layout that the library multiplies
    from (at most PACKED_BYTES of them), which pays when few rows are multiplied many times.

    Args:
        model: its layers of type nn.Linear are changed and, in the end, restored.
        rows: how many rows most products will have, for the choice of layout.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    room = PACKED_BYTES
    for layer in layers if _has_onednn() else []:
        if not _gains(layer.weight):
            continue
        bytes_needed = layer.weight.numel() * 4
        packed = None
        if bytes_needed <= room:
            room -= bytes_needed
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().float(), max(1, rows))
        layer.forward = partial(_forward, layer, packed)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _gains(weight: Tensor) -> bool:
    slow = weight.dtype == torch.bfloat16 and not has_fast_bfloat16()
    return weight.device.type == "cpu" and weight.numel() > 0 and (weight.dtype == torch.float32 or slow)


def _forward(layer: nn.Linear, packed: Tensor | None, x: Tensor) -> Tensor:
    if x.dtype != layer.weight.dtype or not x.numel():
        return nn.functional.linear(x, layer.weight, layer.bias)
    weight = layer.weight.float() if packed is None else packed
    bias = None if layer.bias is None else layer.bias.float()
    return _onednn(x.float(), weight, bias).to(x.dtype)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
