"""`sample` on a CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pmc_fast.errors import not_finite
from pmc_fast.native import address, dtype_code, library


def sample(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float,
    min_p: float,
    seed: int,
    sequence: Tensor,
    position: Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    row: Tensor | None = None,
    op: str = "sample",
    first_row: int = 0,
    first_token: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The last arguments are for `linear_sample`: the head's transform, the row of logits that each draw is from, and what an
    error calls op and row; and for its parallel form: `first_token`, a multiple of 4, is the number by which the noise of a
    row's first token is known.
    """
    lib, threads = library(), torch.get_num_threads()
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    sequence, position = sequence.contiguous(), position.contiguous()
    (rows, vocab), draws = logits.shape, len(sequence)
    begin = order = None
    if row is not None:
        order = row.argsort()
        begin = torch.searchsorted(row[order], torch.arange(rows + 1, device="cpu"))
    token = logits.new_empty(draws, dtype=torch.int64)
    logprob, sampling_logprob, kept_mass = (logits.new_empty(draws, dtype=torch.float32) for _ in range(3))
    workspace = logits.new_empty(min(threads, rows) * lib.sample_workspace_bytes(vocab), dtype=torch.uint8)
    bad = lib.sample(
        logits.data_ptr(),
        dtype_code(logits.dtype),
        rows,
        vocab,
        logits.stride(0),
        logit_scale,
        softcap or 0.0,
        temperature,
        top_k or 0,
        top_p,
        math.log(min_p) if min_p > 0 else -math.inf,
        seed,
        address(begin),
        address(order),
        sequence.data_ptr(),
        position.data_ptr(),
        token.data_ptr(),
        logprob.data_ptr(),
        sampling_logprob.data_ptr(),
        kept_mass.data_ptr(),
        workspace.data_ptr(),
        threads,
        first_token,
    )
    if bad >= 0:
        raise not_finite(op, first_row + bad)
    return token, logprob, sampling_logprob, kept_mass


def gumbel(seed: int, sequence: Tensor, position: Tensor, vocab: int) -> Tensor:
    """`pmc_fast.philox.gumbel` as the kernels compute it."""
    noise = sequence.new_empty(len(sequence), vocab, dtype=torch.float32)
    library().gumbel(
        len(sequence),
        vocab,
        seed,
        sequence.contiguous().data_ptr(),
        position.contiguous().data_ptr(),
        noise.data_ptr(),
        torch.get_num_threads(),
    )
    return noise
