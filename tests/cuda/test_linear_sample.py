"""Hopper's own `linear_sample`, which nothing chooses yet, on an emulated GPU or a real one."""

import math
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from benchmarks.bench_linear_sample_by_rows import LinearSampleByRowsBench
from benchmarks.bench_sample import Settings
from benchmarks.shapes import Head
from pmc_fast import BackendUnavailable
from pmc_fast import cuda as package
from pmc_fast.reference.linear_sample import linear_sample as reference

on_hopper = import_module("pmc_fast.cuda.linear_sample").linear_sample_on_hopper
PLAIN = {
    "bias": None,
    "softcap": None,
    "logit_scale": 1.0,
    "temperature": 1.0,
    "top_k": None,
    "top_p": 1.0,
    "min_p": 0.0,
}


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel needs a Hopper GPU (compute capability 9.0)")
    if torch.cuda.is_available() and find_spec("pmc_fast._cuda") is None:
        pytest.skip("pmc_fast was built without CUDA")


def exact_in_any_order(*shape):
    """Multiples of 1/4 so small that float32 sums of their products do not round."""
    return (torch.randint(-8, 9, shape) / 4).bfloat16()


def coordinates(rows):
    return {"sequence": torch.randint(0, 2**32, (rows,)), "position": torch.randint(0, 2**32, (rows,))}


def assert_same(hidden, weight, **options):
    options = PLAIN | coordinates(len(hidden)) | {"seed": int(torch.randint(2**62, ()))} | options
    got, want = on_hopper(hidden, weight, **options), reference(hidden, weight, **options)
    assert torch.equal(got[0], want[0])
    for mine, its in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize(
    ("rows", "size", "vocab"),
    # every number of rows that is multiplied at once; sizes and vocabularies that end within a tile, or leave the last
    # cluster one tile; more steps than stages; several tiles a block
    [
        (1, 8, 1),
        (3, 600, 131),
        (33, 24, 2100),
        (65, 136, 300),
        (97, 64, 513),
        (131, 200, 1025),
        (161, 328, 300),
        (193, 64, 301),
    ],
)
def test_draws(impl, rows, size, vocab, temperature, rng_seed):
    weight = exact_in_any_order(vocab, size) / 8
    assert_same(exact_in_any_order(rows, size), weight, temperature=temperature)


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("rows", [5, 161])
@pytest.mark.parametrize("options", [{"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.1, "temperature": 0.7}], ids=str)
def test_truncated(impl, rows, options, rng_seed):
    assert_same(exact_in_any_order(rows, 72), exact_in_any_order(301, 72) / 8, **options)


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("options", [{}, {"top_k": 20, "top_p": 0.9}], ids=str)
def test_bias_scale_and_soft_cap(impl, options, rng_seed):
    hidden, weight, bias = (
        torch.randn(6, 40).bfloat16(),
        torch.randn(200, 40).bfloat16() / 4,
        torch.randn(200).bfloat16(),
    )
    assert_same(hidden, weight, bias=bias, softcap=3.0, logit_scale=-0.6, **options)
    bias[::9] = -math.inf
    assert_same(hidden, weight, bias=bias, logit_scale=0.6, temperature=0.8, **options)


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("temperature", [1.0, 0.0, 1e-4])
def test_ties_are_the_lower_tokens(impl, temperature, rng_seed):
    """At 1e-4 scores are so large that noise is lost in most of them."""
    hidden, weight = torch.ones(7, 16).bfloat16(), torch.ones(600, 16).bfloat16()
    weight[4 * torch.randint(150, (30, 1)) + torch.tensor([1, 3])] = 1.5  # two of the four that a thread sees at once
    assert_same(hidden, weight * 4, temperature=temperature)


@pytest.mark.parametrize("impl", ["cuda"])
def test_rows_apart_and_in_pieces(impl, monkeypatch, rng_seed):
    """What lies between the rows is not looked at."""
    apart = torch.full((10, 2, 48), math.nan).bfloat16()
    apart[:, 1, 8:32] = exact_in_any_order(10, 24)
    weight = torch.full((140, 40), math.nan).bfloat16()
    weight[:, 8:32] = exact_in_any_order(140, 24) / 8
    monkeypatch.setattr(package.library(), "MOST_LINEAR_SAMPLE_ROWS", 4)
    assert_same(apart[:, 1, 8:32], weight[:, 8:32])
    assert on_hopper(apart[:0, 1, 8:32], weight[:, 8:32], **PLAIN, **coordinates(0), seed=1)[0].shape == (0,)


@pytest.mark.parametrize("impl", ["cuda"])
def test_scores_do_not_depend_on_company(impl, rng_seed):
    hidden, weight, where = torch.randn(200, 72).bfloat16(), torch.randn(300, 72).bfloat16() / 4, coordinates(200)
    options = PLAIN | {"temperature": 0.9, "seed": rng_seed}
    together = on_hopper(hidden, weight, **options, **where)
    alone = on_hopper(hidden[199:], weight, **options, **{name: of[199:] for name, of in where.items()})
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[199:], b, rtol=1e-6, atol=1e-6)


@pytest.mark.refuses_values
@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 9}], ids=str)
def test_the_first_bad_row_is_named(impl, options):
    hidden, weight = exact_in_any_order(70, 24), exact_in_any_order(301, 24)
    for value in (math.nan, math.inf):
        hidden[41:, 2] = value
        weight[:, 2] = 1
        with pytest.raises(ValueError, match="linear_sample: the logits of row 41"):
            on_hopper(hidden, weight, **(PLAIN | coordinates(70) | {"seed": 3} | options))
    with pytest.raises(ValueError, match="linear_sample: the logits of row 0"):
        bias = torch.full((301,), -math.inf)
        on_hopper(hidden[:5], weight, **(PLAIN | coordinates(5) | {"seed": 3, "bias": bias} | options))


@pytest.mark.parametrize("impl", ["cuda"])
def test_draws_follow_the_distribution(impl, rng_seed):
    """As the benchmark judges them before it times them."""
    bench = LinearSampleByRowsBench(3, Head("small", 1511, 24), Settings(top_p=1.0), torch.bfloat16)
    device = torch.get_default_device()
    inputs, run = bench.make_inputs(rng_seed, device), bench.contestants()["pmc_fast, hopper"]
    verdict = bench.judge(run, run(inputs), inputs, bench.oracle(inputs), None)
    assert verdict.right, verdict.evidence


@pytest.mark.parametrize("impl", ["cuda"])
def test_refusals(impl):
    hidden, weight = torch.zeros(3, 24).bfloat16(), torch.zeros(50, 24).bfloat16()
    options = PLAIN | coordinates(3) | {"seed": 1}
    with pytest.raises(TypeError, match="weight: got dtype torch.float32, expected torch.bfloat16"):
        on_hopper(hidden, weight.float(), **options)
    with pytest.raises(ValueError, match="hidden: got rows 48 bytes apart from address .* expected multiples of 16"):
        on_hopper(hidden[:, 1:], weight[:, 1:], **options)
    with pytest.raises(ValueError, match="weight: got rows 50 bytes apart"):
        on_hopper(hidden, torch.zeros(50, 25).bfloat16()[:, :24], **options)
    with pytest.raises(ValueError, match="hidden: got rows 0 bytes apart .* no less than a row"):
        on_hopper(hidden[:1].expand(3, -1), weight, **options)
    with pytest.raises(ValueError, match=r"weight: got shape \[50, 16\], expected \[V, 24\]"):
        on_hopper(hidden, weight[:, :16], **options)
    with pytest.raises(ValueError, match=r"bias: got shape \[49\], expected \[50\]"):
        on_hopper(hidden, weight, **options | {"bias": torch.zeros(49).bfloat16()})
    with pytest.raises(ValueError, match="weight: got device meta"):
        on_hopper(hidden, weight.to("meta"), **options)
    with pytest.raises(ValueError, match="hidden: .* elements 6 apart"):
        on_hopper(torch.zeros(24, 3).bfloat16().T, weight, **options)


def test_only_hopper(monkeypatch):
    monkeypatch.setattr(package, "queue", lambda tensor: (0, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    with pytest.raises(BackendUnavailable, match=r"capability 9\.0 alone, another has 10\.0"):
        package.hopper_queue(torch.zeros(2))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(package, "library", lambda: type("Library", (), {"TARGETS": "sm_80"}))
    with pytest.raises(BackendUnavailable, match="built for sm_80, this one needs sm_90a"):
        package.hopper_queue(torch.zeros(2))
