"""The linear layers of a model of bfloat16 in training, by products of float32, on CPUs that multiply these faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn
from torch.autograd import Function

from pmc_fast.fast_linear import has_fast_bfloat16, linear, matrix_of
from pmc_fast.models import LanguageModel
from pmc_fast.ops._autograd import in_transform, once


@contextmanager
def wide_linear(lm: LanguageModel) -> Iterator[None]:
    """Within a with block, the model's linear layers of bfloat16 multiply in float32 and round once; so do their backward passes.

    A weight is widened for the time of its product. Nothing changes with gradient checkpointing, whose second pass comes after the
    block, with autocast, in transforms of torch.func, under torch.compile, on other devices and where `has_fast_bfloat16` says so.

    Args:
        lm: its layers of type nn.Linear and transformers' Conv1D are changed and, in the end, restored.
    """
    if lm.device.type != "cpu" or has_fast_bfloat16() or torch.is_autocast_enabled("cpu") or in_transform():
        yield
        return
    with lm.turn:
        modules = [] if torch.compiler.is_compiling() else list(lm.backbone.modules())
        again = any(getattr(module, "gradient_checkpointing", False) for module in modules)
        layers = [] if again else [module for module in modules if _gains(module) and "forward" not in vars(module)]
        try:
            for layer in layers:
                layer.forward = MethodType(_forward, layer)
            yield
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)


def _gains(module: nn.Module) -> bool:
    matrix = matrix_of(module)
    return matrix is not None and matrix.dtype == torch.bfloat16 and matrix.numel() > 0


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    matrix = matrix_of(layer)
    if matrix is None or not x.dtype == matrix.dtype == torch.bfloat16 or not x.numel():  # the layer's own affair
        return type(layer).forward(layer, x)
    y = _Wide.apply(x.reshape(-1, x.shape[-1]), matrix, layer.bias)
    return y.view(*x.shape[:-1], -1)


class _Wide(Function):
    """x @ weight.T + bias; x [N, D], weight [O, D]."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs, wide = ctx.needs_input_grad, grad.float()
        with torch.no_grad():
            gradients = (
                (wide @ weight.float()).to(x.dtype) if needs[0] else None,
                (wide.T @ x.float()).to(weight.dtype) if needs[1] else None,
                wide.sum(0).to(weight.dtype) if needs[2] else None,
            )
        return once("the hidden states of a packed batch", gradients, (grad, x, weight))
