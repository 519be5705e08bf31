"""What a decoder layer is made of, with gradients: products, norms, rotary embedding, activation.

Between a layer's products a training step is bound by memory, so each of these is one pass over it, forward and backward, where
eager modules make several and keep what lies between them. On a CPU all is float32. On a GPU what goes into products and comes out
of them has the model's dtype, and the sum that the layers add to is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from pmc_fast import gpu
from pmc_fast.decoder_layers import LinearParts, NormParts
from pmc_fast.fast_linear import linear
from pmc_fast.native import elementwise as native
from pmc_fast.ops._autograd import once


def kernels_for(x: Tensor) -> Any:
    """The module of norm, rotation and activation for tensors where x is."""
    return gpu.kernels("elementwise_gradient") if x.device.type == "cuda" else native


def products(x: Tensor, parts: Sequence[LinearParts]) -> list[Tensor]:
    """[x @ part.weight.T + part.bias, and what its adapters add, for each part]; x [N, D].

    Weights of 16 bits are widened to x's dtype, one at a time, and their gradients are rounded to their own.
    """
    wholes, places = [], []
    for part in parts:
        # Further rows of the one before, or the same once more: two parts may share a weight.
        if part.begin == 0 or wholes[-1] is not part.whole:
            wholes.append(part.whole)
        places.append((len(wholes) - 1, part.begin, part.begin + len(part.weight)))
    results = []
    for y, part in zip(_Products.apply(x, places, *wholes), parts, strict=True):
        if part.bias is not None:
            y = y + part.bias.to(y.dtype)
        for down, up, scale in part.adapters:
            kind = torch.promote_types(x.dtype, down.dtype)
            y = torch.addmm(y.to(kind), x.to(kind) @ down.to(kind).T, up.to(kind).T, alpha=scale).to(x.dtype)
        results.append(y)
    return results


def normalize(x: Tensor, parts: NormParts) -> Tensor:
    """The norm of rows [N, size]."""
    return _Normalize.apply(x, parts.weight, parts.bias, parts.epsilon, parts.centered, parts.offset)


def add_and_normalize(x: Tensor, added: Tensor, parts: NormParts) -> tuple[Tensor, Tensor]:
    """x + added, float32 as x is, and the norm of that."""
    return _AddAndNormalize.apply(x, added, parts.weight, parts.bias, parts.epsilon, parts.centered, parts.offset)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rows [N, H, D] turned by angles [N, R]: element i of a head is paired with element i + R / 2."""
    return _Rotate.apply(x, cosine, sine)


def activate(gate: Tensor, activation: str, up: Tensor | None = None) -> Tensor:
    """activation(gate) * up; without `up`, activation(gate)."""
    return _Activate.apply(gate, activation, up)


def activated_product(gate: Tensor, activation: str, up: Tensor | None, part: LinearParts) -> Tensor:
    """The product of activate(gate, activation, up), which the backward pass makes anew rather than keep it."""
    x = activate(gate, activation, up)
    gate, up = gate.detach(), None if up is None else up.detach()
    address = x.data_ptr()  # x itself would be kept by what refers to it

    def keep(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == address else saved

    def take(kept: Tensor | None) -> Tensor:
        return kernels_for(gate).activate(gate, activation, up) if kept is None else kept

    with saved_tensors_hooks(keep, take):
        return products(x, (part,))[0]


def _once(backward: Callable) -> Callable:
    """A backward pass that cannot be differentiated."""

    @wraps(backward)
    def without_graph(ctx, *grads):
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        return once("the hidden states of a packed batch", gradients, grads)

    return without_graph


class _Products(Function):
    @staticmethod
    def forward(ctx, x, places, *wholes):
        ctx.save_for_backward(x if any(ctx.needs_input_grad[2:]) else None, *wholes)
        ctx.places = places
        return tuple(linear(x, wholes[index][begin:end].to(x.dtype)) for index, begin, end in places)

    @staticmethod
    @_once
    def backward(ctx, *grads):
        x, *wholes = ctx.saved_tensors
        to_x, to_wholes = None, [None] * len(wholes)
        for (index, begin, end), grad in zip(ctx.places, grads, strict=True):
            whole = wholes[index]
            if ctx.needs_input_grad[2 + index]:
                if to_wholes[index] is None:
                    complete = end - begin == len(whole)
                    to_wholes[index] = torch.empty_like(whole) if complete else torch.zeros_like(whole)
                _write_product(grad.T, x, to_wholes[index][begin:end])
            if ctx.needs_input_grad[0]:
                weight = whole[begin:end].to(grad.dtype)
                to_x = grad @ weight if to_x is None else to_x.addmm_(grad, weight)
        return to_x, None, *to_wholes


def _write_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


class _Normalize(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, epsilon, centered, offset):
        y, stats = kernels_for(x).normalize(x, weight, bias, epsilon, centered, offset)
        ctx.save_for_backward(x, stats, weight)
        ctx.options = {"centered": centered, "offset": offset}
        return y

    @staticmethod
    @_once
    def backward(ctx, grad):
        needs = {"need_weight": ctx.needs_input_grad[1], "need_bias": ctx.needs_input_grad[2]}
        backward = kernels_for(grad).normalize_backward
        return *backward(grad, *ctx.saved_tensors, **needs, **ctx.options), None, None, None


class _AddAndNormalize(Function):
    @staticmethod
    def forward(ctx, x, added, weight, bias, epsilon, centered, offset):
        ctx.set_materialize_grads(False)
        total, y, stats = kernels_for(x).add_and_normalize(x, added, weight, bias, epsilon, centered, offset)
        ctx.save_for_backward(total, stats, weight)
        ctx.options = {"centered": centered, "offset": offset}
        return total, y

    @staticmethod
    @_once
    def backward(ctx, grad_total, grad):
        needs = {"need_weight": ctx.needs_input_grad[2], "need_bias": ctx.needs_input_grad[3]}
        backward = kernels_for(grad).normalize_backward
        # Nobody reads the sum's gradient any more: whatever else needed it lies behind what gave `grad`.
        gradients = backward(grad, *ctx.saved_tensors, **needs, **ctx.options, out=grad_total)
        return gradients[0], *gradients, None, None, None


class _Rotate(Function):
    @staticmethod
    def forward(ctx, x, cosine, sine):
        ctx.save_for_backward(cosine, sine)
        return kernels_for(x).rotate(x, cosine, sine)

    @staticmethod
    @_once
    def backward(ctx, grad):
        return kernels_for(grad).rotate_backward(grad, *ctx.saved_tensors), None, None


class _Activate(Function):
    @staticmethod
    def forward(ctx, gate, activation, up):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return kernels_for(gate).activate(gate, activation, up)

    @staticmethod
    @_once
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = kernels_for(grad).activate_backward(grad, gate, ctx.activation, up)
        return grad_gate, None, grad_up
