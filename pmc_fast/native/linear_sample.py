"""`linear_sample` on a CPU: a chunk of logits at a time, sampled while it is warm."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.fast_linear import operand, scratch
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
    hidden_row: Tensor | None = None,
    **sampling,
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(weight.dtype) if operand(weight) is None else torch.float32
    results, chunks = None, even_chunks(len(hidden), CHUNK_ROWS)
    for rows in chunks:
        draws, row = rows, None
        if hidden_row is not None:
            draws = ((hidden_row >= rows.start) & (hidden_row < rows.stop)).nonzero()[:, 0]
            row = hidden_row[draws] - rows.start
        with phase("head"):
            logits = scratch(rows.stop - rows.start, weight.shape[0], dtype)
            write_logits(hidden[rows].to(dtype), weight, bias, logits)
        with phase("sample"):
            drawn = sample(
                logits,
                softcap=softcap,
                logit_scale=logit_scale,
                row=row,
                sequence=sequence[draws],
                position=position[draws],
                op="linear_sample",
                first_row=rows.start,
                **sampling,
            )
        if len(chunks) == 1:
            return drawn
        results = results or tuple(torch.empty(len(sequence), dtype=column.dtype) for column in drawn)
        for result, column in zip(results, drawn, strict=True):
            result[draws] = column
    return results
