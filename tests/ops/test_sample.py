"""`sample`: exact draws, the same for every implementation, row order and company."""

import math
from importlib import import_module

import pytest
import torch
from distribution import assert_follows

from pmc_fast import BackendUnavailable, linear_sample, sample
from pmc_fast.native.sample import sample as native_sample
from pmc_fast.ops import _checks
from pmc_fast.philox import gumbel

IMPLS = ["reference", "native", "triton", "cuda"]


def rows_for(impl, many, few=4):
    """As many, or few in Triton's interpreter, which takes a third of a second for a row, or some on an emulated GPU."""
    return many if torch.cuda.is_available() else min(many, {"triton": few, "cuda": 40}.get(impl, many))


OPTIONS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"top_p": 0.9, "min_p": 0.3},  # either keeps less than the other
    {"top_p": 0.5, "min_p": 0.02},
    {"top_k": 20, "min_p": 0.3},
    {"top_k": 4, "min_p": 0.02},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.9},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    {"top_p": 1e-6},
    {"top_k": 10_000},
    {"temperature": 2000.0, "min_p": 0.999},
    {"temperature": 1e-3, "top_p": 0.9},
]


def exact(logits, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """The truncated distribution in float64, by sorting, token by token."""
    p = (logits.double() / temperature).softmax(-1)
    out = torch.zeros_like(p)
    for row in range(len(p)):
        order = sorted(range(p.shape[1]), key=lambda i: (-logits[row, i].item(), i))[: top_k or p.shape[1]]
        total, kept, mass = sum(p[row, i].item() for i in order), [], 0.0
        for i in order:
            if kept and mass >= top_p * total:
                break
            kept.append(i)
            mass += p[row, i].item()
        kept = [i for i in kept if p[row, i] >= min_p * p[row].max()]
        out[row, kept] = p[row, kept]
    return out / out.sum(-1, keepdim=True), out.sum(-1)


@pytest.mark.parametrize("impl", ["reference", "native"])  # triton's tokens are held against theirs
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_follow_the_exact_distribution(options, impl, rng_seed):
    vocab, draws = 37, 6000
    logits = torch.randn(1, vocab) * 1.5
    logits[0, 3] = -math.inf
    expected, mass = exact(logits, **options)
    drawn = sample(logits.expand(draws, -1), seed=rng_seed, impl=impl, **options)
    counts = drawn.token.bincount(minlength=vocab).double()
    assert_follows(counts, expected[0])
    # A scaled logit is rounded to float32: 0.0001 at 2000, where a second token is kept at a temperature of 0.001.
    rounding = 2**-23 * logits.max() / options.get("temperature", 1)
    want = expected[0].log()[drawn.token].float()
    torch.testing.assert_close(drawn.sampling_logprob, want, rtol=1e-4, atol=1e-4 + float(rounding))
    torch.testing.assert_close(drawn.logprob, logits[0].log_softmax(-1)[drawn.token], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn.kept_mass, mass.float().expand(draws), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 12, "top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_linear_draws_follow_the_exact_distribution(options, impl, rng_seed):
    hidden, weight, bias, draws = torch.randn(3, 19), torch.randn(37, 19) * 0.3, torch.randn(37), 6000
    expected, mass = exact(hidden[1:2] @ weight.T + bias, **options)
    row = torch.ones(draws, dtype=torch.int64)
    drawn = linear_sample(hidden, weight, bias=bias, hidden_row=row, seed=rng_seed, impl=impl, **options)
    assert_follows(drawn.token.bincount(minlength=37), expected[0])
    torch.testing.assert_close(drawn.kept_mass, mass.float().expand(draws), rtol=1e-4, atol=1e-5)


def assert_same(got, want, logits, options):
    """What came with the tokens. Rows whose mass reaches top_p but for rounding may keep one token more or fewer."""
    kept = (logits.double() / options.get("temperature", 1)).softmax(-1).sort(descending=True).values
    kept = kept[:, : options.get("top_k")]
    mass = (kept / kept.sum(1, keepdim=True)).cumsum(1)
    sure = ((mass - options.get("top_p", 1)).abs() > 5e-7).all(1) | ("top_p" not in options)
    assert sure.sum() >= len(sure) - 5  # of 65 rows of 4099 tokens 0.03 are not, so six at once never
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a[sure], b[sure], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 2, 31, 257, 1003, 4099])
def test_cuda_draws_the_same_tokens(vocab, dtype, impl, rng_seed):
    rows = 9
    logits = (torch.randn(rows, vocab + 3) * 3).to(dtype)[:, 3:]  # an offset view
    sequence, position = torch.randint(0, 2**32, (rows,)), torch.randint(0, 2**20, (rows,))
    for options in OPTIONS:
        got, want = (
            sample(logits, seed=rng_seed, sequence=sequence, position=position, impl=each, **options)
            for each in (impl, "reference")
        )
        assert torch.equal(got.token, want.token), options
        assert_same(got, want, logits, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 2, 31, 257, 1003, 4099])
def test_native_draws_the_same_tokens(vocab, dtype, each_isa, rng_seed):
    """The reference, which takes most of the time, draws once for all instruction sets."""
    logits = (torch.randn(65, vocab + 3) * 3).to(dtype)[:, 3:]  # an offset view
    sequence, position = torch.randint(0, 2**32, (65, 2)).unbind(1)  # every other one in memory
    where = {"seed": rng_seed, "sequence": sequence, "position": position}
    for options in OPTIONS:
        want = sample(logits, impl="reference", **where, **options)
        for isa in each_isa():
            got = sample(logits, impl="native", **where, **options)
            assert torch.equal(got.token, want.token), (isa, options)
            assert_same(got, want, logits, options)
    for first in (4, 96, 4 * (vocab // 4)):  # the noise of a row's end, as if what precedes it could not be drawn
        whole = torch.cat([torch.full((65, first), -math.inf, dtype=dtype), logits], 1)
        for options in OPTIONS:
            want = sample(whole, impl="reference", **where, **options).token - first
            options = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0} | options
            for isa in each_isa():
                got, *_ = native_sample(logits, first_token=first, **where, **options)
                assert torch.equal(got, want), (isa, options)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_noise_is_that_of_seed_sequence_and_position(impl, rng_seed):
    rows = rows_for(impl, 40)
    logits, sequence, position = torch.randn(rows, 101), torch.randint(0, 2**32, (rows,)), torch.randint(0, 99, (rows,))
    drawn = sample(logits, temperature=0.7, seed=rng_seed, sequence=sequence, position=position, impl=impl)
    assert torch.equal(drawn.token, (logits / 0.7 + gumbel(rng_seed, sequence, position, 101)).argmax(1))


@pytest.mark.parametrize("impl", IMPLS)
def test_company_and_order_do_not_matter(impl, rng_seed):
    rows = rows_for(impl, 40)
    logits, sequence = torch.randn(rows, 501) * 2, torch.randint(0, 2**32, (rows,))
    options = {"seed": rng_seed, "top_p": 0.9, "impl": impl}
    whole = sample(logits, sequence=sequence, **options).token
    order = torch.randperm(rows)[: rows * 2 // 5]
    assert torch.equal(sample(logits[order], sequence=sequence[order], **options).token, whole[order])


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_are_kept_by_lower_token_id(impl, rng_seed):
    logits = torch.zeros(rows_for(impl, 300, 2), 1031)
    for cut, kept in (({"top_k": 7}, 7), ({"top_p": 5.5 / 1031}, 6)):
        drawn = sample(logits, seed=rng_seed, impl=impl, **cut)
        assert int(drawn.token.max()) < kept
        assert len(logits) < 300 or len(drawn.token.unique()) == kept
        torch.testing.assert_close(drawn.kept_mass, torch.full((len(logits),), kept / 1031), rtol=1e-4, atol=0)
    assert not sample(logits, temperature=0.0, impl=impl).token.any()
    halves = sample(logits[:, :8], top_p=0.5, seed=rng_seed, impl=impl)  # which four reach, so that a fifth is too many
    assert halves.token.max() < 4 and (halves.kept_mass == 0.5).all()


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("vocab", [1024, 1025])
def test_as_many_candidates_as_a_block_lists_and_one_more(vocab, impl, rng_seed):
    drawn = sample(torch.full((2, vocab), 3.0), temperature=2.0, min_p=0.9, seed=rng_seed, impl=impl)
    assert (drawn.kept_mass == 1).all()


@pytest.mark.parametrize("impl", ["cuda"])
def test_more_tokens_are_kept_than_there_are_threads(impl, rng_seed):
    logits = torch.randn(3, 301) / 10
    got, want = (sample(logits, top_k=290, seed=rng_seed, impl=each) for each in (impl, "reference"))
    assert torch.equal(got.token, want.token)
    torch.testing.assert_close(got.kept_mass, want.kept_mass)


@pytest.mark.parametrize("impl", IMPLS)
def test_greedy_takes_the_first_maximum(impl, rng_seed):
    logits = torch.randint(-3, 4, (rows_for(impl, 50), 333)).float()
    drawn = sample(logits, temperature=0.0, impl=impl)
    first = torch.tensor([row.index(max(row)) for row in logits.tolist()])
    assert torch.equal(drawn.token, first)
    most_probable = sample(logits, min_p=1.0, impl=impl).token[:, None]
    assert torch.equal(logits.gather(1, most_probable)[:, 0], logits.amax(1))
    assert not drawn.sampling_logprob.any() and (drawn.kept_mass == 1).all()


@pytest.mark.refuses_values
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_no_distribution_are_named(value, impl):
    logits = torch.zeros(5, 67)
    logits[3, 66] = value
    for temperature in (1.0, 0.0):
        with pytest.raises(ValueError, match="logits of row 3"):
            sample(logits, temperature=temperature, impl=impl)
        with pytest.raises(ValueError, match="logits of row 0"):
            sample(torch.full((1, 9), -math.inf), temperature=temperature, impl=impl)


@pytest.mark.refuses_values
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("top", [1e10, -1e10])
def test_logits_that_overflow_when_divided_by_the_temperature_are_named(top, impl):
    logits = torch.zeros(4, 67)
    logits[2] = top
    with pytest.raises(ValueError, match="row 2 hold .* or overflow when divided by the temperature"):
        sample(logits, temperature=1e-30, impl=impl)
    logits[:, 1:] = -1e10  # what overflows to -inf below a finite maximum is merely impossible
    logits[:, 0] = 0
    assert not sample(logits, temperature=1e-30, impl=impl).token.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": -0.1}, ValueError, "temperature: got -0.1"),
        ({"temperature": math.nan}, ValueError, "temperature: got nan"),
        ({"temperature": math.inf}, ValueError, "temperature: got inf"),
        ({"temperature": 1e-40}, ValueError, r"temperature: got 1e-40, expected a number in \[1.175e-38, 3.403e\+38\]"),
        ({"top_k": 0}, ValueError, "top_k: got 0"),
        ({"top_k": 2**63}, ValueError, r"top_k: got 9223372036854775808, expected None or an integer in \[1, 2\^63\)"),
        ({"top_p": 0.0}, ValueError, "top_p: got 0.0"),
        ({"top_p": 1.01}, ValueError, "top_p: got 1.01"),
        ({"min_p": 1.5}, ValueError, "min_p: got 1.5"),
        ({"min_p": -0.1}, ValueError, "min_p: got -0.1"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"sequence": torch.zeros(2, dtype=torch.int64)}, ValueError, r"sequence: got shape \[2\], expected \[3\]"),
        ({"position": torch.zeros(3)}, TypeError, "position: got dtype torch.float32"),
        ({"sequence": torch.tensor([0, -1, 0])}, ValueError, "sequence: got -1 at row 1"),
        ({"sequence": torch.tensor([-(2**63), 0, 0])}, ValueError, f"sequence: got {-(2**63)} at row 0"),
        (
            {"position": torch.tensor([0, 2**32 - 1, 2**32])},
            ValueError,
            "position: got 4294967296 at row 2, expected int",
        ),
        ({"position": torch.tensor([0, 0, 2**63 - 1])}, ValueError, f"position: got {2**63 - 1} at row 2"),
        ({"impl": "fast"}, ValueError, "impl: got 'fast'"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        sample(torch.zeros(3, 5), **change)
    for shape in ((5,), (3, 0)):
        with pytest.raises(ValueError, match="logits: got shape"):
            sample(torch.zeros(shape))


@pytest.mark.parametrize("op", [sample, lambda x, **options: linear_sample(x, torch.eye(5), **options)])
@pytest.mark.parametrize("given", [[], ["sequence"], ["position"], ["sequence", "position"]])
def test_only_given_coordinates_are_checked(given, op, monkeypatch, rng_seed):
    checked, counters = [], _checks.counters
    monkeypatch.setattr(_checks, "counters", lambda name, values: (checked.append(name), counters(name, values)))
    logits, default = torch.randn(7, 5), {"sequence": torch.arange(7), "position": torch.zeros(7, dtype=torch.int64)}
    token = op(logits, seed=rng_seed, **{name: default[name] for name in given}).token
    assert checked == given
    assert torch.equal(token, op(logits, seed=rng_seed, **default).token)


def test_a_named_implementation_never_falls_back():
    logits = torch.zeros(2, 7, dtype=torch.float16)
    with pytest.raises(BackendUnavailable, match="not float16"):
        sample(logits, impl="native")
    assert sample(logits).token.shape == (2,)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl, rng_seed):
    op = import_module("pmc_fast.ops.sample")._sample
    logits, index = torch.randn(2, 33), torch.arange(2)
    for sequence, position in ((index, index), (None, None)):
        torch.library.opcheck(op, (logits, 0.9, 10, 0.9, 0.0, 3, sequence, position, impl))


def test_compile(rng_seed):
    logits = torch.randn(5, 33)
    compiled = torch.compile(
        lambda x: sample(x, temperature=0.8, top_p=0.9, seed=5), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(logits).token, sample(logits, temperature=0.8, top_p=0.9, seed=5).token)


@pytest.mark.parametrize("impl", ["native", "reference", "cuda"])
def test_min_p_at_the_largest_logits(impl):
    """Divided by a temperature and multiplied again, the largest float may become infinite."""
    top = torch.finfo(torch.float32).max
    logits = torch.tensor([[0.0, top, -top, top]])
    for temperature in torch.linspace(1.05, 9, 200).tolist():
        assert int(sample(logits, temperature=temperature, min_p=0.5, seed=3, impl=impl).token) in (1, 3)
