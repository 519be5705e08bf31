"""What FlopCounterMode finds of the ops, against the same in plain torch."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import pmc_fast
from pmc_fast import parallel_head
from pmc_fast.flops import FORMULAS
from pmc_fast.parallel_head import VocabShards
from pmc_fast.reference import linear_logprob as reference


def count(call):
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        call()
    return counter.get_total_flops()


@pytest.fixture
def head():
    rows, size, vocab = (int(n) for n in torch.randint(3, 40, (3,)))
    hidden, weight = torch.randn(rows, size, requires_grad=True), torch.randn(vocab, size, requires_grad=True)
    return hidden, weight, torch.randint(0, vocab, (rows,))


def plain(hidden, weight, target):
    return F.cross_entropy(F.linear(hidden, weight), target, reduction="sum")


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1)])
def test_collapse_loss_takes_what_plain_torch_takes(head, frozen):
    for index in frozen:
        head[index].requires_grad_(False)
    ones = torch.ones(len(head[2]))

    def backward(loss):
        return loss.backward() if loss.requires_grad else None

    ours = count(lambda: backward(pmc_fast.collapse_loss(*head, ones).loss))
    assert ours == count(lambda: backward(plain(*head))) > 0


@pytest.mark.parametrize("frozen", [(), (0,), (1,)])
def test_linear_logprob_takes_one_product_more_but_under_a_frozen_head(head, frozen):
    for index in frozen:
        head[index].requires_grad_(False)
    product = count(lambda: F.linear(*head[:2]))
    with torch.no_grad():
        assert count(lambda: pmc_fast.linear_logprob(*head)) == product
    more = 0 if frozen == (1,) else product
    assert count(lambda: pmc_fast.linear_logprob(*head).sum().backward()) == more + count(
        lambda: plain(*head).backward()
    )


@pytest.mark.parametrize("needs", list(product([False, True], repeat=3)), ids=str)
def test_the_reference_makes_the_gradients_that_are_needed(head, needs):
    hidden, weight, target = head
    options = {"bias": torch.zeros(len(weight)), "softcap": 3.0, "logit_scale": 2.0, "ignore_index": None}
    upstream, one = torch.ones(len(target)), count(lambda: F.linear(hidden, weight))
    found = []
    backward = lambda: found.extend(  # noqa: E731
        reference.linear_logprob_backward(upstream, *head, None, temperature=1.0, needs=needs, **options)
    )
    assert count(backward) == one * (1 + sum(needs[:2]))
    assert [gradient is not None for gradient in found] == list(needs)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_head_in_parts_takes_what_plain_torch_takes(head, frozen):
    head[1].requires_grad_(not frozen)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shards = VocabShards.of(head[1])
        ours = count(lambda: parallel_head.linear_logprob(*head, shards=shards).sum().backward())
    finally:
        dist.destroy_process_group()
    assert ours == count(lambda: plain(*head).backward())


def test_linear_sample_takes_one_product(head):
    hidden, weight, _ = head
    assert count(lambda: pmc_fast.linear_sample(hidden, weight)) == count(lambda: F.linear(hidden, weight))
    rows = torch.randint(0, len(hidden), (50,))
    assert count(lambda: pmc_fast.linear_sample(hidden, weight, hidden_row=rows)) == count(lambda: F.linear(*head[:2]))


def test_packed_attention_takes_what_torchs_takes_for_each_sequence():
    def count_both(call):
        out = []
        return count(lambda: out.append(call())), count(lambda: out[0].sum().backward())

    lengths, dim = [0, 7, 5], 8
    query, key, value = (torch.randn(12, 4, dim, requires_grad=True) for _ in range(3))

    def torchs():
        parts = zip(*(x.transpose(0, 1)[None].split([7, 5], 2) for x in (query, key, value)), strict=True)
        return torch.cat([(q @ k.mT) @ v for q, k, v in parts], 2)

    forward, backward = count_both(torchs)
    ours = count_both(lambda: pmc_fast.packed_attention(query, key, value, lengths))
    assert ours == (forward, backward + forward // 2)  # the scores are computed again
    shared = count(lambda: pmc_fast.packed_attention(query, key, value, [4, 3, 5]))
    assert shared == 4 * 4 * dim * (4 * 4 + 3 * 7 + 5 * 9)


@pytest.mark.parametrize("prefix", [0, 5])
def test_decode_attention_takes_what_products_over_all_positions_take(prefix):
    rows, kv_heads, group, positions, dim = 3, 2, 3, 7, 8
    query = torch.randn(rows, kv_heads * group, dim)
    own = torch.randn(2, rows, kv_heads, positions, dim)
    shared = {}
    if prefix:
        key, value = torch.randn(2, 1, kv_heads, prefix, dim)
        shared = {"prefix_key": key, "prefix_value": value, "prefix_row": torch.zeros(rows, dtype=torch.int64)}
    first = torch.zeros(rows, dtype=torch.int64)
    every = torch.randn(2, rows, kv_heads, prefix + positions, dim)

    def products():
        scores = query.view(rows, kv_heads, group, dim) @ every[0].mT
        return scores @ every[1]

    assert count(lambda: pmc_fast.decode_attention(query, *own, first, **shared)) == count(products)


def test_experts_take_what_a_product_for_each_takes():
    rows, size, out, ends = 10, 8, 12, torch.tensor([2, 7, 10], dtype=torch.int32)
    x, weight = torch.randn(rows, size, requires_grad=True), torch.randn(3, size, out, requires_grad=True)
    each = count(lambda: (x @ weight[0]).square().sum().backward())
    assert count(lambda: F.grouped_mm(x, weight, offs=ends).square().sum().backward()) == each == 6 * rows * size * out
