"""One product in place of several: weights where the model has them, or copies that follow them."""

import pytest
import torch

from pmc_fast.joint_linear import JointLinears
from pmc_fast.layer_parts import LinearParts

ROOM = 1 << 20


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


def test_what_is_not_alike_stays_apart(rng_seed):
    one, other = parts_of(4, 2)
    wide = parts_of(3, dtype=torch.float64)[0]
    biased = parts_of(3, bias=True)[0]
    for parts in ([one], [one, wide], [one, biased], [biased, one]):
        assert joint_linear(parts, ROOM) is None
    assert joint_linear([one, other], ROOM) is not None
