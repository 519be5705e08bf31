"""`linear_sample`: a product by torch into float32 logits, and `sample`'s kernel over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmc_fast.cuda.sample import sample
from pmc_fast.gpu.gemm import even_pieces, padded_rows, write_product
from pmc_fast.phases import phase

SCRATCH_BYTES = 1 << 29  # of logits held at once


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    sequence: Tensor,
    position: Tensor,
    hidden_row: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Logits that several draws are from are multiplied once, if all of them can be held at once."""
    rows, at_once = len(sequence), max(1, SCRATCH_BYTES // (4 * len(weight)))
    if hidden_row is not None:
        # In pieces of hidden rows the host would have to know which draws belong to which.
        if len(hidden) < rows and len(hidden) <= at_once:
            where = {"sequence": sequence, "position": position, "logits_row": hidden_row}
            return _draw_from_products(hidden, weight, **where, **options)
        hidden = hidden[hidden_row]
    drawn = [
        _draw_from_products(hidden[piece], weight, sequence=sequence[piece], position=position[piece], **options)
        for piece in (even_pieces(rows, at_once) if rows else [slice(0, 0)])
    ]
    return drawn[0] if len(drawn) == 1 else tuple(torch.cat(column) for column in zip(*drawn, strict=True))


def _draw_from_products(hidden: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, ...]:
    with phase("head"):
        logits = padded_rows(len(hidden), len(weight), torch.float32, hidden.device)
        write_product(logits, hidden, weight.T)
    with phase("sample"):
        return sample(logits, op="linear_sample", **options)
