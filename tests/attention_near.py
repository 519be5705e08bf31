"""How near an attention kernel has to be to its exact values."""

import torch


def assert_near(got, want, dtype):
    assert got.dtype == dtype and got.is_contiguous()
    # weights and the result are rounded to dtype, each by half an eps at most
    tolerance = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max()
