"""What a decoding step writes down, in one launch of csrc/cuda/append_token.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.cuda import library, queue


def append_token(
    token: Tensor,
    logprob: Tensor,
    slot: Tensor,
    ends: Tensor,
    limit: Tensor,
    *,
    tokens: Tensor,
    logprobs: Tensor,
    length: Tensor,
    logprob_sum: Tensor,
    finished: Tensor,
    position: Tensor,
) -> Tensor:
    """Append a token to each running answer, in place, and say whose last one it was.

    Equivalent to::

        tokens[slot, length[slot]], logprobs[slot, length[slot]] = token, logprob
        logprob_sum[slot] += logprob
        length[slot] += 1
        position += 1
        ended = torch.isin(token, ends)
        finished[slot] |= ended
        return ended | (length[slot] == limit[slot])

    Args:
        token: int64 [R], what the running rows drew.
        logprob: float32 [R], nats.
        slot: int64 [R], which answer each row writes; no two write the same one.
        ends: int64 [E], the tokens that end an answer.
        limit: int64 [N], tokens of an answer at most, at most T.
        tokens, logprobs: int64 and float32 [N, T].
        length: int64 [N], tokens of an answer so far, below its limit where it is running.
        logprob_sum: float64 [N], nats.
        finished: bool [N], whether an answer was ended by one of `ends`.
        position: int64 [R], that of a row's next token.

    Returns:
        bool [R].

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype or shape, not contiguous or on another device.
        BackendUnavailable: no GPU that can run it.
    """
    where = queue(token)
    done = torch.empty(token.shape, dtype=torch.bool, device=token.device)
    rows, answers, width = len(token), *tokens.shape
    by_row, by_answer = (rows,), (answers,)
    expected = {
        "token": (token, torch.int64, by_row),
        "logprob": (logprob, torch.float32, by_row),
        "slot": (slot, torch.int64, by_row),
        "ends": (ends, torch.int64, (len(ends),)),
        "limit": (limit, torch.int64, by_answer),
        "tokens": (tokens, torch.int64, (answers, width)),
        "logprobs": (logprobs, torch.float32, (answers, width)),
        "length": (length, torch.int64, by_answer),
        "logprob_sum": (logprob_sum, torch.float64, by_answer),
        "finished": (finished, torch.bool, by_answer),
        "position": (position, torch.int64, by_row),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {dtype}")
        if tensor.shape != shape or not tensor.is_contiguous() or tensor.device != token.device:
            raise ValueError(
                f"{name}: got shape {list(tensor.shape)}, strides {list(tensor.stride())} on {tensor.device}, expected "
                f"{list(shape)}, contiguous, on {token.device}"
            )
    library().append_token(
        *where,
        token.data_ptr(),
        logprob.data_ptr(),
        slot.data_ptr(),
        rows,
        ends.data_ptr(),
        len(ends),
        limit.data_ptr(),
        tokens.data_ptr(),
        logprobs.data_ptr(),
        width,
        length.data_ptr(),
        logprob_sum.data_ptr(),
        finished.data_ptr(),
        position.data_ptr(),
        done.data_ptr(),
    )
    return done
