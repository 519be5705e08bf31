"""The linear layers of a model of bfloat16 in training, by products of float32, on CPUs that multiply these faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn
from torch.autograd import Function

from pmc_fast.fast_linear import has_fast_bfloat16, linear
from pmc_fast.models import LanguageModel
from pmc_fast.ops._autograd import in_transform, once
from pmc_fast.sharding import is_dtensor, kind


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
        layers = (
            [] if again else [module for module in modules if _forward_of(module) and "forward" not in vars(module)]
        )
        try:
            for layer in layers:
                layer.forward = MethodType(_forward_of(layer), layer)
            yield
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)


def _forward_of(module: nn.Module) -> Callable[[nn.Module, Tensor], Tensor] | None:
    """What takes the place of its forward, if it gains by that."""
    weight, cls = getattr(module, "weight", None), kind(module)
    if not isinstance(weight, Tensor) or weight.dtype != torch.bfloat16 or is_dtensor(weight) or not weight.numel():
        return None
    if cls is nn.Linear:
        return _linear
    return _conv1d if (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D") else None


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return _product(layer, x, layer.weight)


def _conv1d(layer: nn.Module, x: Tensor) -> Tensor:
    return _product(layer, x, layer.weight.T)


def _product(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    if not x.dtype == weight.dtype == torch.bfloat16 or not x.numel():  # what else comes is the layer's own affair
        return type(layer).forward(layer, x)
    y = _Wide.apply(x.reshape(-1, x.shape[-1]), weight, layer.bias)
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
