"""What only the Triton implementation of `collapse_loss` has: chunks on a device that nobody waits for, float16."""

import math

import pytest
import torch
from head_cases import DEVICE, DTYPES, IGNORED, assert_as_good_as_torch, by_torch, make

pytest.importorskip("triton")
from pmc_fast.gpu import cross_entropy
from pmc_fast.kernels import collapse_loss as kernels
from pmc_fast.kernels.cross_entropy import row_launch


def run(hidden, weight, bias, target, token_weight, needs=(True, True, True), ignore_index=IGNORED, **head):
    options = {"softcap": None, "logit_scale": 1.0} | head
    options |= {"bias": bias, "ignore_index": ignore_index, "needs": needs}
    return kernels.collapse_loss(hidden, weight, target, token_weight, **options)


def assert_right(hidden, weight, bias, target, token_weight, ignore_index=IGNORED, softcap=None, logit_scale=1.0):
    case = dict(hidden=hidden, weight=weight, bias=bias, target=target, softcap=softcap, logit_scale=logit_scale)
    loss, token_nll, *gradients = run(token_weight=token_weight, ignore_index=ignore_index, **case)
    assert_as_good_as_torch((-token_nll, *gradients), upstream=-token_weight, **case)
    torch.testing.assert_close(loss, torch.dot(token_weight, token_nll))
    assert not token_nll[target == IGNORED].any()
    assert not gradients[0][(target == IGNORED) | (token_weight == 0)].any()
    return gradients


@pytest.fixture
def chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "LEAST_ROWS", 3)
    monkeypatch.setattr(cross_entropy, "MOST_ROWS", 3)


@pytest.fixture(params=["one chunk", "chunks"])
def path(request):
    if request.param == "chunks":
        request.getfixturevalue("chunks")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ignore_index", [IGNORED, None])
def test_against_float64(path, ignore_index, head, dtype, poisoned, rng_seed):
    rows = 9 if dtype != torch.bfloat16 else 29  # more than a chunk and as many as hidden has dimensions
    hidden, weight, bias, target = make(rows, dtype=dtype, ignored=ignore_index is not None)
    hidden = torch.stack([hidden, hidden], dim=1)[:, 0]  # rows apart
    token_weight = torch.rand(rows, device=DEVICE) / rows
    token_weight[2::4] = 0
    assert_right(hidden, weight, bias, target, token_weight, ignore_index=ignore_index, **head)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, size, vocab", [(1, 1, 1), (3, 200, 16), (2, 3, 9001), (2, 3, 8192)])
def test_shapes_that_no_block_fits(rows, size, vocab, dtype, chunks, poisoned, rng_seed):
    hidden, weight, bias, target = make(rows, size, vocab, dtype, ignored=False)
    hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T
    assert_right(hidden, weight, bias, target, torch.rand(rows, device=DEVICE), ignore_index=None)


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_rows_longer_than_a_block(element_bytes, rng_seed):
    """Production's blocks are longer than the interpreter's rows, so one row of many blocks stands for them."""
    vocab = 70001
    block, _ = row_launch(vocab, element_bytes, softcap=False)
    assert vocab > 2 * block
    hidden, weight, bias, target = make(
        1, 16, vocab, {2: torch.bfloat16, 4: torch.float32}[element_bytes], ignored=False
    )
    for label in (0, block - 1, block, vocab - 1):
        target[:] = label
        assert_right(hidden, weight, bias, target, torch.ones(1, device=DEVICE), ignore_index=None)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e4])
def test_small_and_large_weights_in_float16(path, scale, rng_seed):
    """1 / (number of tokens) times a softmax is below float16's smallest number; torch's gradients lose it."""
    hidden, weight, bias, target = make(dtype=torch.float16, vocab=203)
    token_weight = torch.rand(len(target), device=DEVICE) * scale
    case = dict(hidden=hidden, weight=weight, bias=bias, target=target, softcap=None, logit_scale=1.0)
    gradients = run(**case, token_weight=token_weight)[2:]
    smallest = 2.0**-24
    for mine, want in zip(gradients, by_torch(torch.float64, upstream=-token_weight, **case)[1:], strict=True):
        if want.abs().max() < torch.finfo(torch.float16).max:
            assert (mine.double() - want).abs().max() <= smallest + 2.0**-10 * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ruled_out_tokens(path, dtype, rng_seed):
    hidden, weight, bias, target = make(dtype=dtype)
    target[target != IGNORED] = target[target != IGNORED] // 3 * 3
    bias[1::3] = -math.inf
    _, d_weight, d_bias = assert_right(hidden, weight, bias, target, torch.rand(len(target), device=DEVICE))
    assert not d_weight[1::3].any() and not d_bias[1::3].any()


def test_gradients_that_nobody_needs(path, rng_seed):
    hidden, weight, bias, target = make(dtype=torch.bfloat16)
    token_weight = torch.rand(len(target), device=DEVICE)
    whole = run(hidden, weight, bias, target, token_weight)
    for needs in [(False, False, False), (True, False, False), (False, True, False), (False, False, True)]:
        some = run(hidden, weight, bias, target, token_weight, needs=needs)
        assert torch.equal(some[0], whole[0]) and torch.equal(some[1], whole[1])
        for need, mine, full in zip(needs, some[2:], whole[2:], strict=True):
            assert torch.equal(mine, full) if need else mine is None


def test_scores_alone_leave_the_logits(monkeypatch, rng_seed):
    """Without gradients the kernel only reads."""
    hidden, weight, bias, target = make()
    seen = []
    write_logits = cross_entropy.write_logits

    def watch(hidden, weight, bias, out):
        write_logits(hidden, weight, bias, out)
        seen.append((out, out.clone()))

    monkeypatch.setattr(cross_entropy, "write_logits", watch)
    run(hidden, weight, bias, target, torch.ones(len(target), device=DEVICE), needs=(False, False, False))
    ((after, before),) = seen
    assert torch.equal(after, before)


@pytest.mark.refuses_values
@pytest.mark.parametrize("bad", ["nan", "inf", "only -inf"])
def test_the_first_bad_row_is_named_as_the_caller_counts(bad, chunks, rng_seed):
    hidden, weight, bias, target = make()
    row = 3
    if bad == "only -inf":
        bias[:], row = -math.inf, 1
    else:
        hidden[[8, row]] = float(bad)
    hidden[0] = math.nan  # an ignored row, which nobody looks at
    with pytest.raises(ValueError, match=f"collapse_loss: the logits of row {row} hold"):
        run(hidden, weight, bias, target, torch.ones(len(target)))


@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_score(rows):
    hidden, weight, bias, target = make(rows)
    target[:] = IGNORED
    loss, token_nll, *gradients = run(hidden, weight, bias, target, torch.ones(rows, device=DEVICE))
    assert loss == 0 and token_nll.shape == (rows,)
    for gradient, leaf in zip(gradients, (hidden, weight, bias), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


@pytest.mark.parametrize(
    ("largest", "scale", "temperature", "exponent"),
    [
        (1.0, 1.0, 1.0, 14),
        (0.75, -4.0, 2.0, 14),
        (0.002, 1.0, 1.0, 23),
        (3e38, 10.0, 1.0, -113),
        (1e-37, 1.0, 1.0, 126),
    ],
)
def test_magnification(largest, scale, temperature, exponent):
    """The power of two that brings the largest gradient to [2^14, 2^15), as far as float32 has such powers."""
    found = cross_entropy.magnification(torch.tensor([0.0, -largest, largest / 3]), scale, temperature)
    assert found.tolist() == [2.0**exponent]


def test_chunks_do_not_shrink_with_the_vocabulary():
    for vocab, element_bytes, rows in [(49152, 2, 4096), (128256, 2, 4096), (262208, 2, 2048), (262208, 4, 2048)]:
        weight = torch.empty(vocab, 1, dtype={2: torch.bfloat16, 4: torch.float32}[element_bytes], device="meta")
        assert cross_entropy.chunk_rows(weight) == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5000), (7, 33)], ids=str)
@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_gradients_are_scaled_in_place(factor, shape, dtype, monkeypatch, rng_seed):
    monkeypatch.setattr(kernels, "device_of", lambda tensor: (90, 3))
    monkeypatch.setattr(kernels, "PROGRAMS", 1)  # 3 for 4 times as many elements as each scales at a time
    values = torch.randn(shape, device=DEVICE).to(dtype)
    by = torch.tensor(factor, device=DEVICE)
    want = (values.float() * by).to(dtype)
    assert kernels.scale(values, by) is values
    assert torch.equal(values, want)
