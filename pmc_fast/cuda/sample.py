"""`sample` by csrc/cuda/sample.cu."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pmc_fast.cuda import dtype_code, library, queue
from pmc_fast.gpu.checks import no_bad_row, report
from pmc_fast.gpu.gemm import row_major


class Draw:
    """What kernels draw with, and where to: `arguments`. It holds the tensors whose addresses these are.

    What follows position is for `linear_sample`: bias, softcap and logit_scale, what is still to be done to the logits;
    logits_row, int64 [N], the row of logits that each draw is from, by default its own.
    """

    def __init__(
        self,
        vocab: int,
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
        logits_row: Tensor | None = None,
    ) -> None:
        if vocab > (most := library().MOST_VOCAB):
            raise ValueError(f"logits: got {vocab} tokens, expected at most {most}, as far as the CUDA kernel counts")
        rows, device = len(sequence), sequence.device
        self.rows = rows
        self.token = torch.empty(rows, dtype=torch.int64, device=device)
        self.columns = [torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3)]
        self.bad = no_bad_row(rows, device)
        self.read = [sequence.contiguous(), position.contiguous()]
        self.bias = None if bias is None else bias.float().contiguous()
        self.logits_row = None if logits_row is None else logits_row.contiguous()
        self.arguments = library().Draw(
            0 if logits_row is None else self.logits_row.data_ptr(),
            rows,
            vocab,
            0 if bias is None else self.bias.data_ptr(),
            logit_scale,
            softcap or 0.0,
            temperature,
            top_k or 0,
            top_p,
            math.log(min_p) if min_p > 0 else -math.inf,
            seed,
            *(t.data_ptr() for t in (*self.read, self.token, *self.columns, self.bad)),
        )

    def checked(self, op: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What was drawn; raises as `op` if a row is no distribution."""
        report(op, self.bad, self.rows)
        return self.token, *self.columns


def sample(logits: Tensor, *, op: str = "sample", **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`options` are a `Draw`'s; `op` is what an error calls it."""
    draw = Draw(logits.shape[1], **options)
    where = queue(logits)
    logits = row_major(logits)
    library().sample(*where, logits.data_ptr(), dtype_code(logits.dtype), logits.stride(0), draw.arguments)
    return draw.checked(op)
