"""What a decoding step writes down, in one launch: the tokens drawn, how long the answers are now, which of them ended."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.kernels.variant import Variant

ANSWERS = 128  # per program


@triton.jit
def append_token_kernel(
    token,  # [answers]
    logprob,
    running,
    ends,  # [end_count]
    limit,  # [answers]
    length,
    finished,
    tokens,  # [answers, width]
    logprobs,
    position,  # [answers]
    step,
    answers,
    width,
    end_count,
    ANSWERS: tl.constexpr,
):
    answer = tl.program_id(0) * ANSWERS + tl.arange(0, ANSWERS)
    inside = answer < answers
    runs = inside & (tl.load(running + answer, mask=inside, other=0) != 0)
    drawn = tl.load(token + answer, mask=runs, other=0)
    held = tl.load(length + answer, mask=runs, other=0)
    at = answer.to(tl.int64) * width + held
    tl.store(tokens + at, drawn, mask=runs)
    tl.store(logprobs + at, tl.load(logprob + answer, mask=runs, other=0), mask=runs)
    tl.store(length + answer, held + 1, mask=runs)
    ended = answer < 0
    for i in range(end_count):
        ended |= drawn == tl.load(ends + i)
    tl.store(finished + answer, ended, mask=runs & ended)
    tl.store(running + answer, runs & ~ended & (held + 1 < tl.load(limit + answer, mask=runs, other=0)), mask=inside)
    tl.store(position + answer, tl.load(position + answer, mask=inside, other=0) + 1, mask=inside)
    tl.store(step + answer, tl.load(step + answer, mask=inside, other=0) + 1, mask=inside)


def append_token(
    token: Tensor,
    logprob: Tensor,
    ends: Tensor,
    limit: Tensor,
    *,
    running: Tensor,
    length: Tensor,
    finished: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    position: Tensor,
    step: Tensor,
) -> None:
    """Write what running answers drew to their ends, and count on; those that end or are as long as they may be stop.

    Equivalent, for each answer a that runs, to ``tokens[a, length[a]] = token[a]``, logprobs likewise, ``length[a] += 1``,
    ``finished[a] |= isin(token[a], ends)``, ``running[a] = ~isin(token[a], ends) & (length[a] < limit[a])``; and to
    ``position += 1; step += 1``.

    Args:
        token: int64 [A], what each answer drew.
        logprob: float32 [A], nats.
        ends: int64 [E], the tokens that end an answer.
        limit: int64 [A], the most tokens of an answer, at most W.
        running: bool [A].
        length: int64 [A], tokens that an answer holds.
        finished: bool [A].
        tokens, logprobs: int64 and float32, contiguous [A, W].
        position, step: int64 [A], of rows or answers: all of them are counted on.
    """
    answers = len(token)
    append_token_kernel[(triton.cdiv(answers, ANSWERS),)](
        token,
        logprob,
        running,
        ends,
        limit,
        length,
        finished,
        tokens,
        logprobs,
        position,
        step,
        answers,
        tokens.shape[1],
        len(ends),
        ANSWERS=ANSWERS,
        num_warps=4,
    )


def variants(capability: int) -> list[Variant]:
    """The one that there is."""
    long = ("token", "ends", "limit", "length", "tokens", "position", "step")
    signature = dict.fromkeys(long, "*i64") | {"logprob": "*fp32", "logprobs": "*fp32"}
    signature |= {"running": "*i1", "finished": "*i1"} | dict.fromkeys(("answers", "width", "end_count"), "i32")
    return [Variant("append", append_token_kernel, signature, {"ANSWERS": ANSWERS}, num_warps=4, num_stages=3)]
