"""Prefixes that are read once for all their rows, whoever shares them, beside the rows' own positions; and which are."""

import math

import numpy as np
import pytest
import torch
from attention_near import assert_near

pytest.importorskip("triton")
from benchmarks.bench_decode_attention_by_prefix import DecodeAttentionByPrefixBench
from benchmarks.shapes import AttentionHeads
from pmc_fast.gpu.checks import no_bad_row
from pmc_fast.kernels import decode_attention, prefix_attention
from pmc_fast.kernels.prefix_attention import faster_at_once, sharers_if_faster, sharers_of
from pmc_fast.ops.decode_attention import decode_attention as op
from pmc_fast.reference.decode_attention import decode_attention as reference

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def some_prefix(rows, prefixes):
    """Rows in any order, of all prefixes but the first two; with two, of the second alone."""
    return torch.randint(min(2, prefixes - 1), prefixes, (rows,))


def make(prefix_row, group=3, kv_heads=2, dim=24, positions=9, prefix_positions=21, dtype=torch.float32, window=None):
    """Views into larger caches, of which all that nobody sees is NaN. The first position differs from prefix to prefix, with a
    window from row to row, and some rows see nothing of their prefix."""
    rows, prefixes = len(prefix_row), int(prefix_row.max()) + 2
    length = torch.randint(1, positions + 1, (rows,))
    first = torch.randint(0, prefix_positions, (prefixes,))
    first[prefix_row[0]] = 0
    first = first[prefix_row]
    if window is not None:
        first = torch.maximum(first, prefix_positions + length - window)
    first[1::7] = prefix_positions + length[1::7] - 1
    seen = torch.arange(prefix_positions + positions) >= first[:, None]
    case = {
        "query": torch.randn(rows, kv_heads * group, dim + 8).to(dtype)[..., :dim],
        "first": first,
        "length": length,
    }
    cache = torch.full((2, rows + 1, positions + 3, kv_heads, dim + 8), math.nan).to(dtype)
    own = cache[:, 1:, 2:-1, :, :dim].transpose(2, 3)
    looked_at = seen[:, prefix_positions:] & (torch.arange(positions) < length[:, None])
    own.copy_(torch.randn(own.shape).masked_fill(~looked_at[:, None, :, None], math.nan))
    shared = torch.full((2, prefixes, kv_heads, prefix_positions + 2, dim), math.nan).to(dtype)[..., :-2, :]
    looked_at = torch.zeros(prefixes, prefix_positions, dtype=torch.int64)
    looked_at.index_add_(0, prefix_row, seen[:, :prefix_positions].long())
    shared.copy_(torch.randn(shared.shape).masked_fill(looked_at[:, None, :, None] == 0, math.nan))
    case |= {"key": own[0], "value": own[1], "prefix_key": shared[0], "prefix_value": shared[1]}
    return case | {"prefix_row": prefix_row}


def attend(case, scale=0.4, softcap=None, **options):
    group = case["query"].shape[1] // case["key"].shape[1]
    sharers = sharers_of(case["prefix_row"], len(case["prefix_key"]), group)
    return decode_attention.decode_attention(**case, scale=scale, softcap=softcap, sharers=sharers, **options)


def assert_right(case, scale=0.4, softcap=None):
    assert_near_reference(attend(case, scale, softcap), case, scale, softcap)


def assert_near_reference(got, case, scale=0.4, softcap=None):
    wide = {name: x.double() if x.is_floating_point() else x for name, x in case.items()}
    want, dtype = reference(**wide, scale=scale, softcap=softcap), case["query"].dtype
    assert_near(got, want, dtype)


@pytest.fixture
def small_blocks(monkeypatch):
    """Prefixes of several blocks, the last of them not full."""
    whole = prefix_attention.tiles_for
    monkeypatch.setattr(prefix_attention, "tiles_for", lambda *shape: whole(*shape)._replace(POSITIONS=16))


@pytest.fixture
def splits(monkeypatch):
    """As of long prefixes; some splits have nothing to do."""
    monkeypatch.setattr(prefix_attention, "LEAST_SPLIT", 1)
    monkeypatch.setattr(prefix_attention, "MOST_SPLITS", 3)
    monkeypatch.setattr(decode_attention, "LEAST_POSITIONS", 1)
    monkeypatch.setattr(decode_attention, "MOST_SPLITS", 2)


@pytest.fixture
def rows_alike(monkeypatch):
    """The interpreter multiplies by NumPy, whose BLAS rounds a row by its place in the matrix on CPUs without AVX-512."""
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("ij,jk->ik", a, b, dtype=dtype))


# rows of a program (32) and rows compared with at a time (128) left over; tiles full to the last row, and one for each row
@pytest.mark.parametrize("rows", [1, 7, 32, 161])
@pytest.mark.parametrize("prefixes", [1, 2, 5, 200])
@pytest.mark.parametrize("group", [1, 3, 32, 64])
def test_each_row_is_among_rows_of_its_prefix(group, prefixes, rows, rng_seed):
    prefix_row = some_prefix(rows, prefixes)
    sharers = sharers_of(prefix_row, prefixes, group)
    size = 64 // group
    assert sharers.shape == (rows // size + prefixes, size) and sharers.dtype == torch.int32
    found = [[row for row in tile if row >= 0] for tile in sharers.tolist()]
    assert sorted(sum(found, [])) == list(range(rows))
    for tile, members in zip(sharers.tolist(), found, strict=True):
        assert tile[: len(members)] == members and set(tile[len(members) :]) <= {-1}
        assert len({int(prefix_row[row]) for row in members}) <= 1
    tiles = sum(bool(members) for members in found)
    assert tiles == sum(-(-int(count) // size) for count in prefix_row.bincount())  # no more than there must be


def test_no_rows(rng_seed):
    none = torch.empty(0, dtype=torch.int64)
    assert (sharers_of(none, 4, 3) == -1).all()
    case = make(torch.tensor([0, 1, 1]))
    shared = ("prefix_key", "prefix_value")
    assert attend({name: x if name in shared else x[:0] for name, x in case.items()}).shape == (0, 6, 24)


def test_sharers_of_other_rows_are_refused(rng_seed):
    case = make(torch.arange(11) % 5)  # and a prefix without rows
    for sharers in (sharers_of(case["prefix_row"], 6, 1), sharers_of(case["prefix_row"], 7, 3)):
        with pytest.raises(ValueError, match=r"sharers: got shape .*, expected \[6, 21\], from sharers_of"):
            decode_attention.decode_attention(**case, scale=1.0, softcap=None, sharers=sharers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group, kv_heads, dim", [(1, 3, 16), (3, 2, 24), (4, 1, 5), (7, 2, 40), (17, 1, 16)])
def test_heads_and_dimensions_that_need_padding(group, kv_heads, dim, dtype, rng_seed):
    assert_right(make(some_prefix(11, 5), group, kv_heads, dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefix_positions", [1, 16, 53])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_several_blocks(softcap, prefix_positions, dtype, small_blocks, rng_seed):
    case = make(some_prefix(11, 5), prefix_positions=prefix_positions, dtype=dtype)
    assert_right(case, softcap=softcap, scale=-1.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 7, 40])
def test_splits_and_windows(window, dtype, small_blocks, splits, rng_seed):
    case = make(some_prefix(11, 4), prefix_positions=53, dtype=dtype, window=window)
    assert prefix_attention.splits_for(11, 5, 21, 2, 53, 132) == 3 and decode_attention.splits_for(22, 9, 132) == 2
    assert_right(case, softcap=2.0)


@pytest.mark.parametrize("rows, prefixes", [(45, 1), (45, 2), (23, 9)])
def test_several_tiles_of_a_prefix_and_prefixes_without_rows(rows, prefixes, small_blocks, splits, rng_seed):
    assert_right(make(some_prefix(rows, prefixes), prefix_positions=37))


def test_no_length_is_the_whole_cache(rng_seed):
    case = make(some_prefix(5, 3))
    case["length"].fill_(9)
    case["first"].fill_(3)
    for name in ("key", "value", "prefix_key", "prefix_value"):
        case[name] = torch.randn(case[name].shape)
    want = attend(case)
    del case["length"]
    assert torch.equal(attend(case), want)


def test_a_row_does_not_depend_on_where_it_is_nor_on_other_prefixes(small_blocks, rows_alike, rng_seed):
    """The same bits, as long as all rows of a prefix begin alike and shapes stay, as they do in a sampling call."""
    case = make(torch.arange(40) % 3, prefix_positions=37)
    case["first"] = torch.tensor([0, 5, 36])[case["prefix_row"]]
    for name in ("key", "value", "prefix_key", "prefix_value"):
        case[name] = torch.randn(case[name].shape)
    want, order = attend(case), torch.randperm(40)
    moved = {name: x if name in ("prefix_key", "prefix_value") else x[order] for name, x in case.items()}
    assert torch.equal(attend(moved), want[order])
    other = moved["prefix_row"] == 2
    moved["prefix_row"] = torch.where(other, torch.randint(0, 2, (40,)), moved["prefix_row"])
    assert torch.equal(attend(moved)[~other], want[order][~other])


@pytest.mark.parametrize("wrong", ["nan", "inf", "only -inf"])
def test_the_lowest_row_without_scores(wrong, small_blocks, splits, rng_seed):
    case = make(torch.tensor([1, 0, 2, 1, 2, 0, 2, 1]), group=2, prefix_positions=37)
    for name in ("key", "value", "prefix_key", "prefix_value"):
        case[name] = torch.randn(case[name].shape)
    case["first"].fill_(3)
    case["query"] = case["query"].abs()
    bad = no_bad_row(8, case["key"].device)
    case["prefix_key"][0, :, 2] = case["prefix_key"][3] = math.nan  # nobody sees these
    attend(case, bad=bad)
    assert int(bad) == 8
    if wrong == "only -inf":
        case["prefix_key"][2, 1] = -math.inf
        attend(case, bad=bad)
        assert int(bad) == 8  # a row's own positions still have scores
        case["key"][case["prefix_row"] == 2, 1] = -math.inf
    else:
        case["prefix_key"][2, 1, -1] = float(wrong)
    attend(case, bad=bad)
    assert int(bad) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_graph_is_replayed_while_rows_move(splits, rng_seed):
    case = make(torch.arange(45) % 4)
    for name in ("key", "value", "prefix_key", "prefix_value"):
        case[name] = torch.randn(case[name].shape)
    case["first"].fill_(2)
    attend(case)  # compiles, which a capture does not allow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(case)
    for length in (1, 5, 9):
        case["prefix_row"].copy_(some_prefix(45, 4))
        case["length"].fill_(length)
        graph.replay()
        assert_near_reference(out, case)


def test_long_prefixes_of_many_rows_are_read_at_once():
    def chosen(rows, positions, heads=24, window=None, repeat=1, dtype=torch.bfloat16):
        prefix_key = torch.empty(8, 8, positions, 128 * repeat, dtype=dtype, device="meta")
        return faster_at_once(rows, prefix_key, heads, window)

    assert chosen(160, 256) and not chosen(160, 64) and not chosen(160, 240)  # too short
    assert chosen(160, 4096, window=256) and not chosen(160, 4096, window=240)
    assert chosen(48, 1024) and not chosen(48, 256) and not chosen(8, 1 << 20)  # too few rows
    assert not chosen(160, 4096, heads=8 * 33)  # a row to a tile
    assert not chosen(160, 4096, repeat=2, dtype=torch.float32)  # no room for a position
    assert not chosen(7, 4096)  # not one for each prefix
    prefix_key, prefix_row = torch.empty(8, 8, 256, 128, dtype=torch.bfloat16, device="meta"), torch.arange(160) // 20
    assert sharers_if_faster(prefix_row, prefix_key, 24).shape == (7 + 8, 21)
    assert sharers_if_faster(prefix_row, prefix_key[:, :, 16:], 24) is None


@pytest.mark.parametrize("impl", ["triton"])
def test_the_op_reads_at_once_what_is_chosen(impl, monkeypatch, rng_seed):
    case, asked, attend_prefix = make(some_prefix(13, 4)), [], prefix_attention.attend_prefix
    monkeypatch.setattr(prefix_attention, "attend_prefix", lambda *args: asked.append(args) or attend_prefix(*args))
    for least, times in ((math.inf, 0), (1, 1)):
        monkeypatch.setattr(prefix_attention, "LEAST_SAVED_BYTES", least)
        assert_near_reference(op(**case, scale=0.4, impl=impl), case)
        assert len(asked) == times


@pytest.mark.parametrize(
    "rows, prefixes, positions, splits",
    [
        (160, 8, 64, 1),
        (160, 8, 256, 2),
        (160, 8, 4096, 4),
        (160, 1, 4096, 4),
        (20, 1, 1 << 17, 16),
        (1280, 64, 4096, 1),
    ],
)
def test_splits_are_for_few_prefixes_and_many_positions(rows, prefixes, positions, splits):
    assert prefix_attention.splits_for(rows, prefixes, 21, 8, positions, 132) == splits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_benchmark_finds_both_ways_right(dtype, rng_seed):
    bench = DecodeAttentionByPrefixBench(43, AttentionHeads(6, 2, 40), 43, dtype, prefix=33)
    inputs = bench.make_inputs(rng_seed, torch.get_default_device())
    assert (inputs.sharers >= 0).sum(1).tolist() == [21, 1, 21, 0]
    oracle, runs = bench.oracle(inputs), bench.contestants()
    for name in ("pmc_fast, each row", "pmc_fast, at once"):
        assert bench.judge(runs[name], runs[name](inputs), inputs, oracle, None).right
