"""`sample` by csrc/cuda/sample.cu."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pmc_fast.cuda import dtype_code, library, queue
from pmc_fast.gpu.checks import no_bad_row, report
from pmc_fast.gpu.gemm import row_major


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
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    op: str = "sample",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The last four arguments are for `linear_sample`: what is still to be done to the logits, and what an error calls it."""
    rows, vocab = logits.shape
    if vocab > (most := library().MOST_VOCAB):
        raise ValueError(f"logits: got {vocab} tokens, expected at most {most}, as far as the CUDA kernel counts")
    where = queue(logits)
    logits = row_major(logits)
    sequence, position = sequence.contiguous(), position.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    columns = [torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3)]
    bad = no_bad_row(rows, logits.device)
    library().sample(
        *where,
        logits.data_ptr(),
        dtype_code(logits.dtype),
        rows,
        vocab,
        logits.stride(0),
        0 if bias is None else bias.data_ptr(),
        logit_scale,
        softcap or 0.0,
        temperature,
        top_k or 0,
        top_p,
        math.log(min_p) if min_p > 0 else -math.inf,
        seed,
        sequence.data_ptr(),
        position.data_ptr(),
        token.data_ptr(),
        *(column.data_ptr() for column in columns),
        bad.data_ptr(),
    )
    report(op, bad, rows)
    return token, *columns
