"""Rows that the CUDA kernel does not take, those that only look as if, and those that it draws from many times or never."""

import math
from importlib import import_module

import pytest
import torch

from pmc_fast import BackendUnavailable, linear_sample, sample
from pmc_fast import cuda as package

implementation = import_module("pmc_fast.cuda.linear_sample")


@pytest.mark.parametrize("impl", ["cuda"])
def test_elements_apart(impl, rng_seed):
    logits = torch.randn(301, 4)
    want = sample(logits.T.contiguous(), seed=rng_seed, impl=impl).token
    assert torch.equal(sample(logits.T, seed=rng_seed, impl=impl).token, want)
    assert sample(torch.zeros(4, 3)[:, 2:], impl=impl).token.tolist() == [0] * 4


@pytest.mark.parametrize("impl", ["cuda"])
def test_more_tokens_than_the_kernel_counts(impl, monkeypatch):
    monkeypatch.setattr(package.library(), "MOST_VOCAB", 30)
    with pytest.raises(ValueError, match="logits: got 31 tokens, expected at most 30"):
        sample(torch.zeros(2, 31), impl=impl)


@pytest.mark.parametrize("impl", ["cuda"])
def test_rows_that_share_memory(impl, rng_seed):
    logits = torch.randn(1, 301).expand(5, -1)
    want = sample(logits.contiguous(), seed=rng_seed, impl=impl).token
    assert torch.equal(sample(logits, seed=rng_seed, impl=impl).token, want)


@pytest.mark.parametrize("impl", ["cuda"])
def test_linear_sample_in_pieces(impl, monkeypatch, rng_seed):
    hidden, weight, bias = torch.randn(7, 5), torch.randn(43, 5), torch.randn(43)
    options = {"bias": bias, "top_p": 0.8, "seed": rng_seed, "impl": impl}
    whole = linear_sample(hidden, weight, **options)
    monkeypatch.setattr(implementation, "SCRATCH_BYTES", 4 * 43 * 3)
    pieces = linear_sample(hidden, weight, **options)
    assert torch.equal(pieces.token, whole.token)
    for a, b in zip(pieces[1:], whole[1:], strict=True):  # products of other shapes round differently
        torch.testing.assert_close(a, b)


@pytest.fixture
def products(monkeypatch):
    """How many rows each product has."""
    seen, multiply = [], implementation.write_product
    monkeypatch.setattr(implementation, "write_product", lambda out, *of: seen.append(len(out)) or multiply(out, *of))
    return seen


def exact_in_any_order(*shape):
    """Multiples of 1/4 so small that float32 sums of their products do not round."""
    return torch.randint(-8, 9, shape) / 4


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize(
    ("draws", "at_once", "multiplied"),
    [
        (13, 6, [6]),
        (13, 5, [5, 5, 3]),  # too many logits to be held
        (6, 6, [6]),
        (4, 6, [4]),  # not shared, since rows are as many as draws or more
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 20, "top_p": 0.9}, {"top_p": 0.8}, {"min_p": 0.1, "temperature": 0.7}, {"temperature": 0.0}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_draws_share_the_logits_of_a_row(
    impl, dtype, options, draws, at_once, multiplied, products, monkeypatch, rng_seed
):
    monkeypatch.setattr(implementation, "SCRATCH_BYTES", 4 * 131 * at_once)
    hidden, weight = exact_in_any_order(6, 20).to(dtype), exact_in_any_order(131, 20).to(dtype)
    hidden[3] = math.nan  # nobody draws from it
    row = torch.tensor([0, 1, 2, 4, 5])[torch.randint(5, (2 * draws,))][::2]
    where = {"sequence": torch.randint(2**32, (draws,)), "position": torch.randint(2**32, (draws,)), "seed": rng_seed}
    got = linear_sample(hidden, weight, hidden_row=row, impl=impl, **where, **options)
    want = linear_sample(hidden[row], weight, impl="reference", **where, **options)
    assert torch.equal(got.token, want.token) and products == multiplied
    for mine, its in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}], ids=str)
def test_all_draws_from_one_row(impl, options, products, rng_seed):
    hidden, weight, bias = torch.randn(3, 5), torch.randn(301, 5), torch.randn(301)
    row, options = torch.full((40,), 2), {"softcap": 5.0, "logit_scale": 0.6, "seed": rng_seed, **options}
    got = linear_sample(hidden, weight, bias=bias, hidden_row=row, impl=impl, **options)
    assert products == [3]
    want = linear_sample(hidden[row], weight, bias=bias, impl="reference", **options)
    assert torch.equal(got.token, want.token)
    torch.testing.assert_close(got.logprob, want.logprob, rtol=1e-4, atol=1e-4)


@pytest.mark.refuses_values
@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("rows", [3, 9])
def test_the_first_bad_draw_is_named(impl, rows):
    """Also where the bad row has another number, or a lower one is drawn from later."""
    hidden, row = torch.zeros(rows, 5), torch.tensor([0, 0, 2, 1, 2, 1, 0, 0])
    hidden[1:] = math.nan
    with pytest.raises(ValueError, match="linear_sample: the logits of row 2 "):
        linear_sample(hidden, torch.zeros(301, 5), hidden_row=row, impl=impl)


def test_tensors_on_the_cpu_are_refused():
    with pytest.raises(BackendUnavailable, match="CUDA"):
        sample(torch.zeros(2, 5), impl="cuda")
    with pytest.raises(BackendUnavailable, match="run on GPUs, the tensors are on cpu"):
        package.queue(torch.zeros(2))
