"""Hopper's own `linear_sample`, which nothing chooses yet, on an emulated GPU or a real one."""

import math
from importlib import import_module

import pytest
import torch

from pmc_fast import BackendUnavailable
from pmc_fast import cuda as package
from pmc_fast.reference.linear_sample import linear_sample as reference

kernel = import_module("pmc_fast.cuda.linear_sample").linear_sample_on_hopper
PLAIN = {"bias": None, "softcap": None, "logit_scale": 1.0, "temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0}
pytestmark = pytest.mark.parametrize("impl", ["cuda"])


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper")


def exact_in_any_order(*shape):
    """Multiples of 1/4 so small that float32 sums of their products do not round."""
    return (torch.randint(-8, 9, shape) / 4).bfloat16()


def coordinates(rows):
    return {"sequence": torch.randint(0, 2**32, (rows,)), "position": torch.randint(0, 2**32, (rows,))}


def assert_same(hidden, weight, **options):
    options = PLAIN | coordinates(len(hidden)) | {"seed": torch.randint(2**62, ()).item()} | options
    got, want = kernel(hidden, weight, **options), reference(hidden, weight, **options)
    assert torch.equal(got[0], want[0])
    for mine, its in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(mine, its, rtol=2e-5, atol=2e-5)


# One shape of tiles each; the last piece of the vocabulary is cut off, as are the columns, or its cluster has but one tile.
SHAPES = [(3, 72, 131), (33, 8, 700), (65, 136, 300), (97, 64, 513), (131, 200, 1025), (161, 24, 131), (193, 64, 301)]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("rows, size, vocab", SHAPES)
def test_draws(impl, rows, size, vocab, temperature, rng_seed):
    weight = exact_in_any_order(vocab, size) / 8
    assert_same(exact_in_any_order(rows, size), weight, temperature=temperature)
