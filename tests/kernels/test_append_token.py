"""What a decoding step writes down, against the same in torch."""

import decoder_kernels as by_torch
import pytest
import torch

pytest.importorskip("triton")
from pmc_fast.kernels.append_token import append_token


@pytest.mark.parametrize("ends", [[2, 4], [3], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("answers", [1, 129, 300])
def test_against_torch(answers, ends, rng_seed):
    width = 7
    limit = torch.randint(1, width + 1, (answers,))
    given = {
        "token": torch.randint(0, 5, (answers,)),
        "logprob": -torch.rand(answers),
        "ends": torch.tensor(ends),
        "limit": limit,
    }
    state = {
        "running": torch.rand(answers) < 0.7,
        "length": (torch.rand(answers) * limit).long(),
        "finished": torch.zeros(answers, dtype=torch.bool),
        "tokens": torch.full((answers, width), -1),
        "logprobs": torch.zeros(answers, width),
        "position": torch.randint(0, 1000, (answers,)),
        "step": torch.randint(0, 1000, (answers,)),
    }
    want = {name: tensor.clone() for name, tensor in state.items()}
    append_token(*given.values(), **state)
    by_torch.append_token(*given.values(), **want)
    for name in state:
        assert torch.equal(state[name], want[name]), name
