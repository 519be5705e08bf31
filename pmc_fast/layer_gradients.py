"""What a decoder layer is made of, with gradients: products, norms, rotary embedding, activation.

Between a layer's products a training step is bound by memory, so each of these is one pass over it, forward and backward, where
eager modules make several and keep what lies between them. On a CPU all is float32. On a GPU what goes into products and comes out
of them has the model's dtype, and the sum that the layers add to is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pmc_fast import gpu
from pmc_fast.fast_linear import linear
from pmc_fast.layer_parts import LinearParts, NormParts
from pmc_fast.native import elementwise as native
from pmc_fast.ops._autograd import once


def kernels_for(x: Tensor) -> Any:
    """The module of norm, rotation and activation for tensors where x is."""
    return gpu.kernels("elementwise_gradient") if x.device.type == "cuda" else native


def products(x: Tensor, parts: Sequence[LinearParts]) -> list[Tensor]:
    """[x @ part.weight.T + part.bias, and what its adapters add, for each part]; x [N, D].

    Weights of 16 bits are widened to x's dtype, one at a time, and their gradients are rounded to their own. Of an x that
    `normalize`, `add_and_normalize` or `activate` made, nothing is kept: the backward pass makes it anew from what they keep.
    """
    wholes, places = [], []
    for part in parts:
        # Further rows of the one before, or the same once more: two parts may share a weight.
        if part.begin == 0 or wholes[-1] is not part.whole:
            wholes.append(part.whole)
        places.append((len(wholes) - 1, part.begin, part.begin + len(part.weight)))
    for part in parts:
        for down, _, _ in part.adapters:
            places.append((len(wholes), 0, len(down)))
            wholes.append(down)
    ys = list(_Products.apply(x, places, *wholes))
    low_ranks = iter(ys[len(parts) :])
    for number, part in enumerate(parts):
        if part.bias is not None:
            ys[number] = ys[number] + part.bias.to(x.dtype)
        for _, up, scale in part.adapters:
            low = next(low_ranks)  # which, and the sum, are as exact as the adapter is
            ys[number] = torch.addmm(ys[number].to(low.dtype), low, up.to(low.dtype).T, alpha=scale).to(x.dtype)
    return ys[: len(parts)]


def normalize(x: Tensor, parts: NormParts) -> Tensor:
    """The norm of rows [N, size]."""
    return _Normalize.apply(x, parts.weight, parts.bias, parts.epsilon, parts.centered, parts.offset)


def add_and_normalize(x: Tensor, added: Tensor, parts: NormParts) -> tuple[Tensor, Tensor]:
    """x + added, float32 as x is, and the norm of that."""
    norm = parts.weight, parts.bias, parts.epsilon, parts.centered, parts.offset
    y, total = _AddAndNormalize.apply(x, added, *norm)
    return total, y


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rows [N, H, D] turned by angles [N, R]: element i of a head is paired with element i + R / 2."""
    return _Rotate.apply(x, cosine, sine)


def activate(gate: Tensor, activation: str, up: Tensor | None = None) -> Tensor:
    """activation(gate) * up; without `up`, activation(gate)."""
    return _Activate.apply(gate, activation, up)


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
        ctx.needs_x = any(ctx.needs_input_grad[2:])
        # What made x as its first output has its backward pass after this one, so that it can make x anew until then.
        ctx.maker = x.grad_fn if hasattr(x.grad_fn, "anew") and x.output_nr == 0 and not _is_hooked() else None
        ctx.save_for_backward(x if ctx.needs_x and ctx.maker is None else None, *wholes)
        ctx.places = places
        # Adapters of a wider dtype than x are multiplied in it.
        kinds = [torch.promote_types(x.dtype, whole.dtype) for whole in wholes]
        return tuple(linear(x.to(kinds[i]), wholes[i][begin:end].to(kinds[i])) for i, begin, end in places)

    @staticmethod
    @_once
    def backward(ctx, *grads):
        x, *wholes = ctx.saved_tensors
        if ctx.needs_x and ctx.maker is not None:
            x = ctx.maker.anew(*ctx.maker.saved_tensors)
        to_x, to_wholes = None, [None] * len(wholes)
        for (index, begin, end), grad in zip(ctx.places, grads, strict=True):
            whole = wholes[index]
            if ctx.needs_input_grad[2 + index]:
                if to_wholes[index] is None:
                    complete = end - begin == len(whole)
                    to_wholes[index] = torch.empty_like(whole) if complete else torch.zeros_like(whole)
                _write_product(grad.T, x.to(grad.dtype), to_wholes[index][begin:end])
            if ctx.needs_input_grad[0]:
                weight = whole[begin:end].to(grad.dtype)
                if to_x is None:
                    to_x = grad @ weight
                elif to_x.dtype == grad.dtype:
                    to_x.addmm_(grad, weight)
                else:
                    to_x = to_x + grad @ weight
        return to_x, None, *to_wholes


def _is_hooked() -> bool:
    """Whether somebody else keeps what is saved, who may give it back but once, as torch.utils.checkpoint does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _write_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


class _Normalize(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, epsilon, centered, offset):
        y, stats = kernels_for(x).normalize(x, weight, bias, epsilon, centered, offset)
        ctx.save_for_backward(x, stats, weight, bias)
        ctx.options = {"centered": centered, "offset": offset}
        ctx.anew = partial(_norm_of, epsilon=epsilon, **ctx.options)
        return y

    @staticmethod
    @_once
    def backward(ctx, grad):
        x, stats, weight, _ = ctx.saved_tensors
        needs = {"need_weight": ctx.needs_input_grad[1], "need_bias": ctx.needs_input_grad[2]}
        backward = kernels_for(grad).normalize_backward
        return *backward(grad, x, stats, weight, **needs, **ctx.options), None, None, None


def _norm_of(x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor | None, **options) -> Tensor:
    return kernels_for(x).normalize(x, weight, bias, **options)[0]


class _AddAndNormalize(Function):
    @staticmethod
    def forward(ctx, x, added, weight, bias, epsilon, centered, offset):
        ctx.set_materialize_grads(False)
        total, y, stats = kernels_for(x).add_and_normalize(x, added, weight, bias, epsilon, centered, offset)
        ctx.save_for_backward(total, stats, weight, bias)
        ctx.options = {"centered": centered, "offset": offset}
        ctx.anew = partial(_norm_of, epsilon=epsilon, **ctx.options)
        return y, total

    @staticmethod
    @_once
    def backward(ctx, grad, grad_total):
        total, stats, weight, _ = ctx.saved_tensors
        needs = {"need_weight": ctx.needs_input_grad[2], "need_bias": ctx.needs_input_grad[3]}
        backward = kernels_for(grad).normalize_backward
        # Nobody reads the sum's gradient any more: whatever else needed it lies behind what gave `grad`.
        gradients = backward(grad, total, stats, weight, **needs, **ctx.options, out=grad_total)
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
        ctx.activation, ctx.anew = activation, partial(_activated, activation)
        return kernels_for(gate).activate(gate, activation, up)

    @staticmethod
    @_once
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = kernels_for(grad).activate_backward(grad, gate, ctx.activation, up)
        return grad_gate, None, grad_up


def _activated(activation: str, gate: Tensor, up: Tensor | None) -> Tensor:
    return kernels_for(gate).activate(gate, activation, up)
