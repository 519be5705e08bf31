"""Rows for texts: what `running_rows` gives, by torch alone on sizes that are fixed, and by one program."""

import math

import pytest
import torch

pytest.importorskip("triton")
from pmc_fast.gpu.regroup import regroup
from pmc_fast.host_values import RefusingHostValues
from pmc_fast.kernels import regroup as file
from pmc_fast.kernels.regroup import regroup as by_one_program
from pmc_fast.running_rows import placed

CASES = {
    "few rows and tokens": {"rows": 0.3, "tokens": 3, "running": 0.7},
    "each a row": {"rows": 1.0, "tokens": 50, "running": 0.9},
    "all equal": {"rows": 0.0, "tokens": 1, "running": 1.0},
    "all of a row and different": {"rows": 0.0, "tokens": None, "running": 1.0},
    "all different": {"rows": 1.0, "tokens": None, "running": 1.0},
    "few run": {"rows": 0.8, "tokens": 2, "running": 0.05},
    "none runs": {"rows": 0.8, "tokens": 2, "running": 0.0},
}


def given(answers, case):
    """Arguments of a call that may come after others: any rows, in any order, and plans and counts of before."""
    chosen = torch.randperm(answers)[: max(1, math.ceil(answers * case["rows"]))]
    tokens = case["tokens"]
    state = {
        "row": chosen[torch.randint(len(chosen), (answers,))],
        "row_token": torch.randint(9, (answers,)),
        "inherited": torch.randint(10**12, (3, answers)),
        "source": torch.full((answers,), -7),
        "destination": torch.full((answers,), -7),
        "counts": torch.full((3,), -7),
    }
    token = torch.randperm(answers) if tokens is None else torch.randint(tokens, (answers,))
    return token, torch.rand(answers) < case["running"], state


@pytest.mark.parametrize("answers", [1, 2, 37, 160, 2011])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_are_those_of_running_rows(case, answers, rng_seed):
    token, running, before = given(answers, case)
    after = {name: tensor.clone() for name, tensor in before.items()}
    regroup(token, running, **after)

    pairs, text = (before["row"] << 32 | token)[running].unique(return_inverse=True)
    parent, drawn = pairs >> 32, pairs & (1 << 32) - 1
    texts, runs, copies = after["counts"].tolist()
    assert (texts, runs, copies) == (len(pairs), int(running.sum()), len(placed(parent)[1]))

    # The texts lie in the first rows, each with its token and what the row had that it comes from.
    place = torch.full((texts,), -1)
    place[text] = after["row"][running]
    assert torch.equal(place.sort().values, torch.arange(texts))
    assert torch.equal(place[text], after["row"][running]) and not after["row"][~running].any()
    assert torch.equal(after["row_token"][place], drawn)
    assert torch.equal(after["inherited"][:, place], before["inherited"][:, parent])
    for name in ("row_token", "inherited"):
        assert torch.equal(after[name][..., texts:], before[name][..., texts:])

    # Carried out, the plan leaves in each place what its parent held; it copies nothing that it copies onto.
    source, destination = after["source"][:copies], after["destination"][:copies]
    assert not torch.isin(source, destination).any() and len(destination.unique()) == copies
    held = torch.arange(answers)
    held[destination] = held[source]
    assert torch.equal(held[place], parent)


def test_the_host_neither_looks_nor_copies():
    token, running, state = given(9, CASES["few rows and tokens"])
    state = {name: tensor.to("meta") for name, tensor in (state | {"token": token, "running": running}).items()}
    with RefusingHostValues("meta"):
        regroup(**state)


@pytest.mark.parametrize("answers", [1, 31, 160, 257])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_program_does_the_same(case, answers, rng_seed):
    token, running, want = given(answers, case)
    got = {name: tensor.clone() for name, tensor in want.items()}
    by_one_program(token, running, **got)
    regroup(token, running, **want)
    copies = int(want["counts"][2])
    for name, tensor in want.items():
        upto = copies if name in ("source", "destination") else None
        assert torch.equal(got[name][..., :upto], tensor[..., :upto]), name


def test_more_answers_than_one_program_takes(monkeypatch, rng_seed):
    monkeypatch.setattr(file, "MOST_ANSWERS", 40)
    monkeypatch.setattr(file, "regroup_kernel", None)
    token, running, want = given(41, CASES["few rows and tokens"])
    got = {name: tensor.clone() for name, tensor in want.items()}
    file.regroup(token, running, **got)
    regroup(token, running, **want)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
