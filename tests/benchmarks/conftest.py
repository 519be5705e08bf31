"""What tests of several benchmarks set up."""

from argparse import Namespace

import pytest
import torch

from benchmarks import limits, step


@pytest.fixture(autouse=True)
def limits_by_one_small_product(monkeypatch):
    """Not by the best of five large ones: nobody reads these."""
    monkeypatch.setattr(limits, "_REPEATS", 1)
    monkeypatch.setitem(limits._SIZES, "cpu", 256)


@pytest.fixture
def task(rng_seed):
    """A small micro-batch of PMC, of a model made on the spot."""
    options = {"model": None, "forget": None, "retain": None, "dtype": "float32", "seed": rng_seed}
    return step.load(Namespace(batch_size=3, num_samples=4, max_length=40, **options), torch.device("cpu"))
