"""`linear_sample` on a CPU: a chunk of logits at a time, sampled while it is warm."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.native.gemm import compute_dtype, even_chunks, write_logits
from pmc_fast.native.sample import sample
from pmc_fast.phases import phase

# Logits held at once.
CHUNK_ROWS = 256


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    sequence: Tensor,
    position: Tensor,
    **sampling,
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(weight.dtype)
    drawn = []
    for rows in even_chunks(len(hidden), CHUNK_ROWS):
        with phase("head"):
            logits = torch.empty(rows.stop - rows.start, weight.shape[0], dtype=dtype)
            write_logits(hidden[rows].to(dtype), weight, bias, logits)
        with phase("sample"):
            draws = sample(
                logits,
                softcap=softcap,
                logit_scale=logit_scale,
                sequence=sequence[rows],
                position=position[rows],
                op="linear_sample",
                first_row=rows.start,
                **sampling,
            )
        drawn.append(draws)
    return drawn[0] if len(drawn) == 1 else tuple(torch.cat(column) for column in zip(*drawn, strict=True))
