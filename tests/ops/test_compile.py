"""The ops under torch.compile, in one graph, with numbers and sizes that change from call to call."""

import pytest
import torch

from pmc_fast import collapse_loss, decode_attention, linear_logprob, linear_sample, packed_attention, sample


def losses(rows, x, weight):
    hidden, target = torch.randn(rows, 8), torch.randint(0, 13, (rows,))
    options = {"logit_scale": x, "softcap": 5 * x}
    loss = collapse_loss(hidden, weight, target, torch.ones(rows), **options).loss
    return loss - linear_logprob(hidden, weight, target, temperature=x, **options).sum()


def draws(rows, x, weight):
    options = {"temperature": x, "top_k": rows, "top_p": x, "min_p": x / 10, "seed": rows}
    drawn = linear_sample(torch.randn(rows, 8), weight.detach(), logit_scale=x, softcap=5 * x, **options)
    return drawn.logprob.sum() + sample(torch.randn(rows, 13), **options).logprob.sum()


def attention(rows, x, weight):
    key, value = torch.randn(2, rows, 2, 11, 8)
    arguments = torch.randn(rows, 6, 8), key, value, torch.zeros(rows, dtype=torch.int64)
    return decode_attention(*arguments, scale=x, softcap=5 * x).sum() + decode_attention(*arguments).sum()


def training_attention(rows, x, weight):
    query, key, value = (weight[:heads] * torch.randn(rows, heads, 8) for heads in (6, 2, 2))
    return packed_attention(query, key, value, [2, rows - 2], scale=x, softcap=5 * x, window=rows - 1).square().sum()


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("function", [losses, draws, attention, training_attention])
def test_numbers_that_change(function, dynamic, rng_seed):
    differentiable = function in (losses, training_attention)
    weight = torch.randn(13, 8, requires_grad=differentiable)
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows, x in ((3, 0.5), (5, 0.7), (7, 0.9)):
        results = []
        for f in (compiled, function):
            torch.manual_seed(rng_seed)
            result = f(rows, x, weight)
            results.append((result.detach(), *(torch.autograd.grad(result, weight) if differentiable else ())))
        torch.testing.assert_close(*results)
