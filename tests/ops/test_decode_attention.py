"""`decode_attention` against float64."""

import math
from importlib import import_module

import pytest
import torch

from pmc_fast import BackendUnavailable, decode_attention
from pmc_fast.native import library

IMPLS = ["reference", "native", "triton"]
ON_CPUS = IMPLS[:2]


def make(rows=5, heads=6, kv_heads=2, length=13, dim=40, dtype=torch.float32, capacity=None):
    """Keys and values are views into a larger cache, whose other positions are poisoned."""
    query = torch.randn(rows, heads, dim).to(dtype)
    cache = torch.full((2, rows, kv_heads, capacity or length + 3, dim), math.nan)
    cache[:, :, :, :length] = torch.randn(2, rows, kv_heads, length, dim)
    key, value = cache.to(dtype)[:, :, :, :length]
    return query, key, value, torch.randint(0, length, (rows,))


def oracle(query, key, value, first, scale=None, softcap=None, end=None):
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.double(), *(x.double().repeat_interleave(groups, 1) for x in (key, value))
    scores = torch.einsum("nhd,nhtd->nht", q, k) * (scale or query.shape[2] ** -0.5)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    position = torch.arange(key.shape[2])
    seen = (position >= first[:, None]) & (position < (key.shape[2] if end is None else end[:, None]))
    return torch.einsum("nht,nhtd->nhd", scores.masked_fill(~seen[:, None], -math.inf).softmax(-1), v)


def assert_near(got, want, dtype):
    assert got.dtype == dtype and got.is_contiguous()
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3  # the result is rounded once to 8 bits
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("isa", library().instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"softcap": 1.5}, {"scale": 0.5, "softcap": 3.0}], ids=str)
# odd sizes: heads that share keys four at a time and a rest, dimensions with and without whole vectors, one position; scales that leave
# scores so small that their own rounding is not what is seen
@pytest.mark.parametrize(
    "heads, kv_heads, length, dim", [(6, 2, 13, 40), (7, 1, 70, 64), (5, 5, 1, 3), (8, 4, 33, 129)]
)
@pytest.mark.parametrize("impl", ON_CPUS)
def test_values(impl, heads, kv_heads, length, dim, options, dtype, isa, rng_seed):
    before = library().instruction_set()
    library().use_instruction_set(isa)
    try:
        inputs = make(3, heads, kv_heads, length, dim, dtype)
        assert_near(decode_attention(*inputs, impl=impl, **options), oracle(*inputs, **options), dtype)
    finally:
        library().use_instruction_set(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix_length", [1, 7, 30])
@pytest.mark.parametrize("isa", library().instruction_sets())
@pytest.mark.parametrize("impl", ON_CPUS)
def test_a_prefix_stands_before_each_rows_own_positions(impl, isa, prefix_length, dtype, rng_seed):
    query, key, value, _ = make(6, dtype=dtype)
    prefix = torch.full((2, 3, 2, prefix_length + 2, 40), math.nan)
    prefix[:, :, :, :prefix_length] = torch.randn(2, 3, 2, prefix_length, 40)
    prefix_key, prefix_value = prefix.to(dtype)[:, :, :, :prefix_length]
    row = torch.tensor([2, 0, 1, 1, 2, 0])
    first = torch.tensor([0, prefix_length - 1, prefix_length, prefix_length + 12, prefix_length // 2, 0])
    whole = [torch.cat([p[row], own], 2) for p, own in ((prefix_key, key), (prefix_value, value))]
    before = library().instruction_set()
    library().use_instruction_set(isa)
    try:
        shared = {"prefix_key": prefix_key, "prefix_value": prefix_value, "prefix_row": row}
        got = decode_attention(query, key, value, first, impl=impl, softcap=4.0, **shared)
    finally:
        library().use_instruction_set(before)
    assert_near(got, oracle(query, *whole, first, softcap=4.0), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix_length", [0, 7])
@pytest.mark.parametrize("impl", IMPLS)
def test_each_row_holds_positions_of_its_own_number(impl, prefix_length, dtype, rng_seed):
    query, key, value, _ = make(6, dtype=dtype)
    length = torch.tensor([1, 13, 5, 12, 2, 7])
    first = torch.tensor([0, 0, prefix_length, prefix_length + 11, prefix_length // 2, prefix_length + 6])
    row = torch.tensor([2, 0, 1, 1, 2, 0])
    prefix_key, prefix_value = torch.randn(2, 3, 2, prefix_length, 40).to(dtype)
    position = torch.arange(13)
    unseen = (position >= length[:, None]) | (position + prefix_length < first[:, None])
    poisoned = [x.masked_fill(unseen[:, None, :, None], math.nan) for x in (key, value)]
    shared = {"prefix_key": prefix_key, "prefix_value": prefix_value, "prefix_row": row} if prefix_length else {}
    got = decode_attention(query, *poisoned, first, length=length, impl=impl, **shared)
    whole = [torch.cat([p[row], own], 2) for p, own in ((prefix_key, key), (prefix_value, value))]
    assert_near(got, oracle(query, *whole, first, end=prefix_length + length), dtype)
    assert_near(
        decode_attention(query, key, value, first, length=torch.full((6,), 13), impl=impl, **shared),
        decode_attention(query, key, value, first, impl=impl, **shared).double(),
        dtype,
    )


@pytest.mark.refuses_values
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"length": torch.tensor([3, 0, 3, 3, 3])},
            ValueError,
            r"length: got 0 at row 1, expected integers in \[1, 13\]",
        ),
        (
            {"length": torch.tensor([3, 3, 14, 3, 3])},
            ValueError,
            r"length: got 14 at row 2, expected integers in \[1, 13",
        ),
        ({"length": torch.ones(4, dtype=torch.int64)}, ValueError, r"length: got shape \[4\], expected \[5\]"),
        ({"length": torch.ones(5, dtype=torch.int32)}, TypeError, "length: got dtype torch.int32"),
        (
            {"length": torch.full((5,), 4), "first": torch.tensor([3, 0, 0, 4, 0])},
            ValueError,
            r"first: got 4 at row 3, expected integers in \[0, length\)",
        ),
        (
            {"length": torch.full((5,), 4), "first": torch.tensor([3, -1, 0, 0, 0])},
            ValueError,
            "first: got -1 at row 1",
        ),
        (
            {
                "length": torch.full((5,), 4),
                "first": torch.tensor([9, 0, 0, 10, 0]),
                "prefix_key": torch.zeros(2, 2, 6, 40),
                "prefix_value": torch.zeros(2, 2, 6, 40),
                "prefix_row": torch.zeros(5, dtype=torch.int64),
            },
            ValueError,
            r"first: got 10 at row 3, expected integers in \[0, S \+ length\)",
        ),
    ],
)
def test_bad_length(impl, change, error, message, rng_seed):
    query, key, value, _ = make()
    with pytest.raises(error, match=message):
        decode_attention(query, key, value, **{"first": torch.zeros(5, dtype=torch.int64), **change}, impl=impl)


@pytest.mark.refuses_values
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prefix_row": None}, ValueError, "prefix_key, prefix_value, prefix_row: got some of them, expected all or"),
        ({"prefix_key": None, "prefix_value": None}, ValueError, "prefix_key, prefix_value, prefix_row: got some of"),
        ({"prefix_row": torch.full((5,), 2)}, ValueError, r"prefix_row: got 2 at row 0, expected integers in \[0, 2\)"),
        ({"prefix_row": torch.zeros(4, dtype=torch.int64)}, ValueError, r"prefix_row: got shape \[4\]"),
        (
            {"prefix_key": torch.zeros(2, 2, 6, 39)},
            ValueError,
            r"prefix_key: got shape \[2, 2, 6, 39\], expected \[P, K",
        ),
        ({"prefix_value": torch.zeros(2, 2, 5, 40)}, ValueError, r"prefix_value: got shape \[2, 2, 5, 40\], expected"),
        ({"prefix_value": torch.zeros(2, 2, 6, 40).double()}, TypeError, "prefix_value: got dtype torch.float64"),
        ({"first": torch.full((5,), 19)}, ValueError, r"first: got 19 at row 0, expected integers in \[0, 19\)"),
        (
            {"prefix_key": torch.zeros(2, 1, 6, 40), "prefix_value": torch.zeros(2, 1, 6, 40)},
            ValueError,
            "prefix_key: got 1 heads, expected 2",
        ),
    ],
)
def test_bad_prefix(impl, change, error, message, rng_seed):
    query, key, value, first = make()
    prefix = {"prefix_key": torch.zeros(2, 2, 6, 40), "prefix_value": torch.zeros(2, 2, 6, 40)}
    options = {"first": first, **prefix, "prefix_row": torch.zeros(5, dtype=torch.int64), **change}
    with pytest.raises(error, match=message):
        decode_attention(query, key, value, **options, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_positions_before_the_first_are_not_looked_at(impl, rng_seed):
    query, key, value, first = make(capacity=13)
    left_out = torch.arange(13)[None, None, :, None] < first[:, None, None, None]
    poisoned = [x.masked_fill(left_out, math.nan) for x in (key, value)]
    assert_near(decode_attention(query, *poisoned, first, impl=impl), oracle(query, key, value, first), torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides(impl, rng_seed):
    query, key, value, first = make()
    spread = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value)]
    apart = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (key, value)]
    strided = torch.stack([query, query], -1)[..., 0]
    want = oracle(query, key, value, first)
    for inputs in ((strided, key, value), (query, *spread), (query, *apart)):
        assert_near(decode_attention(*inputs, first, impl=impl), want, torch.float32)
    prefix, row, length = torch.randn(2, 2, 2, 3, 40), torch.tensor([1, 0, 1, 0, 0]), torch.tensor([1, 13, 2, 9, 5])
    first = length + torch.tensor([2, -13, 0, -1, 1])
    whole = [torch.cat([p[row], own], 2) for p, own in zip(prefix, (key, value), strict=True)]
    first_, row_, length_ = torch.stack([first, row, length], 1).unbind(1)
    prefix_key, prefix_value = prefix.transpose(3, 4).contiguous().transpose(3, 4)
    shared = {"prefix_key": prefix_key, "prefix_value": prefix_value, "prefix_row": row_, "length": length_}
    want = oracle(query, *whole, first, end=3 + length)
    assert_near(decode_attention(query, key, value, first_, impl=impl, **shared), want, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_scale_of_zero_makes_a_mean(impl, rng_seed):
    query, key, value, first = make(length=7)
    got = decode_attention(query, key, value, torch.zeros_like(first), scale=0.0, impl=impl)
    assert_near(got, value.double().mean(2).repeat_interleave(3, 1), torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory that is never touched costs nothing on a CPU alone")
@pytest.mark.parametrize("impl", IMPLS)
def test_strides_beyond_32_bits(impl, tmp_path, rng_seed):
    far = 2**30 + 64  # times the 3 heads between a group's first and last
    query, key, value, first = make(2, 4, 1, 5, 16)
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=4 * far, dtype=torch.float32)
    want = oracle(query, key, value, first)
    for stride in ((16, far, 1), (3 * far, 16, 1)):
        apart = memory.as_strided(query.shape, stride).copy_(query)
        assert_near(decode_attention(apart, key, value, first, impl=impl), want, torch.float32)
    keys = memory.as_strided(key.shape, (3 * far, 80, 16, 1), 512).copy_(key)
    assert_near(decode_attention(query, keys, value, first, impl=impl), want, torch.float32)


@pytest.mark.refuses_values
@pytest.mark.parametrize("impl", IMPLS)
def test_scores_that_are_no_numbers_are_named(impl, rng_seed):
    query, key, value, first = make()
    key = key.clone()
    key[3:, 1, -1, 0] = math.nan
    with pytest.raises(ValueError, match="the scores of row 3"):
        decode_attention(query, key, value, first, impl=impl)
    assert decode_attention(*(x[:0] for x in (query, key, value, first)), impl=impl).shape == (0, 6, 40)


@pytest.mark.refuses_values
@pytest.mark.parametrize("impl", IMPLS)
def test_a_score_of_minus_infinity_has_no_weight(impl, rng_seed):
    """As long as another one is finite, wherever that is."""
    query, key, value, first = make(length=150)
    query, first, (finite, *others) = query.abs() + 1, torch.zeros_like(first), torch.randperm(150)
    key[:, :, others] = -math.inf
    want = value[:, :, finite].repeat_interleave(3, 1)
    torch.testing.assert_close(decode_attention(query, key, value, first, impl=impl), want)
    key[2, :, finite] = -math.inf
    with pytest.raises(ValueError, match="the scores of row 2 hold NaN or .inf, or nothing but -inf"):
        decode_attention(query, key, value, first, impl=impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", library().instruction_sets())
# one head or more than are taken at once to a head of keys, dimensions with and without whole vectors, several blocks
@pytest.mark.parametrize("heads, kv_heads, positions, dim", [(3, 3, 64, 16), (8, 2, 131, 40), (7, 1, 300, 33)])
def test_rows_that_share_a_prefix_read_it_together(heads, kv_heads, positions, dim, isa, threads, dtype, rng_seed):
    """Rows of a prompt in any order, some of which begin elsewhere in it or after it; scale, soft cap, lengths."""
    rows = 90
    query, key, value, _ = make(rows, heads, kv_heads, 13, dim, dtype)
    prefix = torch.full((2, 4, kv_heads, positions + 2, dim), math.nan)
    prefix[:, :, :, :positions] = torch.randn(2, 4, kv_heads, positions, dim)
    prefix_key, prefix_value = prefix.to(dtype)[:, :, :, :positions]
    row = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([70, 17, 3]))[torch.randperm(rows)]
    begin = torch.tensor([0, positions - 64, 5])[row]  # as padding does
    elsewhere = torch.rand(rows) < 0.2
    elsewhere[row == 0] = torch.arange(70) >= 66  # sets of 33 would leave no room for the queries of 4 heads
    first = torch.where(elsewhere, torch.randint(0, positions + 5, (rows,)), begin)
    length = torch.randint(5, 14, (rows,))
    shared = {"prefix_key": prefix_key, "prefix_value": prefix_value, "prefix_row": row}
    whole = [torch.cat([p[row], own], 2) for p, own in ((prefix_key, key), (prefix_value, value))]
    before = library().instruction_set(), torch.get_num_threads()
    library().use_instruction_set(isa)
    torch.set_num_threads(threads)
    try:
        for options in ({}, {"scale": 2.0, "softcap": 3.0}):
            got = decode_attention(query, key, value, first, impl="native", length=length, **shared, **options)
            assert_near(got, oracle(query, *whole, first, end=positions + length, **options), dtype)
    finally:
        library().use_instruction_set(before[0])
        torch.set_num_threads(before[1])


@pytest.mark.refuses_values
@pytest.mark.parametrize("impl", IMPLS)
def test_scores_of_a_prefix_that_rows_share(impl, rng_seed):
    """Of -inf, which have no weight unless all are, and NaN or +inf, which the first row that sees them is named for."""
    query, key, value, _ = make(12, length=13, capacity=13)
    query, row, first = query.abs() + 1, torch.tensor([1, 0]).repeat(6), torch.zeros(12, dtype=torch.int64)
    prefix_key, prefix_value = torch.randn(2, 2, 2, 200, 40)
    first[1] = 150
    shared = {"prefix_value": prefix_value, "prefix_row": row}

    def check(prefix_key, key):
        whole = [torch.cat([p[row], own], 2) for p, own in ((prefix_key, key), (prefix_value, value))]
        got = decode_attention(query, key, value, first, prefix_key=prefix_key, impl=impl, **shared)
        assert_near(got, oracle(query, *whole, first), torch.float32)

    nothing, own_nothing = prefix_key.clone(), torch.full_like(key, -math.inf)
    nothing[1] = -math.inf
    some = nothing.clone()
    some[1, :, 170] = 0
    check(prefix_key, own_nothing)
    check(nothing, key)
    check(some, own_nothing)
    with pytest.raises(ValueError, match="the scores of row 0 hold NaN or .inf, or nothing but -inf"):
        check(nothing, own_nothing)
    for odd in (math.nan, math.inf):
        unseen = prefix_key.clone()
        unseen[0, 1, 100, 7] = odd  # by row 1
        with pytest.raises(ValueError, match="the scores of row 3"):
            check(unseen, key)


@pytest.mark.refuses_values
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(5, 6)}, ValueError, r"query: got shape \[5, 6\]"),
        (
            {"query": torch.zeros(5, 6, 0), **dict.fromkeys(("key", "value"), torch.zeros(5, 2, 13, 0))},
            ValueError,
            r"query: got shape \[5, 6, 0\], expected \[N, H, D\] with D at least 1",
        ),
        ({"query": torch.zeros(5, 6, 40, dtype=torch.int32)}, TypeError, "query: got dtype torch.int32"),
        ({"key": torch.zeros(5, 2, 0, 40)}, ValueError, r"key: got shape \[5, 2, 0, 40\], expected \[5, K, T, 40\]"),
        ({"key": torch.zeros(5, 4, 13, 40), "value": torch.zeros(5, 4, 13, 40)}, ValueError, "key: got 4 heads"),
        ({"key": torch.zeros(5, 0, 13, 40), "value": torch.zeros(5, 0, 13, 40)}, ValueError, "key: got 0 heads"),
        ({"value": torch.zeros(5, 2, 12, 40)}, ValueError, r"value: got shape \[5, 2, 12, 40\], expected \[5, 2, 13"),
        ({"value": torch.zeros(5, 2, 13, 40).double()}, TypeError, "value: got dtype torch.float64"),
        ({"first": torch.full((5,), 13)}, ValueError, r"first: got 13 at row 0, expected integers in \[0, 13\)"),
        ({"first": torch.zeros(4, dtype=torch.int64)}, ValueError, r"first: got shape \[4\]"),
        ({"scale": math.nan}, ValueError, "scale: got nan"),
        ({"scale": -1e300}, ValueError, r"scale: got -1e\+300, expected None or a number in .* \(float32's range\)"),
        ({"softcap": 0.0}, ValueError, "softcap: got 0.0"),
    ],
)
def test_bad_input(impl, change, error, message, rng_seed):
    names = ("query", "key", "value", "first")
    with pytest.raises(error, match=message):
        decode_attention(**{**dict(zip(names, make(), strict=True)), **change}, impl=impl)


def test_native_takes_no_float16():
    with pytest.raises(BackendUnavailable, match="not float16"):
        decode_attention(*make(dtype=torch.float16), impl="native")


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl, rng_seed):
    inputs = make()
    inputs = (inputs[0].mT.contiguous().mT, *inputs[1:])  # the result has strides of its own
    op = import_module("pmc_fast.ops.decode_attention")._decode_attention
    for prefix in ((None, None, None), (inputs[1][:2], inputs[2][:2], torch.tensor([1, 0, 1, 0, 0]))):
        for length in (None, torch.full((5,), 13)):
            arguments = (*inputs, 0.2, 5.0, *prefix, length, impl)
            torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compile(rng_seed):
    inputs = make()
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), decode_attention(*inputs))
