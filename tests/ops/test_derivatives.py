"""Derivatives of the losses and of `packed_attention` against plain torch: the first ones everywhere, all others refused."""

import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

from pmc_fast import collapse_loss, decode_attention, linear_logprob, linear_sample, packed_attention, sample
from pmc_fast.parallel_head import VocabShards
from pmc_fast.parallel_head import collapse_loss as shared_collapse_loss
from pmc_fast.parallel_head import linear_logprob as shared_linear_logprob

IMPLS = ["reference", "native"]


@pytest.fixture
def inputs(rng_seed):
    """hidden, weight, target, token_weight."""
    return torch.randn(5, 8), torch.randn(13, 8), torch.randint(0, 13, (5,)), torch.rand(5)


def plain(hidden, weight, target, token_weight):
    return (token_weight * F.cross_entropy(hidden @ weight.T, target, reduction="none")).sum()


def collapse(hidden, weight, target, token_weight, impl):
    return collapse_loss(hidden, weight, target, token_weight, impl=impl).loss


def logprob(hidden, weight, target, token_weight, impl):
    return -(token_weight * linear_logprob(hidden, weight, target, impl=impl)).sum()


def plain_attention(hidden, weight, target, token_weight):
    scores = (hidden @ hidden.T) / 10
    out = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf")).softmax(-1) @ (hidden + weight[:5]) / 3
    return (token_weight * out.square().sum(1)).sum()


def attention(hidden, weight, target, token_weight, impl):
    query, value = hidden[:, None], (hidden + weight[:5])[:, None] / 3
    out = packed_attention(query, query, value, [2, 3], scale=0.1, impl=impl)
    return (token_weight * out.square().sum((1, 2))).sum()


PLAIN = {collapse: plain, logprob: plain, attention: plain_attention}


@pytest.fixture(params=[(f, impl) for f in PLAIN for impl in IMPLS], ids=lambda p: f"{p[0].__name__}-{p[1]}")
def loss(request):
    """One of the losses, or one made of attention, as a function of hidden, weight, target and token_weight."""
    function, impl = request.param
    return partial(function, impl=impl)


@pytest.fixture
def in_torch(loss):
    return PLAIN[loss.func]


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shared_collapse(hidden, weight, target, token_weight):
    return shared_collapse_loss(hidden, weight, target, token_weight, shards=VocabShards.of(weight)).loss


def shared_logprob(hidden, weight, target, token_weight):
    return -(token_weight * shared_linear_logprob(hidden, weight, target, shards=VocabShards.of(weight))).sum()


def refuse_second_derivatives(loss, hidden, weight, target, token_weight):
    # The gradient of which argument, of the loss to which power, and whether the head has none.
    for power, of, frozen in ((1, 0, False), (2, 0, False), (1, 0, True), (2, 0, True), (1, 1, False), (1, 3, False)):
        arguments = [hidden.clone().requires_grad_(), weight.clone(), target, token_weight.clone()]
        arguments[1].requires_grad_(not frozen)
        if of == 3:
            arguments[3].requires_grad_()
        value = loss(*arguments)
        (gradient,) = torch.autograd.grad(value**power, arguments[of], create_graph=True)
        refused = pytest.raises(RuntimeError, match="its gradients have no derivatives; for second-order")
        if of == 3:
            (of_hidden,) = torch.autograd.grad(value, arguments[0], create_graph=True)
            with refused:
                torch.autograd.grad(of_hidden.sum(), arguments[3], allow_unused=True)
        if of == 3 and gradient.grad_fn.name() == "MulBackward0":
            continue  # the token weights multiply log-probabilities outside of the op
        with refused:
            torch.autograd.grad(gradient.pow(2).sum(), arguments[0], retain_graph=True, allow_unused=True)
        with refused:
            (value + gradient.pow(2).sum()).backward()


def test_a_second_backward_pass_is_refused(loss, inputs):
    refuse_second_derivatives(loss, *inputs)


class Stop(torch.autograd.Function):
    """Hands no gradient on, not even zeros."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        return None


def test_no_gradient_from_above_is_none_below(loss, inputs):
    hidden, *others = inputs
    leaf = hidden.clone().requires_grad_()
    assert torch.autograd.grad(Stop.apply(loss(leaf, *others)), leaf, allow_unused=True) == (None,)


@pytest.mark.parametrize("function, frozen", [(collapse, False), (collapse, True), (logprob, True)])
def test_what_has_its_gradient_is_not_kept(function, frozen, inputs):
    """It would be in memory until the backward pass, as a weight that autocast made for the call."""
    hidden, weight, *rest = inputs
    hidden, kept = hidden.bfloat16().requires_grad_(), []
    copy = weight.requires_grad_(not frozen).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        loss = function(hidden, copy, *rest, impl=None)
    assert kept and not {copy.data_ptr(), hidden.data_ptr()} & set(kept)
    with torch.no_grad():
        hidden.zero_(), weight.zero_()  # it does not look at them again
    loss.backward()
    assert hidden.grad.any() and (frozen or weight.grad is not None)


@pytest.mark.parametrize("loss", [shared_collapse, shared_logprob])
def test_a_second_backward_pass_is_refused_with_a_shared_head(loss, inputs, one_rank):
    refuse_second_derivatives(loss, *inputs)


def test_vmap_over_no_rows(loss, in_torch, inputs):
    hidden, *others = inputs
    none = hidden.new_empty(0, *hidden.shape)
    for each in (loss, in_torch):
        assert vmap(lambda x, f=each: f(x, *others))(none).shape == (0,)
        assert grad(lambda x, f=each: vmap(lambda y: f(y, *others))(x).sum())(none).shape == none.shape
        of_two = vmap(grad(each, (0, 3)), in_dims=(0, None, None, None))(none, *others)
        assert [gradient.shape for gradient in of_two] == [none.shape, (0, *others[2].shape)]


def test_the_hessian_is_refused_rather_than_zero(loss, inputs):
    hidden, weight, *others = inputs
    for of, leaf in ((lambda x: loss(x, weight, *others), hidden), (lambda x: loss(hidden, x, *others), weight)):
        with pytest.raises(RuntimeError, match="its gradients have no derivatives; for second-order"):
            torch.autograd.functional.hessian(of, leaf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_upstream_gradients_at_once(loss, dtype, inputs):
    hidden, weight, *others = inputs
    leaf = hidden.to(dtype).requires_grad_()
    value = loss(leaf, weight.to(dtype), *others)
    (batch,) = torch.autograd.grad(value, leaf, torch.tensor([1.0, 3.0]), retain_graph=True, is_grads_batched=True)
    for got, upstream in zip(batch, (1, 3), strict=True):
        torch.testing.assert_close(got, *torch.autograd.grad(upstream * value, leaf, retain_graph=True))


def test_an_upstream_gradient_larger_than_those_that_it_scales_can_be(inputs):
    """A usual scale of losses, 65536, is infinite in float16."""
    hidden, weight, target, token_weight = inputs
    leaf = hidden.half().requires_grad_()
    value = collapse(leaf, weight.half(), target, token_weight / 1000, "reference")
    (got,) = torch.autograd.grad(value, leaf, torch.tensor([2.0**16]), retain_graph=True, is_grads_batched=True)
    assert torch.equal(got[0], torch.autograd.grad(value, leaf)[0] * 2**16) and got.isfinite().all()


def test_a_graph_of_the_gradients_that_nobody_differentiates(loss, in_torch, inputs):
    hidden, *others = inputs
    hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(3 * loss(hidden, *others), hidden, create_graph=True)
    torch.testing.assert_close(gradient, 3 * grad(in_torch)(*inputs))


def test_transforms(loss, in_torch, inputs):
    hidden, weight, target, token_weight = inputs
    for of in ((0, 1), (1, 3)):
        for got, want in zip(grad(loss, of)(*inputs), grad(in_torch, of)(*inputs), strict=True):
            torch.testing.assert_close(got, want)
    torch.testing.assert_close(jacrev(loss, 1)(*inputs), grad(in_torch, 1)(*inputs))
    pull = vjp(lambda x: loss(x, *inputs[1:]), hidden)[1]
    torch.testing.assert_close(pull(torch.tensor(3.0))[0], 3 * grad(in_torch)(*inputs))
    hiddens, weights = torch.randn(3, *hidden.shape), torch.randn(*weight.shape, 3)
    both = {"in_dims": (0, 2, None, None)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(
            vmap(loss, **both)(hiddens, weights, target, token_weight),
            vmap(in_torch, **both)(hiddens, weights, target, token_weight),
        )
        per_sample = [vmap(grad(f, (0, 1)), **both)(hiddens, weights, target, token_weight) for f in (loss, in_torch)]
    torch.testing.assert_close(*per_sample)
    sums = [
        grad(lambda x, f=f: vmap(f, **both)(x, weights, target, token_weight).sum())(hiddens) for f in (loss, in_torch)
    ]
    torch.testing.assert_close(*sums)


@pytest.mark.parametrize("function", [collapse, logprob])
@pytest.mark.parametrize("impl", ["triton"])
def test_the_gradient_of_triton(function, impl, inputs):
    torch.testing.assert_close(grad(partial(function, impl=impl), 1)(*inputs), grad(plain, 1)(*inputs))


def test_second_derivatives_in_transforms_are_refused(loss, inputs):
    hidden, *others = inputs

    def norm(x):
        return grad(loss)(x, *others).pow(2).sum()

    for second in (lambda: grad(norm)(hidden), lambda: norm(hidden.requires_grad_()).backward()):
        with pytest.raises(RuntimeError, match="its gradients have no derivatives; for second-order"):
            second()


def test_forward_mode_is_refused(loss, in_torch, inputs):
    hidden, *others = inputs

    def f(x):
        return loss(x, *others)

    def dual():
        with forward_ad.dual_level():
            f(forward_ad.make_dual(hidden, hidden))

    forward = [
        dual,
        lambda: jvp(f, (hidden,), (hidden,)),
        lambda: jvp(grad(f), (hidden,), (hidden,)),
        lambda: grad(lambda x: jvp(f, (x,), (hidden,))[1])(hidden),
        lambda: vmap(lambda t: jvp(f, (hidden,), (t,)))(hidden[None]),
        lambda: jacfwd(f)(hidden),
        lambda: hessian(f)(hidden),
    ]
    for derivative in forward:
        with pytest.raises(NotImplementedError, match="has no forward-mode derivatives"):
            derivative()
    value, tangent = jvp(lambda scale: scale * f(hidden), (torch.tensor(2.0),), (torch.tensor(1.0),))  # not of the op
    torch.testing.assert_close(value, 2 * in_torch(*inputs))
    torch.testing.assert_close(tangent, in_torch(*inputs))


def test_a_transform_that_is_compiled_runs_as_it_is(loss, in_torch, inputs):
    compiled = torch.compile(grad(loss, (0, 1)), backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), grad(in_torch, (0, 1))(*inputs))


def draw(hidden, weight):
    return sample(hidden @ weight.T, seed=3)


def linear_draw(hidden, weight):
    return linear_sample(hidden, weight, seed=3)


@pytest.mark.parametrize("drawing", [draw, linear_draw])
@pytest.mark.parametrize("compiled", [False, True])
def test_draws_carry_no_gradient(drawing, compiled, inputs):
    hidden, weight, *_ = inputs
    want = drawing(hidden, weight)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    function = torch.compile(drawing, fullgraph=True, backend="aot_eager") if compiled else drawing
    got = function(*leaves)
    assert not any(x.requires_grad for x in got)
    torch.testing.assert_close(got, want)
    assert (leaves[0] * 2).requires_grad  # gradients are off for the draw alone


@pytest.mark.parametrize("drawing", [draw, linear_draw])
def test_draws_within_a_transform(drawing, inputs):
    hidden, weight, target, token_weight = inputs
    zero = grad(lambda h: drawing(h, weight).logprob.sum() + (0 * h).sum())(hidden)
    assert not zero.any()

    def on_policy(h, loss):
        return loss(h, weight, drawing(h, weight).token, token_weight)

    got, want = (grad(on_policy)(hidden, f) for f in (partial(collapse, impl=None), plain))
    torch.testing.assert_close(got, want)


NAMES = ["query", "key", "value", "prefix_key", "prefix_value"]


def attention_inputs():
    key, value, prefix_key, prefix_value = torch.randn(4, 5, 2, 3, 8)
    row = torch.zeros(5, dtype=torch.int64)
    prefix = {"prefix_key": prefix_key, "prefix_value": prefix_value, "prefix_row": row}
    return {"query": torch.randn(5, 4, 8), "key": key, "value": value, "first": row, **prefix}


@pytest.mark.parametrize("name", NAMES)
def test_attention_refuses_derivatives(name, rng_seed):
    arguments = attention_inputs()
    want, leaf = decode_attention(**arguments), arguments[name].clone().requires_grad_()

    def attend(tensor):
        return decode_attention(**{**arguments, name: tensor})

    refused = [
        lambda: attend(leaf),
        lambda: grad(lambda x: attend(x).sum())(leaf.detach()),
        lambda: grad(lambda x: vmap(attend)(x).sum())(leaf.detach()[None]),
        lambda: torch.compile(attend, backend="aot_eager")(leaf),
    ]
    for derivative in refused:
        with pytest.raises(
            (ValueError, NotImplementedError), match="for inference and has no gradients; call it within"
        ):
            derivative()
    with pytest.raises(NotImplementedError, match="decode_attention: has no forward-mode derivatives"):
        jvp(attend, (leaf.detach(),), (leaf.detach(),))
    with torch.no_grad():
        torch.testing.assert_close(attend(leaf), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(
            vmap(attend)(leaf.detach()[None].expand(2, *leaf.shape)), want.expand(2, *want.shape)
        )
