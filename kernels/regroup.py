"""Which row each answer of a sampling call goes on in, by one program that compares each answer with every other."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.gpu import regroup as by_sorting
from pmc_fast.kernels.variant import Variant

MOST_ANSWERS = 1024  # one to a thread, since the comparisons grow with the square


@triton.jit
def regroup_kernel(
    token,  # this and what follows: [answers]
    running,
    row,
    row_token,
    inherited,  # [INHERITED, answers]
    source,
    destination,
    counts,  # [3]
    answers,
    INHERITED: tl.constexpr,
    ANSWERS: tl.constexpr,
    OTHERS: tl.constexpr,  # answers that each is compared with at a time
):
    answer = tl.arange(0, ANSWERS)
    inside = answer < answers
    runs = tl.load(running + answer, mask=inside, other=0) != 0
    its_row = tl.load(row + answer, mask=inside, other=0).to(tl.int32)
    drawn = tl.load(token + answer, mask=inside, other=0).to(tl.int32)
    first_of_row = answer
    first_of_text = answer
    for begin in range(0, answers, OTHERS):
        other = begin + tl.arange(0, OTHERS)
        there = other < answers
        goes_on = tl.load(running + other, mask=there, other=0) != 0
        other_row = tl.where(goes_on, tl.load(row + other, mask=there, other=0).to(tl.int32), -1)
        together = other_row[None, :] == its_row[:, None]
        first_of_row = tl.minimum(first_of_row, tl.min(tl.where(together, other[None, :], ANSWERS), 1))
        together &= tl.load(token + other, mask=there, other=0).to(tl.int32)[None, :] == drawn[:, None]
        first_of_text = tl.minimum(first_of_text, tl.min(tl.where(together, other[None, :], ANSWERS), 1))

    leads = runs & (first_of_text == answer)
    texts = tl.sum(leads.to(tl.int32))
    stays = runs & (first_of_row == answer) & (its_row < texts)
    moves = leads & ~stays

    # Places that nobody stays in, first as marks in the order of places, then as a list. Between, other threads read.
    tl.store(destination + answer, 0, mask=inside)
    tl.debug_barrier()
    tl.store(destination + its_row, 1, mask=stays)
    tl.debug_barrier()
    free = (answer < texts) & (tl.load(destination + answer, mask=inside, other=1) == 0)
    tl.debug_barrier()
    tl.store(destination + tl.cumsum(free.to(tl.int32), 0) - 1, answer, mask=free)
    nth = tl.cumsum(moves.to(tl.int32), 0) - 1
    tl.store(source + nth, its_row, mask=moves)
    tl.store(row + answer, 0, mask=inside)
    tl.debug_barrier()
    place = tl.where(stays, its_row, tl.load(destination + nth, mask=moves, other=0))

    tl.store(row_token + place, drawn, mask=leads)
    for i in tl.static_range(INHERITED):
        handed_on = tl.load(inherited + i * answers + its_row, mask=leads, other=0)
        tl.debug_barrier()
        tl.store(inherited + i * answers + place, handed_on, mask=leads)
    tl.store(row + answer, place, mask=leads)
    tl.debug_barrier()
    tl.store(row + answer, tl.load(row + first_of_text, mask=runs, other=0), mask=runs & ~leads)
    tl.store(counts, texts)
    tl.store(counts + 1, tl.sum(runs.to(tl.int32)))
    tl.store(counts + 2, tl.sum(moves.to(tl.int32)))


class Launch(NamedTuple):
    """Of `regroup_kernel` for so many answers."""

    ANSWERS: int
    OTHERS: int
    num_warps: int


def launch_for(answers: int) -> Launch:
    padded = max(32, triton.next_power_of_2(answers))
    return Launch(padded, 16 if padded <= 512 else 8, min(32, padded // 32))


def regroup(
    token: Tensor,
    running: Tensor,
    *,
    row: Tensor,
    row_token: Tensor,
    inherited: Tensor,
    source: Tensor,
    destination: Tensor,
    counts: Tensor,
) -> None:
    """As `pmc_fast.gpu.regroup` defines it, which serves beyond MOST_ANSWERS; all arguments contiguous."""
    state = {"row": row, "row_token": row_token, "inherited": inherited}
    state |= {"source": source, "destination": destination, "counts": counts}
    answers = len(token)
    if answers > MOST_ANSWERS:
        return by_sorting.regroup(token, running, **state)
    regroup_kernel[(1,)](
        token, running, **state, answers=answers, INHERITED=len(inherited), **launch_for(answers)._asdict()
    )


def variants(capability: int) -> list[Variant]:
    """8 prompts with 20 answers each, and the most."""
    long = ("token", "row", "row_token", "inherited", "source", "destination", "counts")
    signature = dict.fromkeys(long, "*i64") | {"running": "*i1", "answers": "i32"}
    listed = []
    for answers in (160, MOST_ANSWERS):
        *sizes, warps = launch_for(answers)
        constants = {"INHERITED": 3, **dict(zip(("ANSWERS", "OTHERS"), sizes, strict=True))}
        name = f"regroup {answers} answers"
        listed.append(Variant(name, regroup_kernel, signature, constants, num_warps=warps, num_stages=3))
    return listed
