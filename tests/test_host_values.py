"""What would give the host a value that lies on a device is noticed; the CPU stands for the device, or meta does."""

import pytest
import torch
from torch import nn

from pmc_fast.host_values import HostValue, RefusingHostValues
from pmc_fast.ops import sample

VALUES = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.25, -4.0]])


@torch.library.custom_op("pmc_fast_tests::looks_inside", mutates_args=())
def looks_inside(x: torch.Tensor) -> torch.Tensor:
    return x * x[0, 0].item()


LOOKING = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: 1 if x.sum() > 0 else 2,
    "int": lambda x: int(x[0, 0]),
    "range": lambda x: torch.arange(x[1, 0].long()),
    "slice": lambda x: x[: x[0, 2].long()],
    "in": lambda x: 2.0 in x,
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "mask": lambda x: x[x > 0],
    "mask of bytes": lambda x: torch.ops.aten.index(x, [(x > 0).byte()]),
    "write to a mask": lambda x: x.clone().__setitem__(x > 0, x.new_zeros(())),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat": lambda x: x.repeat_interleave(torch.tensor([1, 2]), dim=0),
    "bincount": lambda x: x[0].abs().long().bincount(),
    "grouped product": lambda x: torch._grouped_mm(
        x.new_ones(2, 16).bfloat16(), x.new_ones(1, 16, 16).bfloat16(), offs=torch.tensor([2], dtype=torch.int32)
    ),
    "another library's operator": looks_inside,
    "this library's operator": lambda x: sample(x, seed=0),
}

BLIND = {
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, 1.0),
    "index": lambda x: x[torch.tensor([1, 0]), torch.tensor([0, 2])],
    "write": lambda x: x.clone().index_put((torch.tensor([1]), torch.tensor([2])), x[0, 0]),
    "scatter": lambda x: x.scatter(1, torch.tensor([[2], [0]]), 1.0),
    "topk": lambda x: x.topk(2),
    "a number of the host's": lambda x: x * torch.tensor(0.5),
    "a layer": lambda x: nn.functional.layer_norm(x @ x.T, (2,)).softmax(-1),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True),
    "the greatest": lambda x: torch.max(x) + 1,
}


@pytest.mark.parametrize("operation", LOOKING.values(), ids=LOOKING)
def test_what_looks_at_values_is_refused(operation):
    with RefusingHostValues("cpu"), pytest.raises(HostValue):
        operation(VALUES)


@pytest.mark.parametrize("operation", BLIND.values(), ids=BLIND)
def test_what_does_not_is_not(operation):
    with RefusingHostValues("cpu"):
        operation(VALUES)


def test_values_of_the_hosts_own_are_no_matter():
    with RefusingHostValues("meta"):
        assert VALUES.sum().item() == VALUES.sum()
        assert len(VALUES[VALUES > 0])


@pytest.mark.parametrize(
    "operation",
    [
        lambda there: VALUES.to("meta"),
        lambda there: torch.tensor(1.0).to("meta"),
        lambda there: torch.ops.aten.lift_fresh(there),  # as numbers come to a GPU
        lambda there: there.copy_(VALUES),
        lambda there: there.copy_(torch.tensor(1.0)),
        lambda there: there[torch.tensor([0, 1])],
        lambda there: there.index_put_((torch.empty(1, dtype=torch.int64, device="meta"),), torch.tensor(1.0)),
        lambda there: torch.where(there > 0, there, torch.tensor(1.0)),
    ],
    ids=["to", "a scalar to", "numbers", "copy", "a scalar's copy", "index", "a scalar written", "a scalar chosen"],
)
def test_copies_to_the_device_are_refused(operation):
    there = torch.empty(VALUES.shape, device="meta")
    with RefusingHostValues("meta"), pytest.raises(HostValue):
        operation(there)


def test_numbers_of_the_hosts_are_not_copied():
    there = torch.empty(VALUES.shape, device="meta")
    with RefusingHostValues("meta"):
        assert torch.where(there > 0, there * torch.tensor(0.5) + 2.0, 1.0).device.type == "meta"
