"""One product in place of several: weights where the model has them, or copies that follow them."""

from dataclasses import replace

import pytest
import torch
from draws import assert_same, differ
from tiny import KNOWN, make_model

pytest.importorskip("triton")
from static_decoding import DEVICE, by_modules, sample, watch

from pmc_fast import static_decoder, static_layers
from pmc_fast.joint_linear import JointLinears
from pmc_fast.layer_parts import LinearParts
from pmc_fast.sampler import Sampler

ROOM = 1 << 20


@pytest.fixture
def built(monkeypatch):
    return watch(monkeypatch)


def joint_linear(parts, room):
    return JointLinears(room).of(parts)


def parts_of(*rows, bias=False, dtype=torch.float32):
    weights = [torch.randn(count, 6).to(dtype) for count in rows]
    return [LinearParts(w, torch.randn(len(w)).to(dtype) if bias else None, (), w) for w in weights]


def assert_joins(joint, parts):
    assert torch.equal(joint.weight, torch.cat([part.weight for part in parts]))
    if parts[0].bias is None:
        assert joint.bias is None
    else:
        assert torch.equal(joint.bias, torch.cat([part.bias for part in parts]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_parts_of_one_weight_are_joined_where_they_lie(transposed, bias, rng_seed):
    weight = torch.randn(6, 9).T if transposed else torch.randn(9, 6)
    parts = LinearParts(weight, torch.randn(9) if bias else None, (), weight).split(4, 2, 3)
    joint = joint_linear(parts, 0)
    assert joint.copied_bytes == 0 and joint.weight.data_ptr() == weight.data_ptr()
    assert_joins(joint, parts)
    weight.neg_()
    assert_joins(joint, parts)
    some = joint_linear(parts[1:], 0)
    assert some.weight.data_ptr() == parts[1].weight.data_ptr() and some.weight.stride() == weight.stride()
    assert_joins(some, parts[1:])


@torch.no_grad()
def test_weights_that_were_moved_leave_their_place_to_others(rng_seed):
    """As `model.to` moves them; a later model's may lie where they lay."""
    memory = torch.randn(9, 6)

    def weights():
        return [torch.nn.Parameter(memory[rows]) for rows in (slice(4, 9), slice(0, 4))]

    def joined(weights):
        return joint_linear([LinearParts(weight, None, (), weight) for weight in weights], ROOM)

    moved, theirs = weights(), weights()
    joint = joined(moved)
    assert joined(theirs) is joint
    for weight in moved:
        weight.data = torch.randn_like(weight)
    other = joined(theirs)
    assert other is not joint and joined(theirs) is other
    other.refresh()
    assert torch.equal(other.weight, memory[[4, 5, 6, 7, 8, 0, 1, 2, 3]])


@pytest.mark.parametrize("bias", [False, True])
def test_others_are_copied_and_follow(bias, rng_seed):
    parts = parts_of(4, 2, 3, bias=bias)
    joint = joint_linear(parts, ROOM)
    assert joint.copied_bytes == 4 * 9 * (6 + bias)
    address = joint.weight.data_ptr()
    for _ in range(2):
        joint.refresh()
        assert_joins(joint, parts)
        parts[1].weight.neg_()
        if bias:
            parts[2].bias.neg_()
    assert joint.weight.data_ptr() == address


def test_copies_take_the_room_that_there_is_and_are_shared(rng_seed):
    first, second = parts_of(4, 2), parts_of(3, 3)
    assert joint_linear(first, 4 * 6 * 6 - 1) is None
    joints = JointLinears(4 * 6 * 6)
    joint = joints.of(first)
    assert joints.of(second) is None  # there is no room left
    assert joints.of(first) is joint and joint_linear(first, 0) is joint  # which needs none
    assert joint_linear([replace(part, weight=part.weight.view(-1, 6)) for part in first], 0) is joint
    del joint
    assert joint_linear(first, 0) is None  # nobody uses it any more


def test_biases_may_be_copied_where_weights_are_not(rng_seed):
    weight = torch.randn(5, 6)
    parts = [
        LinearParts(weight[:3], torch.randn(3), (), weight),
        LinearParts(weight[3:], torch.randn(2), (), weight, 3),
    ]
    joint = joint_linear(parts, 20)
    joint.refresh()
    assert joint.copied_bytes == 20 and joint.weight.data_ptr() == weight.data_ptr()
    assert_joins(joint, parts)


def test_weights_in_another_order_or_with_others_between_them_are_copied(rng_seed):
    weight = torch.randn(9, 6)
    first, second, third = LinearParts(weight, None, (), weight).split(4, 2, 3)
    for parts in ([second, first], [first, third], [third, second, first]):
        assert joint_linear(parts, 0) is None
        joint = joint_linear(parts, ROOM)
        joint.refresh()
        assert_joins(joint, parts)


def test_neighbours_that_are_transposed_or_of_another_owner_are_copied(rng_seed):
    weight, memory = torch.randn(12, 6), bytearray(4 * 6 * 5)
    places = [{"offset": 0, "count": 2 * 6}, {"offset": 4 * 2 * 6, "count": 3 * 6}]
    owners = [torch.frombuffer(memory, dtype=torch.float32, **place) for place in places]
    for weights in ((weight[:6], weight[6:].T), [owner.normal_().view(-1, 6) for owner in owners]):
        parts = [LinearParts(weight, None, (), weight) for weight in weights]
        assert joint_linear(parts, 0) is None
        joint = joint_linear(parts, ROOM)
        joint.refresh()
        assert_joins(joint, parts)


def test_what_is_not_alike_stays_apart(rng_seed):
    one, other = parts_of(4, 2)
    wide = parts_of(3, dtype=torch.float64)[0]
    biased = parts_of(3, bias=True)[0]
    for parts in ([one], [one, wide], [one, biased], [biased, one]):
        assert joint_linear(parts, ROOM) is None
    assert joint_linear([one, other], ROOM) is not None


def joints_of(decoder):
    """Of each layer, whether one product makes queries, keys and values, and whether one makes the gate and what it gates."""
    layers = decoder.layers
    return [
        tuple(products.joint is not None for products in both)
        for both in zip(layers._attention, layers._mlp, strict=True)
    ]


# biases, norms of heads and of all of them, clipped states; weights that are one already, in rows, columns or heads; no gate
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "olmo2", "olmo", "phi3", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("apart", ["few tokens", "no room"])
def test_same_answers_where_each_weight_is_multiplied_by_itself(family, apart, built, monkeypatch, rng_seed):
    model = make_model(family, seed=rng_seed, **KNOWN[family]).to(DEVICE)
    together = sample(model, rng_seed)
    if apart == "few tokens":
        monkeypatch.setattr(static_decoder, "LEAST_STEPS", 8)
    else:
        monkeypatch.setattr(static_layers, "COPY_SHARE", 0.0)
    built[0].joined = joints_of(built[0])
    built[0].layers._attention = built[0].layers._mlp = []  # whose copies others would share
    assert_same(sample(model, rng_seed), together)
    has_one = family in ("phi3", "gpt_neox", "gpt2")  # weight for queries, keys and values
    norms_of_heads = family == "qwen3"
    gated = family not in ("gpt_neox", "gpt2", "opt")
    joined = (not norms_of_heads and family != "gpt_neox", gated)
    assert built[0].joined == [joined] * len(joints_of(built[1]))
    assert joints_of(built[1]) == [(has_one and joined[0], family == "phi3")] * len(joints_of(built[1]))


def test_copies_of_weights_follow_them(built, monkeypatch, rng_seed):
    model = make_model("qwen2", seed=rng_seed).to(DEVICE)
    sampler, layer = Sampler(model, keep_graphs=True), model.model.layers[0]
    before = sample(sampler, rng_seed)
    for changed in (layer.self_attn.k_proj.weight, layer.self_attn.v_proj.bias, layer.mlp.up_proj.weight):
        with torch.no_grad():
            changed.mul_(-3.0)
        got = sample(sampler, rng_seed)
        assert_same(got, by_modules(model, rng_seed, monkeypatch))
        assert differ(before, got)
        before = got
    assert built[0] is built[-1] and all(map(all, joints_of(built[0])))


def test_kept_graphs_know_whether_weights_are_copied_for_as_many_tokens_as_were_asked_for(built, monkeypatch, rng_seed):
    """Not as there is memory for: both have 32 positions of their own."""
    monkeypatch.setattr(static_decoder, "LEAST_STEPS", 5)
    sampler = Sampler(make_model("llama", seed=rng_seed).to(DEVICE), keep_graphs=True)
    for tokens in (4, 5, 7):
        sample(sampler, rng_seed, max_new_tokens=tokens)
    assert [joints_of(decoder)[0] for decoder in built] == [(False, False), (True, True), (True, True)]
    assert built[1] is built[2]


def test_copies_take_no_more_than_there_is_room_for(built, monkeypatch, rng_seed):
    """For the first layer's, in the order in which they are multiplied."""
    model = make_model("llama", seed=rng_seed).to(DEVICE)
    attention = model.model.layers[0].self_attn
    needed = sum(x.weight.nbytes for x in (attention.q_proj, attention.k_proj, attention.v_proj))
    monkeypatch.setattr(static_layers, "free_bytes", lambda device: needed / static_layers.COPY_SHARE)
    got = sample(model, rng_seed)
    assert joints_of(built[0]) == [(True, False)] + [(False, False)] * (len(model.model.layers) - 1)
    assert_same(got, by_modules(model, rng_seed, monkeypatch))
