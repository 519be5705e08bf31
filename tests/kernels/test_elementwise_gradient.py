"""What a decoder layer does between its products in training, and the gradients of that, against autograd in float64."""

import math

import pytest
import torch
from decoder_kernels import ACTIVATIONS

pytest.importorskip("triton")
from pmc_fast.kernels import elementwise_gradient as kernels
from pmc_fast.kernels import norm_gradient

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = 1e-5


def assert_near(got, want, dtype, terms=1.0):
    """To the rounding of this dtype, where `want` is a sum or difference of such terms."""
    assert got.dtype == dtype and got.shape == want.shape
    tolerance = (want.abs() + terms) * (16 * torch.finfo(torch.float32).eps) + want.abs() * torch.finfo(dtype).eps
    assert ((got.double() - want).abs() <= tolerance + torch.finfo(dtype).smallest_normal).all()


def rows_apart(rows, size, dtype):
    """Random rows with NaN between them."""
    around = torch.full((rows, size + 3), math.nan, dtype=dtype)
    around[:, :size] = torch.randn(rows, size) + 0.5
    return around[:, :size]


def doubles(*tensors):
    return [None if x is None else x.detach().double().requires_grad_() for x in tensors]


def normalized(x, weight, bias, centered, offset):
    x = x - x.mean(1, keepdim=True) if centered else x
    y = x * (x.square().mean(1, keepdim=True) + EPSILON).rsqrt() * (weight + offset)
    return y if bias is None else y + bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("centered, offset, bias", [(False, 0.0, False), (False, 1.0, False), (True, 0.0, True)])
@pytest.mark.parametrize("rows, size", [(1, 1), (5, 33), (67, 8), (7, 1100)])
def test_normalize(rows, size, centered, offset, bias, dtype, poisoned, monkeypatch, rng_seed):
    monkeypatch.setattr(norm_gradient, "PROGRAMS", 3)  # so that each has several rows, or
    monkeypatch.setattr(norm_gradient, "TILE", 64)  # several times 8 short ones
    monkeypatch.setattr(norm_gradient, "SUMS_AT_ONCE", 2)
    x, weight = rows_apart(rows, size, dtype), torch.randn(size).to(dtype)
    b = torch.randn(size).to(dtype) if bias else None
    of_x, of_weight, of_bias = doubles(x, weight, b)
    want = normalized(of_x, of_weight, of_bias, centered, offset)
    got, stats = kernels.normalize(x, weight, b, EPSILON, centered, offset)
    lost = (of_x.abs().amax(1) * stats[:, 1].double())[:, None].detach()  # where a row nearly is its mean
    assert_near(got, want.detach(), dtype, 4 * (1 + lost))
    grad = rows_apart(rows, size, dtype)
    want.backward(grad.double())
    options = {"centered": centered, "offset": offset}
    to_x, to_weight, to_bias = kernels.normalize_backward(
        grad, x, stats, weight, need_weight=True, need_bias=bias, **options
    )
    steepest = (grad.double() * (of_weight.detach() + offset)).abs().amax(1) * stats[:, 1].double()
    assert_near(to_x, of_x.grad, dtype, steepest[:, None] * (1 + lost) ** 3)
    assert_near(to_weight, of_weight.grad, dtype, (grad.double().abs() * (1 + lost) * 4).sum(0))
    assert (to_bias is None) == (not bias)
    if bias:
        assert_near(to_bias, of_bias.grad, dtype, grad.double().abs().sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_before_a_norm(dtype, poisoned, rng_seed):
    x, added, weight = rows_apart(7, 40, torch.float32), rows_apart(7, 40, dtype), torch.randn(40).to(dtype)
    held = x.clone()
    total, y, stats = kernels.add_and_normalize(x, added, weight, None, EPSILON, False)
    assert torch.equal(x, held) and torch.equal(total, x + added.float()) and y.dtype == dtype
    alone, its = kernels.normalize(total, weight, None, EPSILON, False)
    assert torch.equal(y, alone) and torch.equal(stats, its)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_needed(needs, poisoned, rng_seed):
    x, weight, grad = torch.randn(9, 20), torch.randn(20), torch.randn(9, 20)
    _, stats = kernels.normalize(x, weight, None, EPSILON, True)
    some = kernels.normalize_backward(grad, x, stats, weight, centered=True, need_weight=needs[0], need_bias=needs[1])
    every = kernels.normalize_backward(grad, x, stats, weight, centered=True, need_weight=True, need_bias=True)
    for got, want, needed in zip(some, every, (True, *needs), strict=True):
        assert torch.equal(got, want) if needed else got is None


def test_a_gradient_is_added_where_it_is_told_to(poisoned, rng_seed):
    x, weight, grad = torch.randn(11, 130), torch.randn(130).bfloat16(), torch.randn(11, 130).bfloat16()
    _, stats = kernels.normalize(x, weight, None, EPSILON, False)
    needs = {"centered": False, "need_weight": False, "need_bias": False}
    alone, *_ = kernels.normalize_backward(grad, x, stats, weight, **needs)
    around = torch.full((11, 140), math.nan)
    out = around[:, 5:135]
    held = out.copy_(torch.randn(11, 130)).clone()
    got, *_ = kernels.normalize_backward(grad, x, stats, weight, **needs, out=out)
    assert got is out
    torch.testing.assert_close(out, held + alone, rtol=1e-6, atol=1e-6)
    assert around[:, :5].isnan().all() and around[:, 135:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activate(activation, dtype, poisoned, rng_seed):
    gate, up, grad = (4 * torch.randn(3, 700)).to(dtype), torch.randn(3, 700).to(dtype), torch.randn(3, 700).to(dtype)
    gate[0, :5] = torch.tensor([-60.0, 60.0, 0.0, -1e4, 1e4])
    for other in (None, up):
        held = gate.clone()
        of_gate, of_up = doubles(gate, other)
        want = ACTIVATIONS[activation](of_gate) * (1 if other is None else of_up)
        want.backward(grad.double())
        terms = gate.double().abs() * (1 if other is None else up.double().abs())
        assert_near(kernels.activate(gate, activation, other), want.detach(), dtype, terms)
        to_gate, to_up = kernels.activate_backward(grad, gate, activation, other)
        steep = (grad.double() * (1 if other is None else up.double())).abs() * (1 + gate.double().abs().clamp(max=60))
        assert_near(to_gate, of_gate.grad, dtype, 4 * steep)
        assert torch.equal(gate, held) and (to_up is None) == (other is None)
        if other is not None:
            assert_near(to_up, of_up.grad, dtype, (grad.double() * gate.double()).abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, dim, rotated", [(3, 8, 8), (9, 64, 64), (2, 12, 4), (5, 6, 0), (17, 20, 2)])
def test_rotate(heads, dim, rotated, dtype, poisoned, rng_seed):
    x, grad = (torch.randn(4, dim, heads).to(dtype).transpose(1, 2) for _ in range(2))
    cosine, sine = torch.randn(4, 2 * rotated + 1)[:, 1:].split([rotated, rotated], 1)  # halves of their own
    (of_x,) = doubles(x)
    turning, kept = of_x[..., :rotated], of_x[..., rotated:]
    half = torch.cat([-turning[..., rotated // 2 :], turning[..., : rotated // 2]], -1)
    want = torch.cat([turning * cosine.double()[:, None] + half * sine.double()[:, None], kept], -1)
    want.backward(grad.double())
    assert_near(kernels.rotate(x, cosine, sine), want.detach(), dtype, 10.0)
    assert_near(kernels.rotate_backward(grad, cosine, sine), of_x.grad, dtype, 10.0)
