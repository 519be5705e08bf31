"""`append_token`, on a GPU or an emulated one, against the same in torch."""

import pytest
import torch

from pmc_fast.cuda.append_token import append_token


def by_torch(token, logprob, slot, ends, limit, *, tokens, logprobs, length, logprob_sum, finished, position):
    tokens[slot, length[slot]], logprobs[slot, length[slot]] = token, logprob
    logprob_sum[slot] += logprob.double()
    length[slot] += 1
    position += 1
    ended = torch.isin(token, ends)
    finished[slot] |= ended
    return ended | (length[slot] == limit[slot])


def make(rows, answers=300, width=7):
    limit = torch.randint(1, width + 1, (answers,))
    inputs = {
        "token": torch.randint(0, 5, (rows,)),
        "logprob": -torch.rand(rows),
        "slot": torch.randperm(answers)[:rows],
        "ends": torch.tensor([2, 4]),
        "limit": limit,
    }
    state = {
        "tokens": torch.full((answers, width), -1),
        "logprobs": torch.zeros(answers, width),
        "length": (torch.rand(answers) * limit).long(),
        "logprob_sum": -torch.rand(answers, dtype=torch.float64),
        "finished": torch.zeros(answers, dtype=torch.bool),
        "position": torch.randint(0, 1000, (rows,)),
    }
    return inputs, state


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("rows", [0, 1, 129, 300])
def test_against_torch(rows, impl, rng_seed):
    inputs, state = make(rows)
    want = {name: tensor.clone() for name, tensor in state.items()}
    assert torch.equal(append_token(*inputs.values(), **state), by_torch(*inputs.values(), **want))
    for name in state:
        assert torch.equal(state[name], want[name]), name


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("token", lambda t: t.int(), TypeError, "token: got dtype torch.int32, expected torch.int64"),
        ("limit", lambda t: t[1:], ValueError, r"limit: got shape \[299\], .*expected \[300\]"),
        ("tokens", lambda t: t.T.contiguous().T, ValueError, r"tokens: got shape \[300, 7\], strides \[1, 300\]"),
        ("finished", lambda t: t.long(), TypeError, "finished: got dtype"),
        ("position", lambda t: torch.cat([t, t])[::2], ValueError, "position: .*contiguous"),
    ],
)
def test_bad_input(name, change, error, message, impl):
    inputs, state = make(5)
    for tensors in (inputs, state):
        if name in tensors:
            tensors[name] = change(tensors[name])
    with pytest.raises(error, match=message):
        append_token(*inputs.values(), **state)
