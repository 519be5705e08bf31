"""`linear_sample`: a product by torch into float32 logits, and `sample`'s kernel over them."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.cuda.sample import sample
from pmc_fast.gpu.gemm import even_pieces, padded_rows, write_product
from pmc_fast.phases import phase

SCRATCH_BYTES = 1 << 29  # of logits held at once


def linear_sample(
    hidden: Tensor, weight: Tensor, *, sequence: Tensor, position: Tensor, **options
) -> tuple[Tensor, ...]:
    rows, vocab = len(hidden), len(weight)
    drawn = []
    for piece in even_pieces(rows, max(1, SCRATCH_BYTES // (4 * vocab))) if rows else [slice(0, 0)]:
        with phase("head"):
            logits = padded_rows(piece.stop - piece.start, vocab, torch.float32, hidden.device)
            write_product(logits, hidden[piece], weight.T)
        with phase("sample"):
            draws = sample(logits, sequence=sequence[piece], position=position[piece], op="linear_sample", **options)
        drawn.append(draws)
    return drawn[0] if len(drawn) == 1 else tuple(torch.cat(column) for column in zip(*drawn, strict=True))
