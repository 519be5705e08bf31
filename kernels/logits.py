"""Logits as the losses and the draws make them in registers from products with the head, and the masses of logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # a maximum's start: unlike -inf it can be subtracted from itself
INFINITY = tl.constexpr(float("inf"))


class Head(NamedTuple):
    """What is still to be done to a product with the head to make it a logit."""

    bias: Tensor | None = None
    logit_scale: float | None = None
    softcap: float | None = None


@triton.jit
def tanh(x):
    """To float32 rounding; the approximation in hardware is good to 11 bits."""
    size = tl.abs(x)
    decay = tl.exp(-2 * size)
    far = 1 - 2 * decay / (1 + decay)
    square = x * x
    near = -5.70498872745e-3  # the minimax polynomial of Cephes' tanhf, for arguments below 0.625
    near = near * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    return tl.where(size < 0.625, near * square * x + x, tl.where(x < 0, -far, far))


@triton.jit
def tempered_logits(product, logit_scale, softcap, inverse_temperature):
    """Tempered logits from products with the head, and the slope of the soft cap."""
    logits = product * logit_scale
    slope = 1.0
    if softcap is not None:
        capped = tanh(logits / softcap)
        logits = softcap * capped
        slope = 1 - capped * capped
    return logits * inverse_temperature, slope


@triton.jit
def head_logit(product, bias, token, inside, logit_scale, softcap):
    """The logits, in float32, of products with the head; -inf outside."""
    logit = product.to(tl.float32)
    if bias is not None:
        logit += tl.load(bias + token, mask=inside, other=0).to(tl.float32)
    if logit_scale is not None:
        logit *= logit_scale
    if softcap is not None:
        logit = softcap * tanh(logit / softcap)
    return tl.where(inside, logit, -INFINITY)


@triton.jit
def mass_below(logit, top):
    """The exponentials of `logit` relative to `top`, of which some are all -inf."""
    return tl.exp(logit - tl.where(top == -INFINITY, 0.0, top))


@triton.jit
def is_distribution(top, shift, mass):
    """Of NaN or +inf the mass is NaN; of nothing but -inf, the top -inf."""
    return (tl.abs(top) < INFINITY) & (tl.abs(shift) < INFINITY) & (mass < INFINITY)
