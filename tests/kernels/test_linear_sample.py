"""What only the Triton implementation of `linear_sample` has: winners of tiles, pieces of rows, scratch in bounds."""

import math

import pytest
import torch
from distribution import assert_follows
from head_cases import DTYPES

pytest.importorskip("triton")
from pmc_fast.kernels import linear_sample as kernels
from pmc_fast.philox import gumbel
from pmc_fast.reference.linear_sample import linear_sample as reference

SAMPLING = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0, "seed": 7}
PLAIN = {"bias": None, "softcap": None, "logit_scale": 1.0}


def coordinates(rows):
    sequence, position = torch.randint(0, 2**32, (rows, 2)).unbind(1)  # every other one in memory
    return {"sequence": sequence, "position": position}


def exact_in_any_order(*shape):
    """Multiples of 1/4 so small that float32 sums of their products do not round."""
    return torch.randint(-8, 9, shape) / 4


def assert_same(hidden, weight, exactly=True, **options):
    options = SAMPLING | PLAIN | coordinates(len(hidden)) | options
    got, want = kernels.linear_sample(hidden, weight, **options), reference(hidden, weight, **options)
    assert torch.equal(got[0], want[0])
    for mine, its in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=5e-6 if exactly else 1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("rows, size, vocab", [(1, 1, 1), (3, 64, 131), (20, 19, 300)])
def test_winners_of_tiles(rows, size, vocab, temperature, dtype, rng_seed):
    """Tiles that are cut off on every side."""
    hidden, weight = exact_in_any_order(rows, size).to(dtype), exact_in_any_order(vocab, size).to(dtype)
    assert_same(hidden, weight, temperature=temperature, seed=2**62 + rng_seed)


def test_two_tokens_whose_noise_is_low(monkeypatch, rng_seed):
    """Bounds lie far above such noise: for one of these rows in ten that of the wrong token is the higher one."""
    monkeypatch.setattr(kernels, "FUSED_ROWS", 48)
    where = coordinates(8192)
    low = gumbel(rng_seed, *where.values(), 2).amax(1) < -0.6
    where = {name: x[low][:48] for name, x in where.items()}
    hidden, weight = torch.randint(1, 3, (48, 1)) / 4, torch.tensor([[1.0], [0.0]])
    assert_same(hidden, weight, seed=rng_seed, **where)


def test_more_rows_than_a_tile_holds(monkeypatch, rng_seed):
    """35 rows are a tile of 32, drawn in pieces, and one of 3."""
    monkeypatch.setattr(kernels, "FUSED_ROWS", 35)
    hidden, weight = exact_in_any_order(35, 70).half(), exact_in_any_order(129, 70).half()
    assert_same(hidden, weight, temperature=0.7)


@pytest.mark.parametrize(
    ("fused", "at_once", "multiplied"),
    [(3, 5, [5]), (3, 4, [3, 3, 3]), (9, 5, None)],  # pieces of 9 rows that are not shared; no product
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0}], ids=str)
def test_draws_share_the_logits_of_a_row(options, fused, at_once, multiplied, monkeypatch, rng_seed):
    monkeypatch.setattr(kernels, "FUSED_ROWS", fused)
    monkeypatch.setattr(kernels, "SCRATCH_BYTES", 4 * 131 * at_once)
    products, multiply = [], kernels.write_product
    monkeypatch.setattr(kernels, "write_product", lambda out, *of: products.append(len(out)) or multiply(out, *of))
    hidden, weight = exact_in_any_order(5, 20), exact_in_any_order(131, 20)
    hidden[3] = math.nan  # nobody draws from it
    row = torch.tensor([0, 1, 2, 4])[torch.randint(4, (9, 2))][:, 0]
    options = SAMPLING | PLAIN | coordinates(9) | options
    got = kernels.linear_sample(hidden, weight, hidden_row=row, **options)
    want = reference(hidden[row], weight, **options)
    assert torch.equal(got[0], want[0])
    for mine, its in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=5e-6)
    if multiplied is not None:
        assert products == multiplied


@pytest.mark.parametrize("options", [{}, {"top_k": 20, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_scale_and_soft_cap(dtype, options, rng_seed):
    hidden, weight, bias = torch.randn(6, 33).to(dtype), torch.randn(200, 33).to(dtype), torch.randn(200).to(dtype)
    bias[::9] = -math.inf
    assert_same(hidden, weight, exactly=False, bias=bias, logit_scale=0.6, temperature=0.8, **options)
    bias[::9] = 0
    assert_same(hidden, weight, exactly=False, bias=bias, softcap=3.0, logit_scale=-0.6, **options)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}], ids=str)
def test_rows_and_columns_apart(options, rng_seed):
    hidden = exact_in_any_order(5, 2, 24)[:, 1]
    assert_same(hidden, exact_in_any_order(24, 150).T, **options)
    assert_same(hidden.T.contiguous().T, exact_in_any_order(150, 30)[:, 3:27], **options)


@pytest.mark.parametrize("options", [{}, {"top_k": 9}], ids=str)
def test_pieces_of_rows_know_their_numbers(options, monkeypatch, rng_seed):
    monkeypatch.setattr(kernels, "SCRATCH_BYTES", 4 * 140 * 3)
    monkeypatch.setattr(kernels, "FUSED_ROWS", 7)
    hidden, weight = exact_in_any_order(8, 16), exact_in_any_order(140, 16)
    assert_same(hidden, weight, **options)


@pytest.mark.refuses_values
@pytest.mark.parametrize("fused", [7, 8])
@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"temperature": 0.0}], ids=str)
def test_the_first_bad_row_is_named(options, fused, monkeypatch):
    monkeypatch.setattr(kernels, "SCRATCH_BYTES", 4 * 140 * 3)
    monkeypatch.setattr(kernels, "FUSED_ROWS", fused)
    hidden, weight = exact_in_any_order(8, 16), exact_in_any_order(140, 16)
    hidden[5:, 2] = math.nan
    with pytest.raises(ValueError, match="linear_sample: the logits of row 5"):
        kernels.linear_sample(hidden, weight, **(SAMPLING | PLAIN | coordinates(8) | options))


def test_draws_follow_the_distribution(monkeypatch, rng_seed):
    monkeypatch.setattr(kernels, "FUSED_ROWS", 256)
    draws, vocab, temperature = 256, 23, 1.6
    hidden, weight = exact_in_any_order(1, 16), exact_in_any_order(vocab, 16) / 2
    options = SAMPLING | PLAIN | coordinates(draws) | {"temperature": temperature, "seed": rng_seed}
    token, _, sampling_logprob, _ = kernels.linear_sample(hidden.expand(draws, -1), weight, **options)
    p = (hidden.double() @ weight.double().T / temperature).softmax(-1)[0]
    torch.testing.assert_close(sampling_logprob, p.log()[token].float(), rtol=1e-5, atol=5e-6)
    assert_follows(token.bincount(minlength=vocab), p)


def test_scores_do_not_depend_on_company(rng_seed):
    """One row alone is multiplied by the fused kernel, among 70 by torch."""
    hidden, weight = exact_in_any_order(70, 40), exact_in_any_order(260, 40)
    where = coordinates(70)
    options = SAMPLING | PLAIN | {"temperature": 0.9}
    together = kernels.linear_sample(hidden, weight, **options, **where)
    alone = kernels.linear_sample(hidden[69:], weight, **options, **{k: v[69:] for k, v in where.items()})
    assert torch.equal(together[0][69:], alone[0])
    for a, b in zip(together[1:], alone[1:], strict=True):
        torch.testing.assert_close(a[69:], b, rtol=1e-6, atol=1e-6)
