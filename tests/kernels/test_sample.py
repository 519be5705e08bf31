"""What only the Triton implementation of `sample` has: tiles, groups, a buffer that may overflow, bounds on noise."""

import math

import pytest
import torch

pytest.importorskip("triton")
from pmc_fast.kernels import draw as drawing
from pmc_fast.kernels import sample as kernels
from pmc_fast.kernels import truncate
from pmc_fast.reference.sample import sample as reference

pytestmark = pytest.mark.usefixtures("poisoned")

PLAIN = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0}
UNTRUNCATED = [{}, {"temperature": 0.6}, {"temperature": 0.0}]
TRUNCATED = [
    {"top_k": 40},
    {"top_p": 0.9},
    {"min_p": 0.02},
    {"temperature": 1.4, "top_k": 150, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.95},
    {"temperature": 1e-3, "top_p": 0.9},
    {"top_k": 300, "min_p": 1e-4},
]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(drawing, "TILE", 256)
    monkeypatch.setattr(truncate, "GROUP", 16)


def draw(implementation, logits, seed, sequence=None, position=None, **options):
    rows = len(logits)
    sequence = torch.arange(rows) if sequence is None else sequence
    position = torch.zeros(rows, dtype=torch.int64) if position is None else position
    return implementation(logits, seed=seed, sequence=sequence, position=position, **{**PLAIN, **options})


def assert_same(logits, seed, **options):
    got, want = (draw(implementation, logits, seed, **options) for implementation in (kernels.sample, reference))
    assert torch.equal(got[0], want[0]), options
    for mine, its in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=5e-6)
    assert (got[3] <= 1).all()


@pytest.mark.parametrize("options", UNTRUNCATED + TRUNCATED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # bfloat16 in tests/ops
def test_rows_in_tiles_and_groups(options, dtype, small_tiles, rng_seed):
    logits = (torch.randn(2, 1005) * 3).to(dtype)[:, 2:]  # an offset view; neither 16 nor 256 divides 1003
    logits[0, ::7] = -math.inf
    sequence, position = torch.randint(0, 2**32, (2, 2)).unbind(1)  # every other one in memory
    assert_same(logits, 2**62 + rng_seed, sequence=sequence, position=position, **options)


@pytest.mark.parametrize("options", TRUNCATED, ids=str)
@pytest.mark.parametrize("capacity", [1, 16])
def test_more_candidates_than_the_buffer_holds(options, capacity, small_tiles, monkeypatch, rng_seed):
    monkeypatch.setattr(truncate, "CAPACITY", capacity)
    assert_same(torch.randn(1, 613), rng_seed, **options)
    assert_same(torch.randint(-2, 3, (1, 613)).float(), rng_seed, **options)  # ties across every edge


@pytest.mark.parametrize("candidates", [15, 16, 17])
def test_as_many_candidates_as_the_buffer_holds(candidates, small_tiles, monkeypatch, rng_seed):
    monkeypatch.setattr(truncate, "CAPACITY", 16)
    logits = torch.full((1, 613), -math.inf)
    logits[0, torch.randperm(613)[:candidates]] = torch.rand(candidates)
    for options in ({"min_p": 1e-9}, {"top_p": 1 - 1e-6}, {"temperature": 0.7, "top_k": 40}):
        assert_same(logits, rng_seed, **options)


def test_all_but_what_is_cut_off_is_in_groups_maxima(small_tiles, rng_seed):
    """A token to a group, so that the groups' masses say exactly where the cut is: 21 of 40 are kept, the last one by a hair."""
    logits = torch.full((1, 640), -math.inf)
    logits[0, 5::16] = torch.arange(40)[torch.randperm(40)] / 500
    mass = logits[0].double().softmax(0).sort(descending=True).values.cumsum(0)
    for options in ({"top_k": 21}, {"top_p": float(mass[19]) + 1e-6}):
        assert_same(logits, rng_seed, **options)


@pytest.mark.parametrize("capacity", [4, 4096])
def test_ties_are_kept_by_lower_token_id(capacity, small_tiles, monkeypatch):
    monkeypatch.setattr(truncate, "CAPACITY", capacity)
    logits = torch.zeros(2, 301)
    logits[:, 1::2] = -0.0
    assert int(draw(kernels.sample, logits, 0, top_k=2)[0].max()) <= 1
    _, _, _, kept_mass = draw(kernels.sample, logits, 0, top_p=5.5 / 301)
    torch.testing.assert_close(kept_mass, torch.full((2,), 6 / 301))
    drawn = draw(kernels.sample, torch.zeros(1, 10), 1, top_p=0.1)  # 0.1 of 10 is 1.0 in float64, not in float32
    assert drawn[0].tolist() == [0] and drawn[3].tolist() == pytest.approx([0.1])
    assert draw(kernels.sample, logits, 0, temperature=0.0)[0].tolist() == [0] * 2


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e9])
def test_logits_so_large_that_rounding_hides_noise(scale, small_tiles, rng_seed):
    """Many tokens have the same score: bounds say nothing, and the lowest of the highest must win."""
    logits = scale + torch.randint(-3, 4, (2, 701)).float()
    for options in ({}, {"top_k": 500}):
        assert_same(logits, rng_seed, **options)
    for options in ({"temperature": 0.7}, {"temperature": 0.7, "top_k": 500}):  # their masses differ by what is rounded
        drawn, want = (draw(each, -logits, rng_seed, **options) for each in (kernels.sample, reference))
        assert torch.equal(drawn[0], want[0])


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"top_k": 3}, {"temperature": 0.7, "top_p": 0.5}, {"temperature": 0.0}],
    ids=str,
)
def test_tokens_of_minus_infinity(options, small_tiles, rng_seed):
    logits = torch.full((4, 600), -math.inf)
    logits[0, 599] = -5.0
    logits[1, 255:257] = 2.0
    logits[2, 0] = 1e30
    logits[3, 16:32] = torch.randn(16)
    assert_same(logits, rng_seed, **options)


def test_columns_apart_and_rows_that_share_memory(small_tiles, rng_seed):
    logits = torch.randn(300, 2).T
    for options in ({}, {"top_p": 0.9}):
        assert_same(logits, rng_seed, **options)
        assert_same(logits[:1].expand(3, -1), rng_seed, **options)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 30, "top_p": 0.9}], ids=str)
def test_company_changes_no_bit(options, rng_seed):
    logits, sequence = torch.randn(3, 517) * 2, torch.randint(0, 2**32, (3,))
    together = draw(kernels.sample, logits, rng_seed, sequence, **options)
    alone = draw(kernels.sample, logits[2:], rng_seed, sequence[2:], **options)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[2:], b)


@pytest.mark.refuses_values
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_bad_row_is_named(value, options, small_tiles):
    logits = torch.zeros(4, 300)
    logits[2:, 299] = value
    if value < 0:
        logits[2:] = value
    with pytest.raises(ValueError, match="logits of row 2"):
        draw(kernels.sample, logits, 0, **options)


@pytest.mark.parametrize("vocab, size", [(1, 128), (49152, 128), (128256, 128), (262208, 256), (300_000, 256)])
def test_groups_fit_a_program(vocab, size):
    assert truncate.group_size(vocab) == size
