"""What decoder layers do between the products, against torch in float64, for every remainder and instruction set."""

import math

import pytest
import torch
from torch.nn import functional as F

from pmc_fast.native import library
from pmc_fast.native.elementwise import activate, normalize, rotate

SIZES = [1, 3, 8, 16, 33, 64, 131]


@pytest.fixture(params=library().instruction_sets(), autouse=True)
def isa(request):
    before = library().instruction_set()
    library().use_instruction_set(request.param)
    yield request.param
    library().use_instruction_set(before)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("centered", [True, False], ids=["layer norm", "rms norm"])
def test_normalize(centered, size, rng_seed):
    held = torch.full((19, size + 5), math.nan)
    x = held[:, 2 : size + 2].copy_(3 * torch.randn(19, size) + 1)
    weight, bias = torch.randn(size), torch.randn(size) if centered else None
    if centered:
        want = F.layer_norm(x.double(), (size,), weight.double(), bias.double(), 1e-3)
    else:
        want = F.rms_norm(x.double(), (size,), weight.double(), 1e-3)
    got = normalize(x, weight, bias, 1e-3, centered=centered)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(normalize(x, weight, bias, 1e-3, centered=centered, out=x), got)
    assert held[:, :2].isnan().all() and held[:, size + 2 :].isnan().all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_activate(name, gated, size, rng_seed):
    x, up = 4 * torch.randn(11, size), torch.randn(11, size) if gated else None
    x[0, 0], x[1, 0], x[2, 0] = 1e4, -1e4, 0
    want = F.silu(x.double()) if name == "silu" else F.gelu(x.double(), approximate="tanh")
    want = want if up is None else want * up.double()
    got = x.clone()
    assert activate(got, name, up) is got
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)


def test_what_is_no_number_stays_none(rng_seed):
    x = torch.randn(2, 40)
    x[1, 3], x[0, 39] = math.nan, math.nan
    for name in ("silu", "gelu_tanh"):
        assert torch.equal(activate(x.clone(), name).isnan(), x.isnan())
    got = normalize(x, torch.ones(40), None, 1e-5, centered=False)
    assert got.isnan().all()


@pytest.mark.parametrize("dim, rotated", [(2, 2), (16, 16), (24, 10), (40, 40), (64, 32), (7, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate(dtype, dim, rotated, rng_seed):
    rows, heads = 13, 3
    x = torch.randn(rows, heads * dim + 9)[:, 4 : 4 + heads * dim].unflatten(1, (heads, dim))
    angle = torch.randn(rows, rotated // 2).repeat(1, 2)
    cache = torch.full((rows, heads, 4, dim), math.nan, dtype=dtype)
    got = rotate(x, angle.cos(), angle.sin(), cache[:, :, 2])
    turning, rest = x.double().split((rotated, dim - rotated), dim=2)
    low, high = turning.chunk(2, dim=2) if rotated else (turning, turning)
    cosine, sine = angle.double().cos()[:, None], angle.double().sin()[:, None]
    want = torch.cat([turning * cosine + torch.cat([-high, low], 2)[:, :, :rotated] * sine, rest], dim=2)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-6 if dtype == torch.float32 else 1e-2)
    assert cache[:, :, [0, 1, 3]].isnan().all()
