"""What a decoding step writes down, in one launch: the tokens drawn, how long the answers are now, which of them ended."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.kernels.variant import Variant

ROWS = 128  # per program


@triton.jit
def append_token_kernel(
    token,  # [rows]
    logprob,
    slot,
    running,
    ends,  # [end_count]
    limit,  # this and what follows: [answers], by slot
    length,
    finished,
    tokens,  # [answers, width]
    logprobs,
    position,  # [rows]
    step,
    rows,
    width,
    end_count,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    drawn = tl.load(token + row, mask=inside, other=0)
    answer = tl.load(slot + row, mask=inside, other=0)
    runs = inside & (tl.load(running + row, mask=inside, other=0) != 0)
    held = tl.load(length + answer, mask=runs, other=0)
    tl.store(tokens + answer * width + held, drawn, mask=runs)
    tl.store(logprobs + answer * width + held, tl.load(logprob + row, mask=runs, other=0), mask=runs)
    tl.store(length + answer, held + 1, mask=runs)
    ended = row < 0
    for i in range(end_count):
        ended |= drawn == tl.load(ends + i)
    tl.store(finished + answer, ended, mask=runs & ended)
    tl.store(running + row, runs & ~ended & (held + 1 < tl.load(limit + answer, mask=runs, other=0)), mask=inside)
    tl.store(position + row, tl.load(position + row, mask=inside, other=0) + 1, mask=inside)
    tl.store(step + row, tl.load(step + row, mask=inside, other=0) + 1, mask=inside)


def append_token(
    token: Tensor,
    logprob: Tensor,
    slot: Tensor,
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
    """Write what running rows drew to their answers, and count on; answers that end or are as long as they may be stop.

    Equivalent, for rows that run and their slots s, to ``tokens[s, length[s]] = token``, logprobs likewise, ``length[s] += 1``,
    ``finished[s] |= isin(token, ends)``, ``running &= ~isin(token, ends) & (length[s] < limit[s])``; and, for all rows, to
    ``position += 1; step += 1``.

    Args:
        token: int64 [N], what each row drew.
        logprob: float32 [N], nats.
        slot: int64 [N], the answer that a row belongs to; of rows that run, no two the same.
        ends: int64 [E], the tokens that end an answer.
        limit: int64 [A], the most tokens of an answer, at most W.
        running: bool [N].
        length: int64 [A], tokens that an answer holds.
        finished: bool [A].
        tokens, logprobs: int64 and float32, contiguous [A, W].
        position, step: int64 [N].
    """
    rows = len(token)
    append_token_kernel[(triton.cdiv(rows, ROWS),)](
        token,
        logprob,
        slot,
        running,
        ends,
        limit,
        length,
        finished,
        tokens,
        logprobs,
        position,
        step,
        rows,
        tokens.shape[1],
        len(ends),
        ROWS=ROWS,
        num_warps=4,
    )


def variants(capability: int) -> list[Variant]:
    """The one that there is."""
    long = ("token", "slot", "ends", "limit", "length", "tokens", "position", "step")
    signature = dict.fromkeys(long, "*i64") | {"logprob": "*fp32", "logprobs": "*fp32"}
    signature |= {"running": "*i1", "finished": "*i1"} | dict.fromkeys(("rows", "width", "end_count"), "i32")
    return [Variant("append", append_token_kernel, signature, {"ROWS": ROWS}, num_warps=4, num_stages=3)]
