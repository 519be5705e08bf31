"""What only the Triton implementation of `decode_attention` has: padded heads and dimensions, blocks, splits, a prefix in place."""

import math

import pytest
import torch
from attention_near import assert_near

pytest.importorskip("triton")
from benchmarks.bench_decode_attention_by_tiles import TILES, DecodeAttentionByTilesBench
from benchmarks.shapes import AttentionHeads
from pmc_fast.gpu.checks import no_bad_row
from pmc_fast.kernels import decode_attention as kernels

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(group=3, kv_heads=2, dim=24, positions=9, prefix_positions=5, rows=4, dtype=torch.float32):
    """Rows that begin and end everywhere, and views into larger caches; NaN is all that nobody may look at."""
    prefixes, ends = 3, torch.randint(1, positions + 1, (rows,))
    ends[0], ends[1] = 1, positions
    first = (torch.rand(rows) * (prefix_positions + ends)).long()
    first[0], first[1], first[2] = prefix_positions, 0, prefix_positions + ends[2] - 1
    cache = torch.full((2, rows + 1, positions + 3, kv_heads, dim + 8), math.nan).to(dtype)
    own = cache[:, 1:, 2:-1, :, :dim].transpose(2, 3)
    t = torch.arange(positions)
    seen = (t < ends[:, None]) & (t + prefix_positions >= first[:, None])
    own.copy_(torch.randn(own.shape).masked_fill(~seen[:, None, :, None], math.nan))
    case = {"query": torch.randn(rows, kv_heads * group, dim + 8).to(dtype)[..., :dim]}
    case |= {"key": own[0], "value": own[1], "first": first, "length": ends}
    if prefix_positions:
        row = torch.arange(rows) % prefixes
        shared = torch.full((2, prefixes, kv_heads, prefix_positions + 2, dim), math.nan).to(dtype)[..., :-2, :]
        shared.copy_(torch.randn(shared.shape))
        row[first > 0] = prefixes - 1  # of which only what its rows look at is a number
        least = int(first[first > 0].min()) if bool((first > 0).any()) else 0
        shared[:, -1, :, :least] = math.nan
        case |= {"prefix_key": shared[0], "prefix_value": shared[1], "prefix_row": row}
    return case


def attend(case, scale=0.4, softcap=None, **options):
    return kernels.decode_attention(**case, scale=scale, softcap=softcap, **options)


def oracle(case, scale=0.4, softcap=None):
    """A row and a head at a time, over nothing but the positions that the row sees."""
    query, out = case["query"].double(), []
    group = query.shape[1] // case["key"].shape[1]
    for row, (begin, end) in enumerate(zip(case["first"].tolist(), case["length"].tolist(), strict=True)):
        key, value = (case[name][row, :, :end].double() for name in ("key", "value"))
        if "prefix_row" in case:
            prefix = case["prefix_row"][row]
            key = torch.cat([case["prefix_key"][prefix].double(), key], 1)
            value = torch.cat([case["prefix_value"][prefix].double(), value], 1)
        for head in range(query.shape[1]):
            score = scale * (key[head // group, begin:] @ query[row, head])
            score = score if softcap is None else softcap * torch.tanh(score / softcap)
            out.append(score.softmax(0) @ value[head // group, begin:])
    return torch.stack(out).view_as(query)


def assert_right(case, **options):
    assert_near(attend(case, **options), oracle(case, **options), case["query"].dtype)


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows of several blocks, the last of them not full."""
    whole = kernels.tiles_for
    monkeypatch.setattr(kernels, "tiles_for", lambda *shape: whole(*shape)._replace(POSITIONS=16))


@pytest.fixture
def asked(monkeypatch):
    """The options of each launch of `attend_kernel`."""
    options, run = [], kernels.attend_kernel.run
    monkeypatch.setattr(kernels.attend_kernel, "run", lambda *args, **its: options.append(its) or run(*args, **its))
    return options


@pytest.fixture
def splits(monkeypatch):
    """As on a GPU that few rows do not fill; some splits have nothing to do."""
    monkeypatch.setattr(kernels, "LEAST_POSITIONS", 1)
    monkeypatch.setattr(kernels, "MOST_SPLITS", 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefix_positions", [0, 5])
@pytest.mark.parametrize("group, dim", [(1, 16), (3, 24), (4, 5), (7, 40), (17, 16)])
def test_heads_and_dimensions_that_need_padding(group, dim, prefix_positions, dtype, rng_seed):
    assert_right(make(group, 2, dim, prefix_positions=prefix_positions, dtype=dtype))


def test_fewer_positions_at_a_time_of_keys_that_no_vector_fits(asked):
    """On a GPU: of 64, a compiler reads weights elsewhere; nor is it told then that vectors fit."""
    whole_keys, wide = torch.zeros(2, 4, 2, 70, 128).bfloat16(), torch.zeros(2, 4, 2, 70, 144).bfloat16()
    query, first = torch.randn(4, 6, 128).bfloat16(), torch.zeros(4, dtype=torch.int64)
    for keys, positions in (
        (whole_keys, 64),
        (whole_keys[..., 1:, :], 64),
        (whole_keys[..., :120], 32),
        (wide[..., :128], 64),
        (wide[..., 8:136], 64),
        (wide[..., 1:129], 32),  # by its address alone
        (torch.zeros(2, 4, 2, 70, 136).bfloat16()[..., :128], 32),  # by its positions' alone
        (torch.zeros(2, 4, 2, 70 * 128 + 8).bfloat16()[..., :-8].unflatten(-1, (70, 128)), 32),  # its heads'
    ):
        kernels.decode_attention(query[..., : keys.shape[4]], *keys, first, scale=1.0, softcap=None)
        assert positions == asked[-1]["POSITIONS"] and asked[-1]["ALIGNED"] == (positions == 64)
    prefix = {"prefix_key": wide[0, :2, ..., 1:129], "prefix_value": whole_keys[1, :2], "prefix_row": first}
    kernels.decode_attention(query, *whole_keys, first, scale=1.0, softcap=None, **prefix)
    assert asked[-1]["POSITIONS"] == 32 and not asked[-1]["ALIGNED"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefix_positions", [0, 30])
@pytest.mark.parametrize("dim, apart", [(40, 0), (88, 0), (128, 3)])
def test_keys_that_no_vector_fits(dim, apart, prefix_positions, dtype, rng_seed):
    """More of a row than 16 are multiplied by one instruction."""
    case = make(dim=dim, positions=70, prefix_positions=prefix_positions, dtype=dtype)
    for name in ("key", "value"):
        its = torch.full((*case[name].shape[:3], dim + apart), math.nan).to(dtype)[..., apart:]
        case[name] = its.copy_(case[name])
    assert_right(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefix_positions", [0, 16, 21])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_several_blocks(softcap, prefix_positions, dtype, small_blocks, rng_seed):
    assert_right(make(positions=39, prefix_positions=prefix_positions, dtype=dtype), softcap=softcap, scale=-1.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefix_positions", [0, 21])
def test_splits(prefix_positions, dtype, small_blocks, splits, rng_seed):
    case = make(positions=39, prefix_positions=prefix_positions, dtype=dtype)
    assert kernels.splits_for(8, 39 + prefix_positions, 132) == 3
    assert_right(case, softcap=2.0)


def test_split_and_whole_are_equal(small_blocks, monkeypatch, rng_seed):
    case = make(positions=39)
    whole = attend(case)
    for count in (2, 3, 8):
        monkeypatch.setattr(kernels, "splits_for", lambda *shape, count=count: count)
        torch.testing.assert_close(attend(case), whole, rtol=1e-5, atol=1e-6)


def test_a_row_does_not_depend_on_what_it_does_not_see(rng_seed):
    """The same bits, wherever in the cache its positions begin and whoever is in the batch."""
    case = make(rows=3, prefix_positions=0, positions=7)
    case |= {"first": torch.tensor([0, 2, 4]), "length": torch.tensor([3, 5, 7])}
    cache = torch.randn(2, 3, 2, 7, 24)
    for row, begin in enumerate((0, 2, 4)):
        cache[:, row, :, begin : begin + 3] = cache[:, 0, :, :3]
    case |= {"key": cache[0], "value": cache[1], "query": case["query"][:1].expand(3, -1, -1)}
    a, b, c = attend(case)
    assert torch.equal(a, b) and torch.equal(a, c)
    alone = {name: x[1:2] for name, x in case.items()}
    assert torch.equal(attend(alone)[0], b)


def test_no_length_is_the_whole_cache(rng_seed):
    case = make(rows=3)
    case["length"][:] = 9
    case["first"][:] = torch.tensor([5, 9, 13])
    case["key"], case["value"] = torch.randn(2, 3, 2, 9, 24)
    want = attend(case)
    assert torch.equal(attend(case | {"length": None}), want)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("wrong", ["nan", "inf", "only -inf"])
def test_the_lowest_row_without_scores(wrong, count, small_blocks, monkeypatch, rng_seed):
    monkeypatch.setattr(kernels, "splits_for", lambda *shape: count)
    case = make(positions=39, group=2)
    bad = no_bad_row(4, case["key"].device)
    attend(case, bad=bad)
    assert int(bad) == 4
    case["query"] = case["query"].abs()
    for row in (2, 3):
        if wrong == "only -inf":
            case["first"][row] = 5  # where its own positions begin
            case["key"][row, 1] = -math.inf
        else:
            case["key"][row, 1, case["length"][row] - 1] = float(wrong)
    attend(case, bad=bad)
    assert int(bad) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("count", [1, 3])
def test_a_graph_is_replayed_while_the_cache_grows(count, monkeypatch, rng_seed):
    monkeypatch.setattr(kernels, "splits_for", lambda *shape: count)
    case = make(rows=3)
    for name in ("key", "value", "prefix_key", "prefix_value"):
        case[name].normal_()
    case["first"].fill_(2)
    attend(case)  # compiles, which a capture does not allow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(case)
    for length in (1, 5, 9):
        case["length"].fill_(length)
        graph.replay()
        assert_near(out, oracle(case), torch.float32)


def test_no_rows(rng_seed):
    case = make(rows=3)
    none = {name: x if name in ("prefix_key", "prefix_value") else x[:0] for name, x in case.items()}
    assert attend(none).shape == (0, 6, 24)


@pytest.mark.parametrize(
    "rows, kv_heads, positions, splits",
    [(160, 8, 192, 1), (160, 8, 8192, 1), (1, 8, 192, 1), (1, 8, 4096, 16), (1, 8, 1 << 17, 32), (20, 3, 2048, 8)],
)
def test_splits_are_for_few_rows_and_many_positions(rows, kv_heads, positions, splits):
    assert kernels.splits_for(rows * kv_heads, positions, 132) == splits


def test_the_benchmark_finds_all_tiles_right_and_takes_them(asked, rng_seed):
    bench = DecodeAttentionByTilesBench(3, AttentionHeads(6, 2, 40), 43, torch.bfloat16, prefix=33)
    inputs = bench.make_inputs(rng_seed, torch.get_default_device())
    exact = bench.oracle(inputs)
    runs = {name: run for name, run in bench.contestants().items() if "positions" in name}
    for run in runs.values():
        assert bench.judge(run, run(inputs), inputs, exact, None).right
    names = ("POSITIONS", "num_warps", "num_stages")
    assert tuple(tuple(options[name] for name in names) for options in asked) == TILES and len(runs) == len(TILES)
