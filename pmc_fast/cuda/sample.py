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
    seed: int | Tensor,
    sequence: Tensor,
    position: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_row: Tensor | None = None,
    op: str = "sample",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What follows position is for `linear_sample`: bias, softcap and logit_scale, what is still to be done to the logits;
    logits_row, int64 [N], the row of logits that each draw is from, by default its own; op, what an error calls it; and a seed may
    be an int64 [1], which the kernel reads, so that a CUDA graph of it draws by the seed of the time."""
    rows, vocab, device = len(sequence), logits.shape[1], logits.device
    if vocab > (most := library().MOST_VOCAB):
        raise ValueError(f"logits: got {vocab} tokens, expected at most {most}, as far as the CUDA kernel counts")
    where = queue(logits)
    logits = row_major(logits)
    sequence, position = sequence.contiguous(), position.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    logits_row = None if logits_row is None else logits_row.contiguous()
    token = torch.empty(rows, dtype=torch.int64, device=device)
    columns = [torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3)]
    bad = no_bad_row(rows, device)
    library().sample(
        *where,
        logits.data_ptr(),
        dtype_code(logits.dtype),
        0 if logits_row is None else logits_row.data_ptr(),
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
        *((0, seed.data_ptr()) if isinstance(seed, Tensor) else (seed, 0)),
        *(t.data_ptr() for t in (sequence, position, token, *columns, bad)),
    )
    report(op, bad, rows)
    return token, *columns
