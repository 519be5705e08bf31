"""The ops with impl="triton" under tracers, on tensors of a GPU that need not be there."""

from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pmc_fast import collapse_loss, decode_attention, linear_logprob, linear_sample, sample


def score(hidden, weight, target, token_weight):
    return collapse_loss(hidden, weight, target, token_weight, ignore_index=None, impl="triton").loss


def logprob(hidden, weight, target, token_weight):
    return (linear_logprob(hidden, weight, target, softcap=30.0, impl="triton") * token_weight).sum()


def inputs_of(dtype):
    hidden, weight = (torch.empty(rows, 24, dtype=dtype) for rows in (7, 101))
    return hidden, weight, torch.empty(7, dtype=torch.int64), torch.empty(7)


def nodes_of(function, *inputs):
    graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    return [str(node.target) for node in graph.nodes if str(node.target).startswith("pmc_fast.")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [score, logprob])
def test_losses_on_a_gpu(step, dtype):
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        inputs = inputs_of(dtype)
        loss = step(*inputs)
        assert len(nodes_of(step, *inputs)) == 1
    assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "cuda")


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False]])
def test_gradients_on_a_gpu(needs):
    with FakeTensorMode(), torch.device("cuda"):
        hidden, weight, target, upstream = inputs_of(torch.bfloat16)
        bias = torch.empty(101, dtype=torch.bfloat16)
        gradients = torch.ops.pmc_fast.linear_logprob_backward(
            upstream, hidden, weight, target, torch.empty(7, 2), bias, None, 1.0, 1.0, None, needs, "triton"
        )
        _, _, *fused = import_module("pmc_fast.ops.collapse_loss")._collapse_loss(
            hidden, weight, target, upstream, bias, None, None, 1.0, None, needs, "triton"
        )
    for found in (gradients, fused):
        for gradient, like, need in zip(found, (hidden, weight, bias), needs, strict=True):
            assert gradient.device.type == "cuda" and gradient.dtype == torch.bfloat16
            assert gradient.shape == (like.shape if need else (0,))


# On the CPU: torch's autograd cannot run on a GPU that is not there, even if nothing is computed.
@pytest.mark.parametrize(
    "step, nodes", [(score, ["collapse_loss"]), (logprob, ["linear_logprob", "linear_logprob_backward"])]
)
def test_a_step_is_traced_whole(step, nodes):
    def gradients(*inputs):
        return torch.autograd.grad(step(*inputs), inputs[:2])

    with torch.device("cpu"):
        inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs_of(torch.bfloat16)]
        assert nodes_of(gradients, *inputs) == [f"pmc_fast.{node}.default" for node in nodes]


@pytest.mark.parametrize("cuts", [{}, {"top_k": 5, "top_p": 0.9}], ids=["whole", "truncated"])
def test_draws_on_a_gpu(cuts):
    with FakeTensorMode(), torch.device("cuda"):
        hidden, weight, *_ = inputs_of(torch.bfloat16)
        for drawn in (linear_sample(hidden, weight, impl="triton", **cuts), sample(hidden, impl="triton", **cuts)):
            assert drawn.token.dtype == torch.int64
            assert all(column.shape == (7,) and column.device.type == "cuda" for column in drawn)


def test_attention_on_a_gpu():
    with FakeTensorMode(), torch.device("cuda"):
        query, key, row = torch.empty(7, 6, 24), torch.empty(7, 2, 9, 24), torch.empty(7, dtype=torch.int64)
        shared = {"prefix_key": key, "prefix_value": key, "prefix_row": row}
        for options in ({}, {"length": row}, {"length": row, **shared}):
            out = decode_attention(query, key, key, row, impl="triton", **options)
            assert out.shape == query.shape and out.device.type == "cuda"
