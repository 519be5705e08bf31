"""What a decoder layer does between its products, against plain torch."""

import math

import decoder_kernels as by_torch
import pytest
import torch

pytest.importorskip("triton")
from pmc_fast.kernels import elementwise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_near(got, want, dtype):
    assert got.dtype == want.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("rows, size", [(1, 1), (3, 33), (2, 1024)])
def test_normalize(rows, size, centered, dtype, rng_seed):
    x = torch.full((rows, size + 3), math.nan)
    x[:, :size] = torch.randn(rows, size) + 0.5
    added, weight, bias = torch.randn(rows, size).to(dtype), torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    for options in ({}, {"added": added, "offset": 1.0}, {"bias": bias, "added": added}):
        options = {"bias": None, "epsilon": 1e-5, "centered": centered} | options
        mine, its = x.clone(), x.clone()
        got = elementwise.normalize(mine[:, :size], weight, out=torch.full_like(added, math.nan), **options)
        assert_near(got, by_torch.normalize(its[:, :size], weight, out=torch.empty_like(added), **options), dtype)
        assert torch.equal(mine[:, :size], its[:, :size]) and mine[:, size:].isnan().all()


def test_normalize_in_place(rng_seed):
    x, weight = torch.randn(5, 24).bfloat16(), torch.randn(24).bfloat16()
    want = by_torch.normalize(x.clone(), weight, None, 1e-6, centered=False, out=torch.empty_like(x))
    assert elementwise.normalize(x, weight, None, 1e-6, centered=False, out=x) is x
    assert_near(x, want, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", by_torch.ACTIVATIONS)
def test_activate(activation, dtype, rng_seed):
    x, up = (4 * torch.randn(3, 700)).to(dtype), torch.randn(3, 700).to(dtype)
    x[0, :4] = torch.tensor([-60.0, 60.0, 0.0, -1e4])
    for other in (None, up):
        mine = x.clone()
        assert elementwise.activate(mine, activation, other) is mine
        want = by_torch.activate(x.clone(), activation, other)
        assert_near(mine, want, dtype)
        both = torch.cat([x, torch.full_like(x[:, :5], math.nan), up], 1)  # rows apart
        parts = both[:, :700], None if other is None else both[:, 705:]
        assert torch.equal(elementwise.activate(parts[0], activation, parts[1]), mine)
        assert torch.equal(both[:, :700], mine) and both[:, 700:705].isnan().all() and torch.equal(both[:, 705:], up)


def test_activate_of_rows_longer_than_a_program_takes(rng_seed):
    x, up = torch.randn(2, 3, 2 * elementwise.ELEMENTS + 3)
    want = by_torch.activate(x.clone(), "silu", up)
    out = torch.full((3, 2 * elementwise.ELEMENTS + 9), math.nan)
    elementwise.activate(x, "silu", up, out=out[:, : x.shape[1]])
    assert_near(out[:, : x.shape[1]], want, torch.float32)
    assert out[:, x.shape[1] :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads, kv_heads, dim, rotated", [(3, 1, 8, 8), (9, 3, 64, 64), (2, 2, 12, 4), (5, 1, 6, 0), (4, 4, 20, 2)]
)
def test_rotate_and_append(heads, kv_heads, dim, rotated, dtype, rng_seed):
    rows, positions, capacity = 3, 50, 7
    if heads == kv_heads:  # of each head its query, key and value in turn
        query, key, value = torch.randn(rows, heads, 3, dim).to(dtype).unbind(2)
    else:
        query, key, value = (torch.randn(rows, count, dim).to(dtype) for count in (heads, kv_heads, kv_heads))
    angles = torch.rand(positions, rotated) * 6
    where = {"position": torch.randint(0, positions, (rows,)), "length": torch.tensor([1, capacity, 3])}
    cache = torch.full((2, rows + 1, kv_heads, capacity, dim), math.nan).to(dtype)
    mine, its = cache.clone(), cache.clone()
    results = [
        module.rotate_and_append(query, key, value, angles.cos(), angles.sin(), *where.values(), *held[:, :rows])
        for module, held in ((elementwise, mine), (by_torch, its))
    ]
    assert_near(*results, dtype)
    written = ~its.isnan()
    assert torch.equal(written, ~mine.isnan()) and written.sum() == 2 * key.numel()
    assert_near(mine[written], its[written], dtype)


@pytest.mark.parametrize(
    ("offset", "dim", "gap", "aligned"), [(0, 64, 0, True), (1, 64, 0, False), (0, 24, 0, False), (0, 64, 8, False)]
)
def test_vectors_are_promised_only_where_they_fit(offset, dim, gap, aligned, monkeypatch):
    """`offset` elements before the queries, `gap` between the rows of keys and values."""
    told = []

    class Launch:
        def __getitem__(self, grid):
            return lambda *args, ALIGNED, **constants: told.append(ALIGNED)

    monkeypatch.setattr(elementwise, "rotate_kernel", Launch())
    query = torch.zeros(2 * 3 * dim + 16, dtype=torch.bfloat16)[offset:][: 2 * 3 * dim].view(2, 3, dim)
    key, value = (torch.zeros(2, dim + gap, dtype=torch.bfloat16)[:, None, :dim] for _ in range(2))
    keys, values = torch.zeros(2, 2, 1, 5, dim, dtype=torch.bfloat16)
    index, angles = torch.ones(2, dtype=torch.int64), torch.zeros(9, dim)
    elementwise.rotate_and_append(query, key, value, angles, angles, index, index, keys, values)
    assert told == [aligned]
