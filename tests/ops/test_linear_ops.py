"""`linear_sample`, `linear_logprob` and `collapse_loss` against float64."""

import math
from functools import partial
from importlib import import_module
from itertools import product

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import PeakMemory
from pmc_fast import BackendUnavailable, backend, collapse_loss, linear_logprob, linear_sample, sample
from pmc_fast.fast_linear import fast_linear, scratch
from pmc_fast.native import gemm, library
from pmc_fast.native.packed_linear import packed_linear

COLLAPSE_LOSS, LINEAR_LOGPROB, LINEAR_SAMPLE = (
    import_module(f"pmc_fast.native.{op}") for op in ("collapse_loss", "linear_logprob", "linear_sample")
)
IMPLS = ["reference", "native", "triton"]
DRAWING = [*IMPLS, "cuda"]
HEADS = [
    {"softcap": None, "logit_scale": 1.0},
    {"softcap": 4.0, "logit_scale": 1.0},
    {"softcap": None, "logit_scale": 0.3},
    {"softcap": 2.5, "logit_scale": -1.7},
]
IGNORED = -100


def make(rows=23, size=19, vocab=307, dtype=torch.float32, bias=True):
    hidden = torch.randn(rows, size).to(dtype).requires_grad_()
    spread = 1 if dtype != torch.bfloat16 else size**-0.5  # logits rounded to 8 bits must still be near
    weight = (torch.randn(vocab, size) * spread).to(dtype).requires_grad_()
    b = torch.randn(vocab).to(dtype).requires_grad_() if bias else None
    target = torch.randint(0, vocab, (rows,))
    target[::5] = IGNORED
    return hidden, weight, b, target


def oracle(hidden, weight, bias, target, upstream, softcap, logit_scale, temperature=1.0):
    """log-probabilities and gradients of sum(upstream * logprob), in float64."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    z = logit_scale * F.linear(*leaves)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logprob = -F.cross_entropy(z / temperature, target, reduction="none", ignore_index=IGNORED)
    (upstream.double() * logprob).sum().backward()
    return logprob.detach(), [None if t is None else t.grad for t in leaves]


def freeze(*parts):
    for part in parts:
        if part is not None:
            part.requires_grad_(False)


def assert_near(got, want, dtype):
    """float32: rounding of sums; bfloat16: the result is rounded once or twice to 8 bits."""
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max() + 1e-6


@pytest.fixture(params=[*IMPLS, "native, many chunks", "native, fast bfloat16"])
def impl(request, monkeypatch):
    """Each implementation; of the native one its chunks and slices, too, where bfloat16 is widened and where it is not."""
    name, _, path = request.param.partition(", ")
    if path == "many chunks":
        monkeypatch.setattr(COLLAPSE_LOSS, "CHUNK_ROWS", {torch.float32: 4, torch.bfloat16: 5})
        monkeypatch.setattr(gemm, "SLICE_TOKENS", 100)
        monkeypatch.setattr(LINEAR_LOGPROB, "CHUNK_ROWS", 5)
        monkeypatch.setattr(LINEAR_SAMPLE, "CHUNK_ROWS", 3)
        monkeypatch.setattr(LINEAR_LOGPROB, "SLICE_TOKENS", 64)
    if path:
        monkeypatch.setattr(gemm, "has_fast_bfloat16", lambda: path == "fast bfloat16")
    return name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_linear_logprob(impl, head, bias, frozen, dtype, rng_seed):
    hidden, weight, b, target = make(dtype=dtype, bias=bias)
    upstream = torch.randn(len(target))
    upstream[3::4] = 0
    if frozen:
        freeze(weight, b)
    options = {"bias": b, "temperature": 0.7, "impl": impl, **head}
    logprob = linear_logprob(hidden, weight, target, **options)
    logprob.backward(upstream)
    want, gradients = oracle(hidden, weight, b, target, upstream, temperature=0.7, **head)
    assert logprob.dtype == torch.float32 and not logprob[target == IGNORED].any()
    assert_near(logprob, want, dtype)
    for leaf, gradient in zip((hidden, weight, b), gradients, strict=True):
        if leaf is not None and leaf.requires_grad:
            assert_near(leaf.grad, gradient, dtype)
    assert not hidden.grad[(target == IGNORED) | (upstream == 0)].any()
    with torch.no_grad():  # a ratio to what a model said before must be 1 as long as it says the same
        assert torch.equal(linear_logprob(hidden, weight, target, **options), logprob)


@pytest.mark.parametrize("needs", list(product([False, True], repeat=3)), ids=str)
def test_each_argument_may_be_frozen(impl, needs, rng_seed):
    hidden, weight, b, target = leaves = make(rows=5)
    for leaf, need in zip(leaves, needs, strict=False):
        leaf.requires_grad_(need)
    upstream = torch.randn(len(target))
    _, gradients = oracle(hidden, weight, b, target, upstream, **HEADS[3])
    logprob = linear_logprob(hidden, weight, target, bias=b, impl=impl, **HEADS[3])
    losses = [(logprob * upstream).sum()]
    losses.append(collapse_loss(hidden, weight, target, -upstream, bias=b, impl=impl, **HEADS[3]).loss)
    for loss in losses:
        assert loss.requires_grad == any(needs)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad(loss, wanted) if wanted else ()
        for got, exact in zip(found, [g for g, need in zip(gradients, needs, strict=True) if need], strict=True):
            assert_near(got, exact, torch.float32)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_takes_no_digits_from_sure_and_unsure_rows(impl, dtype, head, rng_seed):
    hidden, weight, b, target = make(dtype=dtype)
    with torch.no_grad():  # logits of the targets from far below to far above all others
        aligned = weight[target.clamp(min=0)].float()
        sure = torch.linspace(-30, 30, len(target))[:, None] * aligned / aligned.square().sum(1, keepdim=True)
        hidden.copy_(sure / head["logit_scale"] + torch.randn(hidden.shape) / 10)
    upstream = torch.randn(len(target)).exp()
    _, (exact, *_) = oracle(hidden, weight, b, target, upstream, **head)
    logprob = linear_logprob(hidden, weight, target, bias=b, impl=impl, **head)
    usual, _ = torch.autograd.grad(logprob, (hidden, weight), upstream)
    freeze(weight, b)
    logprob = linear_logprob(hidden, weight, target, bias=b, impl=impl, **head)
    (got,) = torch.autograd.grad(logprob, hidden, upstream)
    error, most = ((g.double() - exact).norm(dim=1) for g in (got, usual))
    sums = upstream[:, None].double().abs() * torch.finfo(torch.float32).eps * weight.norm(dim=1).max()
    assert (error <= 2 * most + torch.finfo(dtype).eps * exact.norm(dim=1) + 8 * sums[:, 0]).all()


@pytest.mark.parametrize("order", ["rising", "falling", "the target last", "the target first"])
def test_logits_that_tower_over_those_of_other_slices(impl, order, rng_seed):
    hidden, weight, _, target = make(bias=False)
    freeze(weight)
    vocab = len(weight)
    b = torch.linspace(-400, 400, vocab)
    b = b.flip(0) if order == "falling" else b
    if order.startswith("the target"):
        target[1:] = vocab - 1 if order == "the target last" else 0
        b = torch.zeros(vocab).index_fill_(0, target[1:], 9)
    upstream = torch.randn(len(target))
    for temperature in (1.0, 0.5):
        want, (exact, *_) = oracle(hidden, weight, b, target, upstream, None, 1.0, temperature)
        logprob = linear_logprob(hidden, weight, target, bias=b, temperature=temperature, impl=impl)
        assert_near(logprob, want, torch.float32)
        assert_near(*torch.autograd.grad(logprob, hidden, upstream), exact, torch.float32)


@pytest.mark.parametrize("ignore_index", [IGNORED, 7])
@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_comes_back_from_ignored_rows(impl, ignore_index, rng_seed):
    hidden, weight, _, target = make(bias=False)
    target[target == IGNORED] = ignore_index
    upstream = torch.where(target == ignore_index, math.nan, torch.randn(len(target)))
    for frozen in (False, True):
        weight.requires_grad_(not frozen)
        logprob = linear_logprob(hidden, weight, target, ignore_index=ignore_index, impl=impl)
        (gradient,) = torch.autograd.grad(logprob, hidden, upstream)
        assert torch.equal(gradient.any(1), target != ignore_index) and gradient.isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_frozen_head_in_a_checkpoint(reentrant, rng_seed):
    hidden, weight, b, target = make()
    freeze(weight, b)
    upstream = torch.randn(len(target))
    logprob = checkpoint(
        lambda x: linear_logprob(torch.tanh(x), weight, target, bias=b), hidden, use_reentrant=reentrant
    )
    logprob.backward(upstream)
    bent = torch.tanh(hidden.detach().double())
    _, (exact, *_) = oracle(bent, weight, b, target, upstream, **HEADS[0])
    assert_near(hidden.grad, exact * (1 - bent**2), torch.float32)


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_passes_under_a_frozen_head(impl, dtype, rng_seed):
    hidden, weight, b, target = make(dtype=dtype)
    freeze(weight, b)
    logprob, upstream = linear_logprob(hidden, weight, target, bias=b, impl=impl), torch.randn(len(target))
    first, again = (torch.autograd.grad(logprob, hidden, upstream, retain_graph=True)[0] for _ in range(2))
    with torch.no_grad():
        hidden.zero_(), weight.zero_()  # nothing looks at them again
    doubled, _ = torch.autograd.grad(logprob, hidden, torch.stack([2 * upstream, upstream]), is_grads_batched=True)[0]
    assert torch.equal(first, again) and torch.equal(doubled, 2 * first) and first.dtype == dtype


@pytest.mark.parametrize("softcap", [1e4, 1e6, 3e38])
def test_a_large_soft_cap_takes_nothing_from_small_logits(impl, softcap, rng_seed):
    hidden, weight, b, target = make()
    upstream = torch.rand(len(target))
    capped = {"softcap": softcap, "logit_scale": 1.0}
    logprob = linear_logprob(hidden, weight, target, bias=b, impl=impl, **capped)
    gradients = torch.autograd.grad(logprob, (hidden, weight, b), upstream)
    want, exact = oracle(hidden, weight, b, target, upstream, **capped)
    for got, ideal in zip((logprob, *gradients), (want, *exact), strict=True):
        assert_near(got, ideal, torch.float32)
    loss = collapse_loss(hidden, weight, target, upstream, bias=b, impl=impl, **capped)
    assert_near(loss.token_nll, -want, torch.float32)
    drawn = linear_sample(hidden, weight, bias=b, impl=impl, **capped)
    assert_near(drawn.logprob, oracle(hidden, weight, b, drawn.token, upstream, **capped)[0], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [0, 2])
def test_a_bias_of_any_stride(impl, dtype, step, rng_seed):
    hidden, weight, _, target = make(rows=5, dtype=dtype, bias=False)
    held = torch.full((1 + 2 * len(weight),), math.nan).index_fill(0, torch.tensor(1), 0.5)
    held[1::2] = torch.randn(len(weight))
    b = held.to(dtype).as_strided((len(weight),), (step,), 1)
    upstream = torch.rand(len(target))
    want, _ = oracle(hidden, weight, b, target, upstream, **HEADS[0])
    assert_near(linear_logprob(hidden, weight, target, bias=b, impl=impl), want, dtype)
    assert_near(collapse_loss(hidden, weight, target, upstream, bias=b, impl=impl).token_nll, -want, dtype)
    drawn = linear_sample(hidden, weight, bias=b, impl=impl)
    assert_near(drawn.logprob, oracle(hidden, weight, b, drawn.token, upstream, **HEADS[0])[0], dtype)


@pytest.mark.parametrize("isa", library().instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_the_native_losses_by_instruction_set(head, dtype, isa, rng_seed):
    before = library().instruction_set()
    library().use_instruction_set(isa)
    try:
        test_collapse_loss("native", head, dtype, rng_seed)
        for frozen in (False, True):
            test_linear_logprob("native", head, True, frozen, dtype, rng_seed)
    finally:
        library().use_instruction_set(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_collapse_loss(impl, head, dtype, rng_seed):
    hidden, weight, b, target = make(dtype=dtype)
    token_weight = torch.rand(len(target))
    token_weight[2::4] = 0
    result = collapse_loss(hidden, weight, target, token_weight, bias=b, impl=impl, **head)
    (3 * result.loss).backward()
    want, gradients = oracle(hidden, weight, b, target, -3 * token_weight, **head)
    assert_near(result.token_nll, -want, dtype)
    assert_near(result.loss.detach(), -(token_weight.double() * want).sum(), dtype)
    assert not result.token_nll.requires_grad
    for leaf, gradient in zip((hidden, weight, b), gradients, strict=True):
        assert_near(leaf.grad, gradient, dtype)
    unused = (target == IGNORED) | (token_weight == 0)
    assert not hidden.grad[unused].any() and (result.token_nll[(token_weight == 0) & (target != IGNORED)] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "ruled_out",
    [torch.arange(307) % 3 == 1, torch.arange(307) < 130, torch.arange(307) >= 130],
    ids=["in vectors and in the tail after them", "whole slices", "the last slices"],
)
def test_tokens_that_a_bias_of_minus_infinity_rules_out(impl, ruled_out, dtype, rng_seed):
    hidden, weight, b, target = make(dtype=dtype)
    ruled_out = ruled_out.to(b.device)
    b = b.detach().masked_fill(ruled_out, -math.inf).requires_grad_()
    allowed = (~ruled_out).nonzero()[:, 0]
    target = torch.where(target == IGNORED, IGNORED, allowed[target % len(allowed)])
    upstream = torch.randn(len(target))
    logprob = linear_logprob(hidden, weight, target, bias=b, impl=impl)
    logprob.backward(upstream)
    want, gradients = oracle(hidden, weight, b, target, upstream, softcap=None, logit_scale=1.0)
    assert_near(logprob, want, dtype)
    for leaf, gradient in zip((hidden, weight, b), gradients, strict=True):
        assert_near(leaf.grad, gradient, dtype)
    assert not b.grad[ruled_out].any() and not weight.grad[ruled_out].any()
    freeze(weight, b)
    logprob = linear_logprob(hidden, weight, target, bias=b, impl=impl)
    assert_near(*torch.autograd.grad(logprob, hidden, upstream), gradients[0], dtype)


@pytest.mark.refuses_values
@pytest.mark.parametrize("impl", IMPLS)
def test_logits_that_overflow_when_divided_by_the_temperature_are_named(impl):
    hidden, weight, _, target = make(bias=False)
    target[0], target[1] = IGNORED, 0  # rows count as the caller counts them
    with pytest.raises(ValueError, match="row 1 hold .* or overflow when divided by the temperature"):
        linear_logprob(hidden * 1e9, weight, target, temperature=1e-37, impl=impl)


@pytest.mark.refuses_values
def test_the_first_row_of_infinite_logits_is_named_wherever_they_are(impl):
    hidden, weight = torch.zeros(9, 2), torch.zeros(307, 2)
    hidden[7, 0] = hidden[4, 1] = 9
    weight[5, 0] = weight[250, 1] = 3e38
    target = torch.tensor([IGNORED, *range(8)])
    for op in (partial(linear_logprob, target=target), linear_sample):
        with pytest.raises(ValueError, match="row 4 hold"):
            op(hidden, weight, impl=impl)
    with pytest.raises(ValueError, match="row 4 hold"):
        collapse_loss(hidden, weight, target, torch.ones(9), impl=impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_of_any_strides(impl, dtype, rng_seed):
    hidden = torch.randn(19, 31).to(dtype).T[3:26].requires_grad_()
    weight = torch.randn(400, 40).to(dtype)[5:312, 2:40:2].requires_grad_()
    b = torch.randn(311, 2).to(dtype)[4:, 1].requires_grad_()
    target = torch.randint(0, 307, (24, 3))[1:, 1]
    logprob = linear_logprob(hidden, weight, target, bias=b, impl=impl)
    got = torch.autograd.grad(logprob.sum(), (hidden, weight, b))  # the upstream gradient is one number, expanded
    want, gradients = oracle(hidden, weight, b, target, torch.ones(23), softcap=None, logit_scale=1.0)
    for mine, exact in zip((logprob, *got), (want, *gradients), strict=True):
        assert_near(mine, exact, dtype)


def test_a_packed_head_is_multiplied_as_it_is_packed(monkeypatch, rng_seed):
    hidden, weight, b, target = (t.detach() for t in make(vocab=1000))
    monkeypatch.setattr(LINEAR_LOGPROB, "SLICE_TOKENS", 128)
    want = linear_logprob(hidden, weight, target, bias=b, impl="native")
    products = []
    monkeypatch.setattr(gemm, "packed_linear", lambda *args: products.append(packed_linear(*args)))
    with fast_linear(torch.nn.Identity(), weight):
        got = linear_logprob(hidden, weight, target, bias=b, impl="native")
    assert len(products) == 8
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [256, 3])
def test_logits_lie_where_those_of_the_draw_before_did(chunk, monkeypatch, rng_seed):
    monkeypatch.setattr(LINEAR_SAMPLE, "CHUNK_ROWS", chunk)
    hidden, weight, b, _ = (t.detach() for t in make(vocab=1000))
    options = {"bias": b, "top_p": 0.9, "seed": rng_seed, "impl": "native"}
    want = []
    for rows in (5, 23, 2):  # a block each: within one, another product may make the logits
        with fast_linear(torch.nn.Identity()):
            want.append(linear_sample(hidden[:rows], weight, **options))
    with fast_linear(torch.nn.Identity()):
        memory = scratch(23, 1000, torch.float32).fill_(torch.nan)
        got = [linear_sample(hidden[:rows], weight, **options) for rows in (5, 23, 2)]
        assert memory[:2].isfinite().all()
    for mine, theirs in zip(got, want, strict=True):
        assert all(map(torch.equal, mine, theirs))


def test_rows_that_do_not_count_are_in_no_product(monkeypatch, rng_seed):
    hidden, weight, _, target = make(bias=False)
    multiplied, write = [], gemm.HeadSlice.write_logits
    monkeypatch.setattr(
        gemm.HeadSlice, "write_logits", lambda head, x, out: (multiplied.append(len(x)), write(head, x, out))
    )
    upstream = torch.randn(len(target))
    upstream[1::4] = 0
    logprob = linear_logprob(hidden, weight, target, impl="native")
    assert sum(multiplied) == (target != IGNORED).sum()
    logprob.backward(upstream)
    counts = (target != IGNORED) & (upstream != 0)
    assert sum(multiplied) == (target != IGNORED).sum() + counts.sum()
    assert torch.equal(hidden.grad.any(1), counts)


def test_a_frozen_head_is_multiplied_twice(monkeypatch, rng_seed):
    hidden, weight, b, target = make()
    freeze(weight, b)
    monkeypatch.setattr(LINEAR_LOGPROB, "SLICE_TOKENS", 128)
    made = []
    for name in ("write_logits", "add_product"):
        method = getattr(gemm.HeadSlice, name)
        watched = lambda head, x, out, name=name, method=method: (made.append((name, len(x))), method(head, x, out))  # noqa: E731
        monkeypatch.setattr(gemm.HeadSlice, name, watched)
    rows = int((target != IGNORED).sum())
    logits, gradients = ("write_logits", rows), ("add_product", rows)
    linear_logprob(hidden, weight, target, bias=b, impl="native").sum().backward()
    assert made == 3 * [logits, gradients]
    made.clear()
    with torch.no_grad():
        linear_logprob(hidden, weight, target, bias=b, impl="native")
    linear_logprob(hidden.detach(), weight, target, bias=b, impl="native")
    assert made == 6 * [logits]
    made.clear()
    weight.requires_grad_()
    linear_logprob(hidden.detach(), weight, target, bias=b, impl="native").sum().backward()
    collapse_loss(hidden.detach(), weight, target, torch.ones(len(target)), bias=b, impl="native").loss.backward()
    assert not any(name == "add_product" for name, _ in made)


def test_collapse_loss_makes_no_gradient_of_a_frozen_head(monkeypatch, rng_seed):
    hidden, weight, b, target = make()
    products = []
    monkeypatch.setattr(COLLAPSE_LOSS, "add_head_gradient", lambda *args: products.append(args))
    collapse_loss(hidden, weight.detach(), target, torch.rand(len(target)), bias=b, impl="native").loss.backward()
    assert not products and hidden.grad.any() and b.grad.any()


@pytest.mark.skipif(PeakMemory.method(torch.device("cpu")) == "none", reason="no /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_logits_are_held(dtype, rng_seed):
    hidden, weight, b, target = make(rows=1500, vocab=50_000, dtype=dtype)  # 300 MB of logits

    def least_peak(*inputs):
        """Of several: libraries make buffers that they keep, and a fragmented heap holds more than is asked of it."""
        found = []
        for _ in range(4):
            with PeakMemory(torch.device("cpu")) as peak:
                logprob = linear_logprob(hidden, weight, target, bias=b, impl="native")
                torch.autograd.grad(logprob.sum(), inputs)
            found.append(peak.bytes)
        return min(found)

    assert least_peak(hidden, weight, b) < 64e6
    freeze(weight, b)
    assert least_peak(hidden) < 64e6


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_reach_exactly_what_asks_for_them(impl, rng_seed):
    hidden, weight, b, target = make()
    token_weight = torch.rand(len(target), requires_grad=True)
    frozen = collapse_loss(hidden, weight.detach(), target, token_weight, bias=b.detach(), impl=impl)
    frozen.loss.backward()
    assert weight.grad is None and b.grad is None
    torch.testing.assert_close(token_weight.grad, frozen.token_nll)
    want = hidden.grad.clone()
    hidden.grad = None
    linear_logprob(hidden, weight.detach(), target, bias=b.detach(), impl=impl).backward(-token_weight.detach())
    torch.testing.assert_close(hidden.grad, want, rtol=1e-4, atol=1e-6)
    assert not collapse_loss(
        hidden.detach(), weight.detach(), target, token_weight.detach(), impl=impl
    ).loss.requires_grad
    with torch.no_grad():
        assert not collapse_loss(hidden, weight, target, token_weight, impl=impl).loss.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_a_graph_can_be_used_twice_and_a_head_tied(impl, rng_seed):
    hidden, weight, _, target = make(bias=False)
    token_weight = torch.rand(len(target))
    loss = collapse_loss(hidden + weight[: len(hidden)], weight, target, token_weight, impl=impl).loss
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    expected = (
        token_weight * F.cross_entropy(F.linear(hidden + weight[: len(hidden)], weight), target, reduction="none")
    ).sum()
    for a, b, c in zip(first, second, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upstream", [1.0, 0.5])
@pytest.mark.parametrize("impl", IMPLS)
def test_backward_passes_over_a_kept_graph_add_up(impl, upstream, dtype, rng_seed):
    hidden, weight, b, target = make(dtype=dtype)
    leaves = (hidden, weight, b)
    loss = collapse_loss(hidden, weight, target, torch.rand(len(target)), bias=b, impl=impl).loss
    once = torch.autograd.grad(loss, leaves, torch.tensor(upstream), retain_graph=True)
    for times in (1, 2, 3):  # the last one frees the graph and may scale in place
        loss.backward(torch.tensor(upstream), retain_graph=times < 3)
        for leaf, gradient in zip(leaves, once, strict=True):
            rtol = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
            torch.testing.assert_close(leaf.grad, times * gradient, rtol=rtol, atol=1e-6)


def test_the_gradient_of_the_head_is_not_copied(rng_seed):
    """The memory that the op wrote the gradient to becomes the leaf's gradient, whatever the upstream scalar."""
    written = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.pmc_fast.collapse_loss.default:
                written.append(out[3].data_ptr())
            return out

    for upstream in (1.0, 0.5):
        hidden, weight, _, target = make(bias=False)
        with Watch():
            loss = collapse_loss(hidden, weight, target, torch.rand(len(target)), impl="native").loss
        loss.backward(torch.tensor(upstream))
        assert weight.grad.data_ptr() == written[-1]


@pytest.mark.parametrize("impl", IMPLS)
def test_ignore_index_none_scores_every_row(impl, rng_seed):
    hidden, weight, b, target = make()
    target[target == IGNORED] = 5
    token_weight = torch.rand(len(target))
    for ignore_index in (None, IGNORED):
        result = collapse_loss(hidden, weight, target, token_weight, bias=b, ignore_index=ignore_index, impl=impl)
        logprob = linear_logprob(hidden, weight, target, bias=b, ignore_index=ignore_index, impl=impl)
        want, gradients = oracle(hidden, weight, b, target, -token_weight, softcap=None, logit_scale=1.0)
        assert_near(result.token_nll, -want, torch.float32)
        assert_near(logprob.detach(), want, torch.float32)
        for got, gradient in zip(torch.autograd.grad(result.loss, (hidden, weight, b)), gradients, strict=True):
            assert_near(got, gradient, torch.float32)


@pytest.mark.refuses_values
@pytest.mark.parametrize("impl", IMPLS)
def test_ignore_index_none_refuses_targets_outside_the_vocabulary(impl, rng_seed):
    hidden, weight, _, target = make(bias=False)
    for op in (linear_logprob, partial(collapse_loss, token_weight=torch.ones(len(target)))):
        with pytest.raises(ValueError, match=r"target: got -100 at row 0, expected token ids in \[0, 307\)$"):
            op(hidden, weight, target, ignore_index=None, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_score(impl):
    hidden, weight, b, target = make()
    target[:] = IGNORED
    with torch.no_grad():
        hidden[:] = math.nan  # ignored rows are not even looked at
    result = collapse_loss(hidden, weight, target, torch.ones(len(target)), bias=b, impl=impl)
    result.loss.backward()
    assert result.loss == 0 and not any(t.grad.any() for t in (hidden, weight, b))
    empty = linear_logprob(hidden[:0], weight, target[:0], impl=impl)
    assert empty.shape == (0,)


@pytest.mark.parametrize("impl", DRAWING)
def test_nothing_to_draw(impl):
    assert linear_sample(torch.zeros(0, 19), torch.zeros(307, 19), impl=impl).token.shape == (0,)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_gradcheck(head, rng_seed):
    hidden, weight, b, target = make(rows=6, size=4, vocab=9, dtype=torch.float64)
    token_weight = torch.rand(6, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda h, w, c: linear_logprob(h, w, target, bias=c, impl="reference", **head), (hidden, weight, b)
    )
    frozen = {"bias": b.detach(), "impl": "reference", "temperature": 0.6, **head}
    torch.autograd.gradcheck(lambda h: linear_logprob(h, weight.detach(), target, **frozen), hidden)
    torch.autograd.gradcheck(
        lambda h, w, c: collapse_loss(h, w, target, token_weight, bias=c, impl="reference", **head).loss,
        (hidden, weight, b),
    )


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("impl", DRAWING)
def test_linear_sample_is_head_then_sample(impl, head, monkeypatch, rng_seed):
    monkeypatch.setattr(LINEAR_SAMPLE, "CHUNK_ROWS", 10)
    rows = 6 if impl == "triton" and not torch.cuda.is_available() else 23  # a third of a second each, interpreted
    hidden, weight, b, _ = (t.detach() for t in make(rows))
    z = head["logit_scale"] * F.linear(hidden, weight, b)
    logits = z if head["softcap"] is None else head["softcap"] * torch.tanh(z / head["softcap"])
    options = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": rng_seed}
    drawn, want = linear_sample(hidden, weight, bias=b, impl=impl, **head, **options), sample(logits, **options)
    assert torch.equal(drawn.token, want.token)
    torch.testing.assert_close(drawn.logprob, want.logprob, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"top_k": 9, "top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("impl", DRAWING)
def test_many_draws_from_one_hidden_state(impl, options, monkeypatch, rng_seed):
    monkeypatch.setattr(LINEAR_SAMPLE, "CHUNK_ROWS", 4)
    hidden, weight, b, _ = (t.detach() for t in make(9))
    hidden[7] = math.nan  # nobody draws from it
    row = torch.tensor([8, 0, 0, 3, 8, 5, 0, 3, 0, 2])
    coordinates = {"sequence": torch.randint(99, (10,)), "position": torch.randint(99, (10,)), "seed": rng_seed}
    got = linear_sample(hidden, weight, bias=b, impl=impl, hidden_row=row, **coordinates, **options)
    want = linear_sample(hidden[row], weight, bias=b, impl=impl, **coordinates, **options)
    assert torch.equal(got.token, want.token)
    for mine, theirs in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    none = linear_sample(hidden, weight, bias=b, impl=impl, hidden_row=row[:0])
    assert none.token.shape == (0,)


@pytest.mark.parametrize(
    ("rows", "options"), [(3, {}), (17, {}), (3, {"top_k": 9, "top_p": 0.9})], ids=["few rows", "more", "truncated"]
)
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_a_seed_in_memory_is_read_by_the_kernels(impl, rows, options, rng_seed):
    """So that the CUDA graphs of a decoding step draw by another one in each call."""
    hidden, weight = (t.detach() for t in make(rows)[:2])
    given = {"bias": None, "softcap": None, "logit_scale": 1.0, "temperature": 0.9, "min_p": 0.0, "top_k": None}
    given |= {"top_p": 1.0, "sequence": torch.arange(rows), "position": torch.arange(rows), **options}
    run, seed = backend.load("linear_sample", impl), 2**62 + rng_seed
    memory = torch.tensor([0, seed, 0])
    drawn, want = run(hidden, weight, seed=memory[1:2], **given), run(hidden, weight, seed=seed, **given)
    assert all(torch.equal(*pair) for pair in zip(drawn, want, strict=True))


def test_bad_hidden_rows():
    hidden, weight = torch.zeros(3, 5), torch.zeros(7, 5)
    for row, error, match in [
        (torch.tensor([0, 3]), ValueError, r"hidden_row: .* expected integers in \[0, 3\)"),
        (torch.tensor([2, -1]), ValueError, "hidden_row: got -1 at row 1"),
        (torch.tensor([[0]]), ValueError, r"hidden_row: got shape \[1, 1\]"),
        (torch.tensor([0], dtype=torch.int32), TypeError, "hidden_row: got dtype torch.int32"),
    ]:
        with pytest.raises(error, match=match):
            linear_sample(hidden, weight, hidden_row=row)
    with pytest.raises(ValueError, match=r"sequence: got shape \[3\], expected \[2\]"):
        linear_sample(hidden, weight, hidden_row=torch.tensor([0, 1]), sequence=torch.arange(3))


@pytest.mark.refuses_values
@pytest.mark.parametrize(
    ("op", "impl"),
    [*product(["linear_logprob", "collapse_loss"], IMPLS), *product(["linear_sample"], DRAWING)],
)
def test_bad_input(op, impl):
    hidden, weight, _, target = make(bias=False)
    hidden, weight = hidden.detach(), weight.detach()
    ones = torch.ones(len(target))

    def call(hidden=hidden, weight=weight, target=target, token_weight=ones, **options):
        if op == "linear_sample":
            return linear_sample(hidden, weight, impl=impl, **options)
        if op == "linear_logprob":
            return linear_logprob(hidden, weight, target, impl=impl, **options)
        return collapse_loss(hidden, weight, target, token_weight, impl=impl, **options)

    cases = [
        ({"hidden": hidden[:, 1:]}, ValueError, "weight: got shape"),
        ({"hidden": hidden[0]}, ValueError, "hidden: got shape"),
        ({"weight": weight.bfloat16()}, TypeError, "weight: got dtype torch.bfloat16"),
        ({"weight": weight[:0]}, ValueError, r"weight: got shape \[0, 19\], expected at least one token and one dim"),
        ({"hidden": hidden[:, :0], "weight": weight[:, :0]}, ValueError, r"weight: got shape \[307, 0\], expected at"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias: got shape \[3\]"),
        ({"softcap": -1.0}, ValueError, "softcap: got -1.0"),
        ({"softcap": 1e-50}, ValueError, r"softcap: got 1e-50, expected None or a number in \[1.175e-38, 3.403e\+38\]"),
        ({"softcap": 1e300}, ValueError, r"softcap: got 1e\+300"),
        ({"logit_scale": math.inf}, ValueError, "logit_scale: got inf"),
        ({"logit_scale": 0}, ValueError, "logit_scale: got 0, expected a number in .* or the negative of one"),
        ({"logit_scale": -1e-50}, ValueError, "logit_scale: got -1e-50"),
        ({"hidden": hidden + math.nan}, ValueError, f"^{op}: the logits of row {int(op != 'linear_sample')} hold NaN"),
    ]
    if op != "linear_sample":
        cases += [
            (
                {"ignore_index": 2**63},
                ValueError,
                r"ignore_index: got 9223372036854775808, expected None or an integer",
            ),
            ({"target": target[1:]}, ValueError, "target: got shape"),
            ({"target": target.int()}, TypeError, "target: got dtype torch.int32"),
            (
                {"target": target.clone().fill_(307)},
                ValueError,
                r"target: got 307 at row 0, expected token ids in \[0, 307\)",
            ),
        ]
    if op == "linear_logprob":
        cases.append(({"temperature": 0.0}, ValueError, "temperature: got 0.0"))
    if op == "collapse_loss":
        cases.append(({"token_weight": ones * math.nan}, ValueError, "token_weight: got nan at row 0"))
        cases.append(({"token_weight": ones.double()}, TypeError, "token_weight: got dtype"))
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            call(**change)
    if impl == "native":
        with pytest.raises(BackendUnavailable, match="not float16"):
            call(hidden=hidden.half(), weight=weight.half())


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl, rng_seed):
    hidden, weight, b, target = make(rows=7, size=5, vocab=21)
    hidden, weight = (x.detach().T.contiguous().T.requires_grad_() for x in (hidden, weight))  # gradients lie in rows
    token_weight = torch.rand(7)
    op, options = import_module("pmc_fast.ops.linear_logprob")._linear_logprob, (None, 1.0, 0.9, IGNORED, impl)
    torch.library.opcheck(op, (hidden, weight, target, b, None, *options))
    if impl != "triton":
        x, *head = (t.detach().bfloat16() for t in (hidden, weight, b))
        behind = x.requires_grad_()[:0].sum()
        torch.library.opcheck(op, (x, head[0], target, head[1], behind, *options))
    torch.library.opcheck(
        import_module("pmc_fast.ops.collapse_loss")._collapse_loss,
        (hidden, weight, target, token_weight, b, None, 3.0, 1.0, IGNORED, [True, True, True], impl),
    )


@pytest.mark.parametrize("impl", DRAWING)
def test_opcheck_of_linear_sample(impl, rng_seed):
    hidden, weight, index = torch.randn(3, 5), torch.randn(21, 5), torch.arange(4)
    for hidden_row in (None, torch.tensor([2, 2]), torch.tensor([2, 0, 2, 1])):  # few: each is drawn from many times
        at = index[: len(hidden if hidden_row is None else hidden_row)]
        torch.library.opcheck(
            import_module("pmc_fast.ops.linear_sample")._linear_sample,
            (hidden, weight, None, None, 1.0, 0.9, None, 0.9, 0.0, 3, at, at, hidden_row, impl),
        )


@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_without_a_graph_break(frozen, rng_seed):
    hidden, weight, b, target = make()
    if frozen:
        freeze(weight, b)
    leaves = (hidden,) if frozen else (hidden, weight, b)
    token_weight = torch.rand(len(target))

    def step(hidden, weight, b):
        loss = collapse_loss(hidden, weight, target, token_weight, bias=b).loss
        return loss - linear_logprob(hidden, weight, target, bias=b, temperature=2.0).sum()

    want = torch.autograd.grad(step(hidden, weight, b), leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, c in zip(torch.autograd.grad(compiled(hidden, weight, b), leaves), want, strict=True):
        torch.testing.assert_close(a, c)
