"""Products with packed weights: right for every remainder, stride and instruction set, and nothing else written."""

import pytest
import torch
from tiny import make_model
from torch.nn import functional as F

from pmc_fast import fast_linear as the_module
from pmc_fast import linear_sample
from pmc_fast.fast_linear import fast_linear, operand, packed
from pmc_fast.models import LanguageModel
from pmc_fast.native import gemm
from pmc_fast.native.packed_linear import PackedWeight, in_place, pack, packed_bytes, packed_linear

SHAPES = [
    (1, 1, 1),
    (5, 3, 16),
    (6, 7, 15),
    (7, 33, 19),
    (13, 2500, 40),
    (25, 64, 97),
    (160, 48, 33),
    (0, 4, 4),
    (4, 4, 0),
]
LAID = pytest.mark.parametrize("laid", [pack, in_place])


@LAID
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(isa, shape, bias, laid, rng_seed):
    rows, inputs, outputs = shape
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    b = torch.randn(outputs) if bias else None
    got = packed_linear(x, laid(weight), b)
    want = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * max(1, inputs) ** 0.5)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_is_not_its_own(default, rng_seed):
    x, weight, before = torch.randn(5, 3), torch.randn(16, 3), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = packed_linear(x, pack(weight))
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(got, F.linear(x, weight), rtol=1e-5, atol=1e-5)


@LAID
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accumulating(isa, shape, laid, rng_seed):
    rows, inputs, outputs = shape
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    held = torch.randn(rows, outputs)
    want = held.double() + F.linear(x.double(), weight.double(), bias.double())
    assert packed_linear(x, laid(weight), bias, held, accumulate=True) is held
    torch.testing.assert_close(held.double(), want, rtol=1e-5, atol=1e-5 * max(1, inputs) ** 0.5)


@LAID
def test_views_are_read_and_written_in_place(isa, laid, rng_seed):
    x, weight = torch.randn(9, 2 * 21)[:, 21:], torch.randn(17, 3 * 21)[:, :21]
    held = torch.full((9, 40), torch.nan)
    out = packed_linear(x, laid(weight), out=held[:, 5:22])
    torch.testing.assert_close(out, F.linear(x, weight), rtol=1e-5, atol=1e-5)
    assert held[:, :5].isnan().all() and held[:, 22:].isnan().all()


def test_rows_that_begin_with_a_panel_are_multiplied_where_they_lie(isa, rng_seed):
    x, weight = torch.randn(7, 19), torch.randn(101, 19)
    whole = pack(weight)
    for begin, end in ((0, 101), (0, 5), (32, 61), (64, 101)):
        part = whole.rows(begin, end)
        assert part.memory.untyped_storage().data_ptr() == whole.memory.untyped_storage().data_ptr()
        torch.testing.assert_close(packed_linear(x, part), F.linear(x, weight[begin:end]), rtol=1e-5, atol=1e-5)
    assert whole.rows(3, 40) is None


def test_a_transposed_weight_and_a_batch_of_any_rank(isa, rng_seed):
    weight = torch.randn(12, 10).T
    for x in (torch.randn(2, 3, 12), torch.randn(3, 2, 12).transpose(0, 1)):
        got = packed_linear(x, pack(weight))
        torch.testing.assert_close(got, F.linear(x, weight), rtol=1e-5, atol=1e-5)
    x, bias = torch.randn(12, 7).T, torch.randn(10, 2)[:, 1]
    torch.testing.assert_close(packed_linear(x, pack(weight), bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_a_bfloat16_weight_is_widened_to_the_bit(isa, rng_seed):
    for rows, inputs in ((4, 30), (24, 513), (40, 30), (41, 1100)):  # few rows are multiplied as it is, more widened
        x, weight = torch.randn(rows, inputs), torch.randn(20, inputs).bfloat16()
        assert torch.equal(packed_linear(x, pack(weight)), packed_linear(x, pack(weight.float())))
        assert packed_bytes(weight) == pack(weight).memory.nbytes >= 20 * inputs * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3, 16), (13, 2500, 40), (25, 300, 97), (41, 517, 33)], ids=str)
def test_a_weight_that_lies_as_it_is_gives_the_same_to_the_bit(isa, shape, dtype, rng_seed):
    rows, inputs, outputs = shape
    memory = torch.full((outputs, inputs + 5), torch.nan, dtype=dtype)
    x, weight = torch.randn(rows, inputs), memory[:, 2 : inputs + 2].copy_(torch.randn(outputs, inputs))
    own = in_place(weight)
    assert own.memory.data_ptr() == weight.data_ptr()
    assert torch.equal(packed_linear(x, own), packed_linear(x, pack(weight)))
    assert torch.equal(packed_linear(x, in_place(weight[3:])), packed_linear(x, own)[:, 3:])
    assert in_place(weight.T) is None and in_place(weight[:1].expand(9, -1)) is None


@pytest.mark.parametrize("rounded", [False, True])
@LAID
def test_a_row_depends_on_nothing_but_itself(isa, laid, rounded, rng_seed):
    """Whatever company a row is in: retiring rows must not change what the others draw."""
    x, weight = torch.randn(41, 50), torch.randn(37, 50)
    weight = laid(weight.bfloat16(), rounded=True) if rounded else laid(weight)
    whole = packed_linear(x, weight)
    for rows in (1, 5, 6, 7, 12, 13, 30):
        assert torch.equal(packed_linear(x[:rows], weight), whole[:rows])


@LAID
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (41, 517, 33), (9, 4099, 5), (30, 600, 70)], ids=str)
def test_rounded_inputs(isa, shape, accumulate, laid, rng_seed):
    """By pairs, of which the last may be half: as exact as other products are with inputs that are rounded before."""
    rows, inputs, outputs = shape
    memory = torch.full((rows, inputs + 1), torch.nan)
    x, weight = memory[:, 1:].copy_(torch.randn(rows, inputs)), torch.full((outputs, inputs + 3), torch.nan).bfloat16()
    weight, bias = weight[:, 1 : inputs + 1].copy_(torch.randn(outputs, inputs)), torch.randn(outputs)
    held = torch.full((rows, outputs + 9), torch.nan)
    out = held[:, 2 : outputs + 2]
    before = out.copy_(torch.randn(rows, outputs)).double() if accumulate else 0
    assert packed_linear(x, laid(weight, rounded=True), bias, out, accumulate=accumulate) is out
    want = before + F.linear(x.bfloat16().double(), weight.double(), bias.double())
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5 * max(1, inputs) ** 0.5)
    assert held[:, :2].isnan().all() and held[:, outputs + 2 :].isnan().all()
    whole, copied = laid(weight, rounded=True), pack(weight, rounded=True)
    assert packed_bytes(weight, rounded=True) == copied.memory.nbytes
    assert torch.equal(packed_linear(x, whole), packed_linear(x, copied))
    if laid is pack and outputs > 32 and (part := whole.rows(32, outputs)):
        assert torch.equal(packed_linear(x, part), packed_linear(x, whole)[:, 32:])


def test_rounding_to_nearest_with_ties_to_even_and_what_is_no_number(isa, rng_seed):
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, torch.inf, -torch.inf, torch.nan])
    ties = torch.cat([ties, torch.tensor([0x7F800001, -1, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])
    for position in (0, 1, 2):  # of a pair, and alone
        x, weight = torch.zeros(len(ties), 3), torch.zeros(1, 3).bfloat16()
        x[:, position], weight[:, position] = ties, 1
        got = packed_linear(x, pack(weight, rounded=True))[:, 0]
        torch.testing.assert_close(got, ties.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def test_head_and_layers_are_packed_within_the_block_only(rng_seed, monkeypatch):
    lm = LanguageModel(make_model(seed=rng_seed))
    weight = lm.head.weight
    layer = lm.backbone.layers[0].mlp.down_proj
    with fast_linear(lm.backbone, weight):
        assert isinstance(packed(layer.weight), PackedWeight)
        assert isinstance(packed(weight), PackedWeight)
        assert packed(weight[1:]) is None and packed(weight.clone()) is None
        assert operand(weight).memory.data_ptr() == packed(weight).memory.data_ptr()
        assert operand(weight, 3, 9).memory.data_ptr() == weight[3:].data_ptr()
        hidden, sequence = torch.randn(5, weight.shape[1]), torch.arange(5)
        inside = lm.head.sample(hidden, sequence=sequence, position=sequence, seed=3, impl="native")
    assert packed(weight) is None and packed(layer.weight) is None and operand(weight) is None
    outside = lm.head.sample(hidden, sequence=sequence, position=sequence, seed=3, impl="native")
    assert torch.equal(inside.token, outside.token)
    torch.testing.assert_close(inside.logprob, outside.logprob, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_logits_of_a_bfloat16_head_are_not_rounded_there(fast, rounds, isa, rng_seed, monkeypatch):
    """But where torch multiplies, whose product of bfloat16 is bfloat16."""
    monkeypatch.setattr(the_module, "has_fast_bfloat16", lambda: fast)
    monkeypatch.setattr(gemm, "has_fast_bfloat16", lambda: fast)
    monkeypatch.setattr(the_module, "rounds_inputs", lambda: rounds)
    hidden, weight, row = torch.randn(5, 33).bfloat16(), torch.randn(97, 33).bfloat16(), torch.arange(5)
    with fast_linear(torch.nn.Identity(), weight):
        drawn = linear_sample(hidden, weight, sequence=row, position=row, seed=rng_seed, impl="native")
    want = F.linear(hidden.double(), weight.double()).log_softmax(-1).gather(1, drawn.token[:, None])[:, 0]
    error = (drawn.logprob - want).abs().max()
    assert error < (0.2 if fast and not rounds else 1e-4)
