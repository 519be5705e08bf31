"""What tests of several kernels set up."""

import pytest


@pytest.fixture(params=[{"softcap": None, "logit_scale": 1.0}, {"softcap": 2.5, "logit_scale": -1.7}], ids=str)
def head(request):
    """What is done to products with the head, in the tests of the losses."""
    return request.param
