"""Copies of rows' keys and values, against the same in torch."""

import decoder_kernels as by_torch
import pytest
import torch

pytest.importorskip("triton")
from pmc_fast.kernels import copy_rows as file
from pmc_fast.kernels.copy_rows import copy_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("copies", "length"), [(0, 5), (3, 1), (1, 2), (5, 6), (6, 9)])
@pytest.mark.parametrize("programs", [1, 90])  # each with all copies of several heads, or with some of one
def test_against_torch(programs, copies, length, dtype, monkeypatch, rng_seed):
    monkeypatch.setattr(file, "PROGRAMS", programs)
    monkeypatch.setattr(file, "ELEMENTS", 32)  # less than a head's
    layers, rows, heads, positions, dim = 3, 13, 5, 9, 7
    own = torch.randn(layers, 2, rows, heads, positions, dim).to(dtype)
    chosen = torch.randperm(rows)
    source, destination = torch.randint(rows, (2, rows))
    source[:copies], destination[:copies] = chosen[torch.randint(rows - copies, (copies,))], chosen[rows - copies :]
    plan = source, destination, torch.tensor([copies]), torch.tensor([length])
    got, want = own.clone(), own.clone()
    copy_rows(got, *plan)
    by_torch.copy_rows(want, *plan)
    assert torch.equal(got, want)
    assert torch.equal(got, own) == (copies == 0 or length == 1)
