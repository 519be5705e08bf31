"""The linear layers of a float32 model on a CPU, by the faster of torch's two libraries."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, without gradients.

    float32 on a CPU goes through oneDNN where it is built in: MKL, which torch prefers, reaches only half to nine tenths
    of that rate on AMD's CPUs.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() and weight.numel() and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


@contextmanager
def fast_linear(model: nn.Module):
    """Within a with block, the model's nn.Linear layers compute with `linear`; for use without gradients."""
    layers = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)
