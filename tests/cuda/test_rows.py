"""Rows that the CUDA kernel does not take, and those that only look as if."""

import pytest
import torch

from pmc_fast import BackendUnavailable, linear_sample, sample
from pmc_fast import cuda as package


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
    monkeypatch.setattr("pmc_fast.cuda.linear_sample.SCRATCH_BYTES", 4 * 43 * 3)
    pieces = linear_sample(hidden, weight, **options)
    assert torch.equal(pieces.token, whole.token)
    for a, b in zip(pieces[1:], whole[1:], strict=True):  # products of other shapes round differently
        torch.testing.assert_close(a, b)


def test_tensors_on_the_cpu_are_refused():
    with pytest.raises(BackendUnavailable, match="CUDA"):
        sample(torch.zeros(2, 5), impl="cuda")
    with pytest.raises(BackendUnavailable, match="run on GPUs, the tensors are on cpu"):
        package.queue(torch.zeros(2))
