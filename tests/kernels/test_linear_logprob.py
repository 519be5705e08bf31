"""What only the Triton implementation of `linear_logprob` has: tiles, parts of the vocabulary, slices, float16."""

import math

import pytest
import torch
from head_cases import DEVICE, DTYPES, IGNORED, assert_as_good_as_torch, by_torch, make

pytest.importorskip("triton")
from pmc_fast import linear_logprob
from pmc_fast.gpu import cross_entropy, gemm
from pmc_fast.kernels import device, sliced_backward
from pmc_fast.kernels import linear_logprob as kernels
from pmc_fast.reference.head import logits as head_logits


def run(hidden, weight, bias, target, upstream, needs=(True, True, True), ignore_index=IGNORED, **options):
    options = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0} | options
    options |= {"bias": bias, "ignore_index": ignore_index}
    logprob, normalizer = kernels.linear_logprob(hidden, weight, target, **options)
    needs = (*needs[:2], needs[2] and bias is not None)
    gradients = kernels.linear_logprob_backward(upstream, hidden, weight, target, normalizer, needs=needs, **options)
    return logprob, *gradients


def assert_right(
    hidden, weight, bias, target, upstream, ignore_index=IGNORED, softcap=None, logit_scale=1.0, **options
):
    case = dict(hidden=hidden, weight=weight, bias=bias, target=target, upstream=upstream)
    case |= dict(softcap=softcap, logit_scale=logit_scale, **options)
    got = run(ignore_index=ignore_index, **case)
    assert_as_good_as_torch(got, **case)
    return got


@pytest.fixture
def slices(monkeypatch):
    """The backward pass in slices of the vocabulary, several of them."""
    monkeypatch.setattr(cross_entropy, "MOST_ROWS", 3)
    monkeypatch.setattr(sliced_backward, "LEAST_TOKENS", 32)
    monkeypatch.setattr(sliced_backward, "SLICE_BYTES", 1)
    monkeypatch.setattr(sliced_backward, "BLOCK", 16)


@pytest.fixture(params=["one chunk", "slices"])
def path(request):
    if request.param == "slices":
        request.getfixturevalue("slices")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(path, head, dtype, poisoned, rng_seed):
    hidden, weight, bias, target = make(dtype=dtype)
    hidden = torch.stack([hidden, hidden], dim=1)[:, 0]  # rows apart
    upstream = torch.randn(len(target), device=DEVICE)
    assert_right(hidden, weight, bias, target, upstream, temperature=0.7, **head)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, size, vocab", [(1, 1, 1), (1, 200, 300), (70, 64, 17), (2, 65, 513)])
def test_shapes_that_no_tile_fits(rows, size, vocab, dtype, slices, poisoned, rng_seed):
    hidden, weight, _, target = make(rows, size, vocab, dtype, bias=False, ignored=False)
    hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T  # columns apart: what kernels do not read
    assert_right(hidden, weight, None, target, torch.randn(rows, device=DEVICE), ignore_index=None)


@pytest.mark.parametrize("splits", [1, 4])
def test_programs_of_several_tiles_and_groups_of_row_blocks(splits, monkeypatch, poisoned, rng_seed):
    """5 row blocks (of 72 rows that count) in groups of 2, and 6 tiles of tokens, which 4 programs divide among them."""
    whole = kernels.tiles_for
    monkeypatch.setattr(kernels, "tiles_for", lambda *shape: whole(*shape)._replace(ROWS=16, TOKENS=16))
    monkeypatch.setattr(kernels, "GROUP", 2)
    monkeypatch.setattr(kernels, "splits_for", lambda *shape: splits)
    hidden, weight, bias, target = make(rows=90)
    assert_right(hidden * 5, weight, bias, target, torch.randn(len(target), device=DEVICE), temperature=0.7)


def test_gradients_of_small_upstreams_do_not_underflow(path, rng_seed):
    """At 1e-4 per token float16 cannot hold the gradients of most logits: torch's are a hundred times less accurate."""
    hidden, weight, bias, target = make(dtype=torch.float16, vocab=203)
    upstream = torch.rand(len(target), device=DEVICE) * 1e-4
    case = dict(hidden=hidden, weight=weight, bias=bias, target=target, upstream=upstream)
    case |= {"softcap": None, "logit_scale": 1.0}
    smallest = 2.0**-24
    for mine, want in zip(run(**case)[1:], by_torch(torch.float64, **case)[1:], strict=True):
        assert (mine.double() - want).abs().max() <= smallest + 2.0**-10 * want.abs().max()


def test_confident_rows_in_bfloat16(slices, rng_seed):
    """Logits of 100 are rounded to halves in bfloat16, and p - 1 must still be small."""
    hidden, weight, _, target = make(dtype=torch.bfloat16, bias=False, ignored=False)
    weight[target] = 5 * hidden
    upstream = torch.ones(len(target), device=DEVICE)
    # The two passes' products may sum in other orders: p is off by some units of the logit in float32, and nothing else is.
    case = dict(hidden=hidden, weight=weight, bias=None, target=target, upstream=upstream)
    case |= {"softcap": None, "logit_scale": 1.0}
    of_p = 4 * torch.finfo(torch.float32).eps * (hidden.double() @ weight.double().T).abs().max()
    exact, usual = by_torch(torch.float64, **case), by_torch(torch.bfloat16, **case)
    factors = 1, weight.abs().max(), hidden.abs().max()
    for mine, torchs, want, factor in zip(run(**case)[:3], usual, exact, factors, strict=False):
        error, most = ((t.double() - want).abs().max() for t in (mine, torchs))
        # Of a row that is not sure, torch's products are as far off as ours.
        assert error <= of_p * factor + 2 * most + torch.finfo(mine.dtype).eps * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ruled_out_tokens(path, dtype, rng_seed):
    """-inf in tiles that hold nothing else, too."""
    hidden, weight, bias, target = make(dtype=dtype, vocab=600)
    target[target != IGNORED] %= 256
    bias[256:] = -math.inf
    bias[target[1]] = 0.0
    _, _, d_weight, d_bias = assert_right(hidden, weight, bias, target, torch.randn(len(target), device=DEVICE))
    assert not d_weight[256:].any() and not d_bias[256:].any()


@pytest.mark.refuses_values
@pytest.mark.parametrize("bad", ["nan", "inf", "only -inf", "temperature"])
def test_the_first_bad_row_is_named_as_the_caller_counts(bad, rng_seed):
    hidden, weight, bias, target = make()
    options = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0}
    row = 3
    if bad == "only -inf":
        bias[:], row = -math.inf, 1
    elif bad == "temperature":
        hidden[row:] *= 1e9
        options["temperature"] = 1e-30
    else:
        hidden[[8, row]] = float(bad)
    hidden[0] = math.nan  # an ignored row, which nobody looks at
    with pytest.raises(ValueError, match=f"linear_logprob: the logits of row {row} hold"):
        kernels.linear_logprob(hidden, weight, target, bias=bias, ignore_index=IGNORED, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstreams_of_ignored_rows_are_not_looked_at(path, dtype, rng_seed):
    hidden, weight, bias, target = make(dtype=dtype)
    upstream = torch.randn(len(target), device=DEVICE)
    want = run(hidden, weight, bias, target, upstream)
    upstream[target == IGNORED] = math.inf
    for mine, same in zip(run(hidden, weight, bias, target, upstream), want, strict=True):
        assert torch.equal(mine, same)


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize("ignore_index", [IGNORED, None])
def test_a_graph_used_twice_scores_once(ignore_index, path, monkeypatch, rng_seed):
    hidden, weight, bias, target = make(ignored=ignore_index is not None)
    upstream = torch.randn(len(target), device=DEVICE)
    want = run(hidden, weight, bias, target, upstream, ignore_index=ignore_index)
    forward = Counted(kernels.forward_kernel)
    monkeypatch.setattr(kernels, "forward_kernel", forward)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    logprob = linear_logprob(hidden, weight, target, bias=bias, ignore_index=ignore_index, impl="triton")
    for _ in range(2):
        got = torch.autograd.grad(logprob, leaves, upstream, retain_graph=True)
        assert all(torch.equal(mine, same) for mine, same in zip((logprob, *got), want, strict=True))
    assert forward.launches == 1


def test_normalizer(head, poisoned, rng_seed):
    hidden, weight, bias, target = make()
    options = {"bias": bias, "temperature": 0.7, "ignore_index": IGNORED} | head
    _, normalizer = kernels.linear_logprob(hidden, weight, target, **options)
    logits = head_logits(hidden.double(), weight.double(), bias.double(), **head) / 0.7
    want = torch.stack([logits.amax(1), (logits - logits.amax(1, keepdim=True)).exp().sum(1)], 1)
    want[target == IGNORED] = 0
    torch.testing.assert_close(normalizer, want.float(), rtol=1e-4, atol=1e-4)


def test_gradients_that_nobody_needs(path, rng_seed):
    hidden, weight, bias, target = make()
    upstream = torch.randn(len(target), device=DEVICE)
    _, *all_of_them = run(hidden, weight, bias, target, upstream)
    for one in range(3):
        _, *some = run(hidden, weight, bias, target, upstream, needs=[i == one for i in range(3)])
        assert torch.equal(some[one], all_of_them[one])
        assert all(some[i] is None for i in range(3) if i != one)


@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_score(rows):
    hidden, weight, bias, target = make(rows)
    target[:] = IGNORED
    logprob, d_hidden, d_weight, d_bias = run(hidden, weight, bias, target, torch.ones(rows, device=DEVICE))
    assert logprob.shape == (rows,) and d_hidden.shape == hidden.shape and d_weight.shape == weight.shape
    assert not any(t.any() for t in (logprob, d_hidden, d_weight, d_bias))


def test_splits_fill_the_chip():
    for row_blocks in (1, 2, 3, 4, 13, 16, 63, 64, 65, 256):
        for tiles in (2, 192, 200, 501, 1025):
            splits = kernels.splits_for(row_blocks, tiles, at_once=132)
            assert 1 <= splits <= tiles
            rounds = math.ceil(row_blocks * splits / 132) * math.ceil(tiles / splits)
            least = math.ceil(row_blocks * tiles / 132)
            assert rounds <= max(least, 1.16 * least, 2)


def test_pieces_cover_everything():
    for count, most, multiple in [
        (0, 5, 1),
        (1, 5, 128),
        (5, 5, 4),
        (11, 5, 4),
        (14, 5, 4),
        (5000, 4096, 128),
        (128256, 8192, 256),
    ]:
        pieces = list(gemm.even_pieces(count, most, multiple))
        assert [i for piece in pieces for i in range(count)[piece]] == list(range(count))
        assert all(piece.stop - piece.start <= most for piece in pieces)


def test_rows_are_apart_by_multiples_of_16():
    for columns, stride in ((16, 16), (83, 96)):
        rows = gemm.padded_rows(3, columns, torch.bfloat16, torch.device("cpu"))
        assert rows.shape == (3, columns) and rows.stride() == (stride, 1)


def test_float32_is_multiplied_as_tf32_only_where_torch_may():
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    assert device.dot_precision() == "ieee"
    try:
        settings.allow_tf32 = True
        assert device.dot_precision() == "tf32"
        settings.allow_tf32 = False
        assert device.dot_precision() == "ieee"
        settings.fp32_precision = "tf32"
        assert device.dot_precision() == "tf32"
    finally:
        settings.allow_tf32 = False
        settings.fp32_precision = before
