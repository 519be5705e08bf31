"""`packed_attention` and its gradients against float64 and torch's own attention, sequence by sequence."""

import math
from importlib import import_module

import pytest
import torch
from torch.nn import functional as F

from pmc_fast import BackendUnavailable, packed_attention
from pmc_fast.native import library
from pmc_fast.native import packed_attention as native

IMPLS = ["reference", "native"]
NAMES = ["out", "query", "key", "value"]


@pytest.fixture(params=["reference", *(f"native-{name}" for name in library().instruction_sets())])
def impl(request):
    """An implementation; the native one with each instruction set."""
    name, _, isa = request.param.partition("-")
    before = library().instruction_set()
    library().use_instruction_set(isa or before)
    yield name
    library().use_instruction_set(before)


def make(lengths, heads=6, kv_heads=2, dim=40, dtype=torch.float32):
    """Query, key, value and the upstream gradient: views of one tensor each, whose other elements are NaN."""
    made = []
    for each in (heads, kv_heads, kv_heads, heads):
        whole = torch.full((sum(lengths) + 3, each + 1, dim + 5), math.nan)
        view = whole[2:-1, 1:, 3:-2]
        view.normal_()
        made.append(whole.to(dtype)[2:-1, 1:, 3:-2])
    return made


def sequences(lengths):
    """Each sequence's own tokens and all that it sees."""
    token = torch.arange(sum(lengths))
    for number, own in enumerate(token.split(list(lengths))):
        yield own, torch.cat([token[: lengths[0] if number else 0], own])


def plain(query, key, value, lengths, scale=None, softcap=None, window=None):
    """In the dtype of query, with torch's own attention where it has one."""
    groups, pieces = query.shape[1] // key.shape[1], []
    for own, seen in sequences(lengths):
        q, k, v = query[own], key[seen].repeat_interleave(groups, 1), value[seen].repeat_interleave(groups, 1)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        ahead = torch.arange(len(seen) - len(own), len(seen))[:, None] - torch.arange(len(seen))
        mask = (ahead >= 0) & (ahead < (window or len(seen)))
        if softcap is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale) if len(own) else q
        else:
            scores = (q @ k.mT) * (q.shape[2] ** -0.5 if scale is None else scale)
            scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -math.inf)
            out = scores.softmax(-1) @ v
        pieces.append(out.transpose(0, 1))
    return torch.cat(pieces)


def results(attend, inputs, lengths, **options):
    """Output and gradients."""
    query, key, value, upstream = inputs
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out = attend(*leaves, lengths, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def assert_near(got, inputs, lengths, **options):
    """No further from float64 than twice torch's own result in that dtype, two roundings, and some of products in float32.

    Such a product is a score's gradient, of which all may cancel: where a token sees itself alone, say.
    """
    dtype = inputs[0].dtype
    query, key, value, upstream = (x.double().square().mean().sqrt() for x in inputs)
    product = upstream * value * options.get("scale", inputs[0].shape[2] ** -0.5) * inputs[0].shape[2]
    products = {"query": product * key, "key": product * query}
    want = results(plain, [x.double() for x in inputs], lengths, **options)
    theirs = results(plain, inputs, lengths, **options)
    for name, ours, torchs, exact in zip(NAMES, got, theirs, want, strict=True):
        assert ours.dtype == dtype and ours.is_contiguous()
        bound = 2 * (torchs - exact).norm() + 2 * torch.finfo(dtype).eps * exact.norm()
        bound += torch.finfo(torch.float32).eps * products.get(name, 0) * exact.numel() ** 0.5
        assert (ours - exact).norm() <= bound, name


LENGTHS = {
    "one token": [0, 1],
    "only shared": [7],
    "nothing shared": [0, 13, 1, 40],
    "shared": [5, 13, 1, 40],
    "empty": [3, 0, 4, 0],
    "blocks": [37, 2, 301],  # of rows, of keys, across the end of what is shared
    # The backward pass takes heads that share keys one by one, by two of three, and together; sequences in turn.
    "long": [20, 530, 9],
    "long and short": [0, 530, *[2] * 10],
    "many": [37, *[3, 0, 5, 1] * 10],
    "many after a long beginning": [160, *[14, 1, 0] * 13],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.3, "softcap": 1.5}, {"window": 6}, {"window": 290, "softcap": 5.0}, {"window": 1}],
    ids=str,
)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_values_and_gradients(impl, lengths, options, dtype, rng_seed):
    inputs = make(lengths, dtype=dtype)
    assert_near(results(packed_attention, inputs, lengths, impl=impl, **options), inputs, lengths, **options)


# one head, one of keys for many, heads that share keys by three; dimensions with and without whole vectors
@pytest.mark.parametrize(
    "heads, kv_heads, dim",
    [(1, 1, 1), (4, 4, 5), (9, 3, 64), (5, 1, 80), (2, 2, 96), (4, 2, 128), (3, 1, 256)],
)
def test_heads(impl, heads, kv_heads, dim, rng_seed):
    inputs, lengths = make([9, 20, 35], heads, kv_heads, dim), [9, 20, 35]
    assert_near(results(packed_attention, inputs, lengths, impl=impl), inputs, lengths)


def test_more_heads_share_keys_than_a_block_has_rows(impl, rng_seed):
    inputs, lengths = make([9, 20, 35], 300, 1, 3), [9, 20, 35]
    got = results(packed_attention, inputs, lengths, impl=impl)
    want = results(plain, [x.double() for x in inputs], lengths)
    torch.testing.assert_close(got, [x.float() for x in want], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_reference_takes_other_dtypes(dtype, rng_seed):
    inputs = make([4, 9, 3], dtype=dtype)
    assert_near(results(packed_attention, inputs, [4, 9, 3]), inputs, [4, 9, 3])
    with pytest.raises(BackendUnavailable, match=f"not {str(dtype)[6:]}"):
        packed_attention(*inputs[:3], [4, 9, 3], impl="native")


def test_layouts(impl, rng_seed):
    lengths = [4, 9, 3]
    inputs = make(lengths)
    want = results(packed_attention, inputs, lengths, impl=impl)
    layouts = [
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs],  # heads outside, as models have them
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs],  # dimensions apart
        [x.contiguous() for x in inputs],
    ]
    for layout in layouts:
        for got, same in zip(results(packed_attention, layout, lengths, impl=impl), want, strict=True):
            torch.testing.assert_close(got, same)
    upstream = torch.ones(()).expand(inputs[0].shape)
    expanded = results(packed_attention, [*inputs[:3], upstream], lengths, impl=impl)
    torch.testing.assert_close(expanded, results(packed_attention, [*inputs[:3], upstream.clone()], lengths, impl=impl))


def test_gradcheck(rng_seed):
    inputs = [x.detach().clone().requires_grad_() for x in make([2, 3, 4], 2, 1, 3, torch.float64)[:3]]
    for options in ({}, {"softcap": 1.5, "window": 3}):
        assert torch.autograd.gradcheck(lambda *x, o=options: packed_attention(*x, [2, 3, 4], **o), inputs)


def test_the_shared_beginning_is_worth_a_copy_before_each_sequence(impl, rng_seed):
    shared, own = 6, [9, 1, 17]
    lengths = [shared, *own]
    inputs = make(lengths)
    got = results(packed_attention, inputs, lengths, impl=impl)
    index = torch.cat([seen for _, seen in list(sequences(lengths))[1:]])
    apart = [0, *(shared + n for n in own)]
    copies = [x[index] for x in inputs]
    is_copy = torch.cat([torch.arange(n) < shared for n in apart[1:]])
    copies[3][is_copy] = 0  # of the beginning, the first sequence's copy alone gets a gradient from above
    copies[3][:shared] = inputs[3][:shared]
    theirs = results(packed_attention, copies, apart, impl=impl)
    torch.testing.assert_close(got[0][shared:], theirs[0][~is_copy])
    torch.testing.assert_close(got[0][:shared], theirs[0][:shared])
    for mine, copied in zip(got[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine).index_add_(0, index, copied))


@pytest.mark.parametrize("lengths", [[5, 40, 1, 90, 33], [0, 530, 20], [540, *[7, 0, 2] * 15]], ids=str)
def test_threads_change_no_bit(lengths, rng_seed):
    inputs, found = make(lengths, 9, 3, 64), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(results(packed_attention, inputs, lengths, impl="native"))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("heads, kv_heads", [(9, 3), (32, 8), (71, 1), (80, 80)])
@pytest.mark.parametrize(
    "shared, own", [(600, [90] * 160), (0, [2048] * 16), (2000, []), (0, [3000]), (30, [5, 900] * 99)]
)
def test_the_backward_workspace_is_bounded(shared, own, heads, kv_heads):
    """By so many sums over keys and values of the shared beginning and one sequence, whatever the number of sequences."""

    def floats(lengths):
        query, key = (torch.zeros(()).expand(sum(lengths), count, 48) for count in (heads, kv_heads))
        sizes = torch.tensor(lengths)
        return native._call(query, key, key, sizes, query, query, 1.0, None, None).backward_workspace_floats

    lengths = [shared, *own]
    sums = floats(lengths) - floats([0] * len(lengths))
    assert 0 < sums <= max(64, kv_heads) * (shared + max(own, default=0)) * 2 * 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, "payload"])
@pytest.mark.parametrize("which", range(3), ids=NAMES[1:])
def test_what_is_no_number_reaches_who_sees_it_and_no_other_sequence(impl, which, bad, dtype, rng_seed):
    lengths = [5, 40, 50]
    inputs = make(lengths, dtype=dtype)
    if bad == "payload":  # which rounding to 16 bits could carry into the exponent
        bits, of = (0x7FFFFFFF, torch.int32) if dtype == torch.float32 else (0x7FFF, torch.int16)
        bad = torch.tensor(bits, dtype=of).view(dtype)
    inputs[0][..., 7].abs_()  # scores of infinite keys shall be so, too, instead of minus infinity
    clean = results(packed_attention, inputs, lengths, impl=impl)
    inputs[which][20, 1, 7] = bad  # of the first sequence
    got = results(packed_attention, inputs, lengths, impl=impl)
    head, seers = ([1], slice(20, 21)) if which == 0 else ([3, 4, 5], slice(20, 45))
    touched = got[0][seers][:, head]
    assert not touched.isfinite().all(-1).any()
    for name, mine, before in zip(NAMES, got, clean, strict=True):
        assert torch.equal(mine[45:], before[45:]), name
    assert got[1][20][head].isnan().any() and got[2][20].isnan().any()
    if which < 2:  # a row's weights are no numbers
        assert got[3][:21, which].isnan().all()


def test_a_score_of_minus_infinity_is_no_part(impl, rng_seed):
    """Whole blocks of keys that weigh nothing leave what comes after them as it is."""
    lengths = [0, 300]
    query, key, value, _ = make(lengths, 2, 1, 8)
    query[..., 0], key[..., 0] = 1, 0
    key[:200, :, 0] = -math.inf
    out = packed_attention(query, key, value, lengths, impl=impl)
    assert out[:200].isnan().all()
    expected = plain(query[200:].double(), key[200:].double(), value[200:].double(), [0, 100])
    torch.testing.assert_close(out[200:].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[0], [0, 0, 0]], ids=str)
def test_no_tokens(impl, lengths):
    assert [x.shape[0] for x in results(packed_attention, make(lengths), lengths, impl=impl)] == [0] * 4


def test_a_scale_of_zero_makes_a_mean(impl, rng_seed):
    query, key, value, _ = make([0, 7])
    want = value.cumsum(0).repeat_interleave(3, 1) / torch.arange(1, 8)[:, None, None]
    torch.testing.assert_close(packed_attention(query, key, value, [0, 7], scale=0.0, impl=impl), want)


def test_a_gradient_is_made_for_who_wants_one(impl, rng_seed):
    query, key, value, upstream = make([2, 5])
    key.requires_grad_()
    out = packed_attention(query, key, value, (2, 5), window=2**63 - 1, impl=impl)
    (d_key,) = torch.autograd.grad(out, key, upstream)
    torch.testing.assert_close(d_key, results(plain, [query, key, value, upstream], [2, 5])[2])
    assert not packed_attention(query, key.detach(), value, (2, 5), impl=impl).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(8, 6)}, ValueError, r"query: got shape \[8, 6\], expected \[T, H, D\]"),
        ({"query": torch.zeros(8, 0, 40)}, ValueError, r"query: got shape \[8, 0, 40\]"),
        ({"query": torch.zeros(8, 6, 40, dtype=torch.int32)}, TypeError, "query: got dtype torch.int32"),
        ({"key": torch.zeros(7, 2, 40)}, ValueError, r"key: got shape \[7, 2, 40\], expected \[8, K, 40\]"),
        ({"key": torch.zeros(8, 4, 40)}, ValueError, "key: got 4 heads, expected a divisor of the 6 heads of query"),
        ({"key": torch.zeros(8, 0, 40)}, ValueError, "key: got 0 heads"),
        ({"value": torch.zeros(8, 2, 32)}, ValueError, r"value: got shape \[8, 2, 32\], expected \[8, K, 40\]"),
        ({"value": torch.zeros(8, 1, 40)}, ValueError, "value: got 1 heads, expected 2, those of key"),
        (
            {"value": torch.zeros(8, 2, 40).double()},
            TypeError,
            "value: got dtype torch.float64, expected torch.float32",
        ),
        ({"lengths": []}, ValueError, r"lengths: got \[\], expected a list or tuple of integers of at least 0, the 8"),
        ({"lengths": [3, 4]}, ValueError, r"lengths: got \[3, 4\], expected .* the 8 tokens of query together"),
        ({"lengths": [-1, 9]}, ValueError, r"lengths: got \[-1, 9\]"),
        ({"lengths": [3.0, 5]}, TypeError, "lengths: got 3.0, expected a list"),
        ({"lengths": torch.tensor([3, 5])}, TypeError, "lengths: got a value of type Tensor, expected a list or tuple"),
        ({"scale": math.inf}, ValueError, "scale: got inf"),
        ({"softcap": -1.0}, ValueError, "softcap: got -1.0"),
        ({"window": 0}, ValueError, r"window: got 0, expected None or an integer in \[1, 2\^63\)"),
        ({"window": 2**63}, ValueError, "window: got 9223372036854775808"),
        ({"window": 2.0}, TypeError, "window: got 2.0, expected None or an integer"),
    ],
)
def test_bad_input(change, error, message, rng_seed):
    query, key, value, _ = make([3, 5])
    with pytest.raises(error, match=f"^{message}"):
        packed_attention(**{"query": query, "key": key, "value": value, "lengths": [3, 5], **change})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [(0.2, None, None), (0.2, 5.0, 3)], ids=str)
def test_opcheck(impl, options, rng_seed):
    ops = import_module("pmc_fast.ops.packed_attention")
    # Heads outside, which no result takes over.
    inputs = (x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in make([2, 3, 4]))
    query, key, value, upstream = inputs
    arguments = (query, key, value, [2, 3, 4], *options, impl)
    torch.library.opcheck(ops._packed_attention, arguments)
    out, log_mass = (x.detach() for x in ops._packed_attention(*arguments))
    saved = [x.detach() for x in (upstream, query, key, value)]
    arguments = (*saved, out, log_mass, [2, 3, 4], *options, impl)
    torch.library.opcheck(ops._packed_attention_backward, arguments)


def test_compile(rng_seed):
    def attend(*arguments, **options):
        return compiled(*arguments, **options)

    compiled = torch.compile(packed_attention, fullgraph=True, backend="aot_eager")
    for lengths in ([2, 3, 4], [0, 6], [4, 5, 1, 3]):
        inputs = make(lengths)
        for got, want in zip(
            results(attend, inputs, lengths, window=3),
            results(packed_attention, inputs, lengths, window=3),
            strict=True,
        ):
            assert torch.equal(got, want)
