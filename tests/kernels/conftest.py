"""What tests of several kernels set up."""

import math

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody has written to holds NaN, or a token that is not there by chance."""
    empty = torch.empty

    def poison(*args, **options):
        made = empty(*args, **options)
        return made.fill_(math.nan if made.is_floating_point() else 3)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture(params=[{"softcap": None, "logit_scale": 1.0}, {"softcap": 2.5, "logit_scale": -1.7}], ids=str)
def head(request):
    """What is done to products with the head, in the tests of the losses."""
    return request.param
