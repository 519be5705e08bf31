"""A decoder layer between its products, in training: right for every remainder, stride and instruction set, on any threads."""

import pytest
import torch
from torch.nn import functional as F

from pmc_fast.native.elementwise import (
    activate,
    activate_backward,
    normalize,
    normalize_backward,
    rotate,
    rotate_backward,
)

SIZES = [1, 3, 17, 64, 576, 2049]
ROWS = 37  # more than a chunk of the sums over rows, and no multiple of one
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
EPSILON = 1e-5
# What rounding may make of a result, relative to the terms that it is a sum or difference of.
ROUNDING = 16 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Results and workspaces begin as NaN."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda like, *shape: empty(like, *shape).fill_(torch.nan))


def check(got, want, terms):
    assert got.dtype == torch.float32 and got.shape == want.shape
    error = (got.double() - want).abs()
    assert (error <= ROUNDING * terms.detach().abs() + 1e-37).all(), (error / terms.detach().abs()).max()


def rows_apart(rows, *shape):
    """Random rows with others between them."""
    return torch.randn(rows, 2, *shape)[:, 1]


def doubles(*tensors):
    return [None if x is None else x.detach().double().requires_grad_() for x in tensors]


def statistics(x, centered):
    mean = x.mean(1) if centered else torch.zeros_like(x[:, 0])
    return mean, ((x - mean[:, None]).square().mean(1) + EPSILON).rsqrt()


def normalized(x, weight, bias, centered):
    mean, factor = statistics(x, centered)
    y = (x - mean[:, None]) * factor[:, None] * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("centered", [True, False], ids=["centered", "not centered"])
def test_normalize(isa, centered, bias, size, rng_seed):
    x, weight, b = rows_apart(ROWS, size) + 0.5, torch.randn(size), torch.randn(size) if bias else None
    y, stats = normalize(x, weight, b, EPSILON, centered)
    of_x, of_weight, of_bias = doubles(x, weight, b)
    mean, factor = statistics(of_x, centered)
    check(stats[:, 0], mean, x.abs().amax(1))
    # Where a row nearly is its mean, what is left of it is as inexact as the mean.
    lost = (x.abs().amax(1) * factor)[:, None] if centered else 0
    check(stats[:, 1], factor, factor * (1 + torch.as_tensor(lost).reshape(-1)))
    want = normalized(of_x, of_weight, of_bias, centered)
    check(y, want, want.abs() + (1 + lost) * of_weight.abs() + (0 if b is None else of_bias.abs()))

    grad = rows_apart(ROWS, size)
    want.backward(grad.double())
    got = normalize_backward(grad, x, stats, weight, centered=centered, need_weight=True, need_bias=bias)
    n = (of_x - mean[:, None]) * factor[:, None]
    g = (grad * weight).abs().amax(1)
    check(got[0], of_x.grad, ((g * factor)[:, None] * (1 + n.abs()) * (1 + lost) ** 2))
    check(got[1], of_weight.grad, (grad.abs() * (n.abs() + lost)).sum(0))
    if bias:
        check(got[2], of_bias.grad, grad.abs().sum(0))
    else:
        assert got[2] is None


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_only_the_gradients_that_are_needed(isa, needs, rng_seed):
    grad, x, weight = torch.randn(3, ROWS, 35)[0], torch.randn(ROWS, 35), torch.randn(35)
    _, stats = normalize(x, weight, None, EPSILON, True)
    some = normalize_backward(grad, x, stats, weight, centered=True, need_weight=needs[0], need_bias=needs[1])
    both = normalize_backward(grad, x, stats, weight, centered=True, need_weight=True, need_bias=True)
    for got, want, needed in zip(some, both, (True, *needs), strict=True):
        assert torch.equal(got, want) if needed else got is None


@pytest.mark.parametrize("size", SIZES)
def test_a_gradient_is_added_where_it_is_told_to(isa, size, rng_seed):
    grad, x, weight = torch.randn(ROWS, size), torch.randn(ROWS, size), torch.randn(size)
    _, stats = normalize(x, weight, None, EPSILON, False)
    need = {"centered": False, "need_weight": True, "need_bias": False}
    alone, of_weight, _ = normalize_backward(grad, x, stats, weight, **need)
    around = torch.full((ROWS, size + 9), torch.nan)
    out = around[:, 4 : size + 4]
    held = out.copy_(torch.randn(ROWS, size)).double()
    got = normalize_backward(grad, x, stats, weight, **need, out=out)
    assert got[0] is out and torch.equal(got[1], of_weight)
    # `alone` is rounded on the way, once more than the sum is.
    check(out, held + alone.double(), held.abs() + alone.abs())
    assert around[:, :4].isnan().all() and around[:, size + 4 :].isnan().all()


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 64, 300])
def test_gradients_are_the_same_on_any_number_of_threads(isa, rows, rng_seed):
    grad, x, weight = torch.randn(2, rows, 1100)[0], torch.randn(rows, 1100), torch.randn(1100)

    def gradients(threads):
        torch.set_num_threads(threads)
        y, stats = normalize(x, weight, weight, EPSILON, True)
        need = {"centered": True, "need_weight": True, "need_bias": True}
        found = y, stats, *normalize_backward(grad, x, stats, weight, **need)
        return *found, activate(x, "silu", grad), *activate_backward(grad, x, "gelu_tanh", grad)

    alone = gradients(1)
    assert not any(x.isnan().any() for x in alone)
    assert rows or not alone[3].any() and not alone[4].any()  # sums of nothing
    for threads in (2, 3, 8):
        assert all(torch.equal(a, b) for a, b in zip(gradients(threads), alone, strict=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "not gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activate(isa, activation, gated, size, rng_seed):
    gate, grad = 4 * rows_apart(ROWS, size), rows_apart(ROWS, size)
    up = torch.randn(ROWS, size + 5)[:, 5:] if gated else None  # apart by another distance
    of_gate, of_up = doubles(gate, up)
    want = ACTIVATIONS[activation](of_gate)
    if gated:
        want = want * of_up
    factor = of_up.abs() if gated else 1
    check(activate(gate, activation, up), want, of_gate.abs() * factor)
    want.backward(grad.double())
    grad_gate, grad_up = activate_backward(grad, gate, activation, up)
    check(grad_gate, of_gate.grad, grad * (1 + of_gate.abs()) * factor)
    if gated:
        check(grad_up, of_up.grad, grad * of_gate)
    else:
        assert grad_up is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_out(isa, activation):
    sizes = [
        0,
        1e-40,
        1e-20,
        1e-3,
        5,
        9.9,
        10.1,
        11.3,
        11.4,
        12,
        17,
        40,
        86,
        87,
        88,
        89,
        1e3,
        1e7,
        1e13,
        1e19,
        1e20,
        3e38,
    ]
    gate = torch.tensor([sizes + [-x for x in sizes]])
    (of_gate,) = doubles(gate)
    want = ACTIVATIONS[activation](of_gate)
    check(activate(gate, activation, None), want, of_gate)
    want.backward(torch.ones_like(want))
    grad_gate, grad_up = activate_backward(torch.ones_like(gate), gate, activation, torch.ones_like(gate))
    check(grad_gate, of_gate.grad, 1 + of_gate.abs().clamp(max=100))
    check(grad_up, want, of_gate)


@pytest.mark.parametrize("place", [0, 16, 34])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_in_activations_stays_where_it_is(isa, activation, place, rng_seed):
    for bad in ("grad", "gate", "up"):
        inputs = dict(zip(("grad", "gate", "up"), torch.randn(3, 2, 35), strict=True))
        inputs[bad][1, place] = torch.nan
        want = torch.zeros(2, 35, dtype=torch.bool)
        want[1, place] = True
        gate, up = inputs["gate"], inputs["up"]
        grad_gate, grad_up = activate_backward(inputs["grad"], gate, activation, up)
        assert torch.equal(grad_gate.isnan(), want)
        assert torch.equal(grad_up.isnan(), want if bad != "up" else torch.zeros_like(want))
        y = activate(gate, activation, up)
        assert torch.equal(y.isnan(), want if bad != "grad" else torch.zeros_like(want))


@pytest.mark.parametrize("place", [0, 16, 34])
@pytest.mark.parametrize("centered", [True, False], ids=["centered", "not centered"])
def test_a_nan_in_a_norm_is_in_its_row_and_in_sums_over_rows(isa, centered, place, rng_seed):
    x, grad, weight = torch.randn(40, 35), torch.randn(40, 35), torch.randn(35)
    need = {"centered": centered, "need_weight": True, "need_bias": True}
    broken = x.clone()
    broken[35, place] = torch.nan
    y, stats = normalize(broken, weight, None, EPSILON, centered)
    grad_x, grad_weight, grad_bias = normalize_backward(grad, broken, stats, weight, **need)
    for found in (y, grad_x):
        assert found.isnan().all(1).nonzero().tolist() == [[35]] and found.isnan().sum() == 35
    assert grad_weight.isnan().all() and not grad_bias.isnan().any()

    _, stats = normalize(x, weight, None, EPSILON, centered)
    grad[35, place] = torch.nan
    grad_x, grad_weight, grad_bias = normalize_backward(grad, x, stats, weight, **need)
    assert grad_x.isnan().all(1).nonzero().tolist() == [[35]] and grad_x.isnan().sum() == 35
    for found in (grad_weight, grad_bias):
        assert found.isnan().nonzero().tolist() == [[place]]


def turned(x, cosine, sine):
    half, rotated = cosine.shape[1] // 2, x[..., : cosine.shape[1]]
    other = torch.cat((-rotated[..., half:], rotated[..., :half]), -1)
    return torch.cat((rotated * cosine[:, None] + other * sine[:, None], x[..., cosine.shape[1] :]), -1)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dim, angles", [(1, 0), (2, 2), (17, 10), (64, 64), (64, 32), (67, 66), (128, 128)])
def test_rotate(isa, heads, dim, angles, rng_seed):
    x, grad = rows_apart(ROWS, heads, dim), torch.randn(ROWS, (heads + 1) * dim)[:, dim:].view(ROWS, heads, dim)
    cosine, sine = torch.randn(2, ROWS, angles)  # halves that are not equal
    (of_x,) = doubles(x)
    want = turned(of_x, cosine.double(), sine.double())
    largest = 1 + x.abs().max() + grad.abs().max()
    terms = largest * (1 + cosine.abs().amax(1) + sine.abs().amax(1))[:, None, None] if angles else largest
    check(rotate(x, cosine, sine), want, terms)
    want.backward(grad.double())
    check(rotate_backward(grad, cosine, sine), of_x.grad, terms)
    if dim > angles:
        assert torch.equal(rotate(x, cosine, sine)[..., angles:], x[..., angles:])


@pytest.mark.parametrize("way", [rotate, rotate_backward])
def test_a_nan_is_turned_into_its_pair(isa, way, rng_seed):
    x, (cosine, sine) = torch.randn(3, 2, 71), torch.randn(2, 3, 70)
    for place, pair in ((0, [0, 35]), (34, [34, 69]), (40, [5, 40]), (70, [70])):
        broken = x.clone()
        broken[1, 1, place] = torch.nan
        assert way(broken, cosine, sine).isnan().nonzero().tolist() == [[1, 1, at] for at in pair]


def test_other_layouts_are_copied(isa, rng_seed):
    x, up, weight = torch.randn(35, 6).T, torch.randn(35, 6).T, torch.randn(70)[::2]
    y, stats = normalize(x, weight, weight, EPSILON, True)
    assert torch.equal(y, normalize(x.contiguous(), weight.contiguous(), weight.contiguous(), EPSILON, True)[0])
    need = {"centered": True, "need_weight": False, "need_bias": False}
    apart = torch.stack((stats, stats), 1)[:, 1]
    got, want = (normalize_backward(up, x, s, weight, **need)[0] for s in (apart, stats))
    assert torch.equal(got, want)
    assert torch.equal(activate(x, "silu", up), activate(x.contiguous(), "silu", up.contiguous()))
    expanded = torch.randn(35).expand(6, 35)
    for got, want in zip(
        activate_backward(expanded, x, "silu", up), activate_backward(expanded.contiguous(), x, "silu", up), strict=True
    ):
        assert torch.equal(got, want)
    heads, cosine, sine = torch.randn(2, 6, 34).transpose(0, 1), *torch.randn(2, 6, 70)[..., 36:]
    got, want = rotate(heads, cosine, sine), rotate(heads.contiguous(), cosine.contiguous(), sine.contiguous())
    assert torch.equal(got, want)


def test_what_does_not_fit_is_named(rng_seed):
    x, weight, stats = torch.randn(4, 6), torch.randn(6), torch.randn(4, 2)
    heads, angles = torch.randn(4, 2, 6), torch.randn(4, 4)

    def backward(grad=x, x=x, stats=stats, weight=weight, out=None):
        return normalize_backward(grad, x, stats, weight, centered=False, need_weight=False, need_bias=False, out=out)

    cases = {
        r"x: got torch.float32 \[6\] on cpu, expected torch.float32 \[any, any\] on cpu": lambda: normalize(
            weight, weight, None, EPSILON, False
        ),
        "x: got torch.float64": lambda: normalize(x.double(), weight, None, EPSILON, False),
        "x: .* on meta": lambda: normalize(x.to("meta"), weight, None, EPSILON, False),
        r"weight: .*expected torch.float32 \[6\]": lambda: normalize(x, weight[1:], None, EPSILON, False),
        "bias: ": lambda: normalize(x, weight, weight[1:], EPSILON, False),
        r"grad: .*expected torch.float32 \[4, 6\]": lambda: backward(grad=x[1:]),
        "stats: ": lambda: backward(stats=stats[1:]),
        "weight: ": lambda: backward(weight=weight[1:]),
        "out: got torch.float32": lambda: backward(out=x[1:].clone()),
        "out: got strides": lambda: backward(out=torch.randn(6, 4).T),
        "out: got strides .*overlap": lambda: backward(out=torch.randn(6).expand(4, 6)),
        "gate: ": lambda: activate(weight, "silu", None),
        "up: ": lambda: activate(x, "silu", x[:, 1:]),
        "activation: got quick_gelu": lambda: activate(x, "quick_gelu", None),
        "activation: got swish": lambda: activate_backward(x, x, "swish", None),
        "grad: ": lambda: activate_backward(x[:, 1:], x, "silu", None),
        "up: got": lambda: activate_backward(x, x, "silu", x[:, 1:]),
        "x: got": lambda: rotate(x, angles, angles),
        "grad: got": lambda: rotate_backward(x, angles, angles),
        r"cosine: .*expected torch.float32 \[4, any\]": lambda: rotate(heads, angles[1:], angles),
        "cosine: got 3 columns, expected an even number of at most 6": lambda: rotate(heads, angles[:, 1:], angles),
        "cosine: got 8 columns": lambda: rotate(heads, angles.repeat(1, 2), angles),
        r"sine: .*expected torch.float32 \[4, 4\]": lambda: rotate(heads, angles, angles[:, 2:]),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match="^" + message):
            call()
    row = slice(1)
    backward(x[row], x[row], stats[row], out=torch.randn(6).expand(4, 6)[row])  # a single row overlaps no other
