"""Matrix products with the output head, in the dtype that this CPU multiplies fastest."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

# Without bfloat16 instructions torch multiplies bfloat16 several times slower than float32, so the head is widened
# this many tokens at a time.
WIDEN_TOKENS = 8192


@cache
def has_fast_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float32 or has_fast_bfloat16() else torch.float32


def vocabulary_slices(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The head's rows in the dtype to compute in: all at once, or widened slice by slice."""
    dtype = compute_dtype(weight.dtype)
    step = weight.shape[0] if weight.dtype == dtype else WIDEN_TOKENS
    for begin in range(0, weight.shape[0], step):
        tokens = slice(begin, min(begin + step, weight.shape[0]))
        yield tokens, weight[tokens].to(dtype)


def write_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden @ weight.T + bias, where hidden and out have the dtype to compute in."""
    for tokens, part in vocabulary_slices(weight):
        if bias is None:
            torch.mm(hidden, part.T, out=out[:, tokens])
        else:
            torch.addmm(bias[tokens].to(out.dtype), hidden, part.T, out=out[:, tokens])


def even_chunks(count: int, most: int) -> Iterator[slice]:
    """[0, count) in the fewest pieces of at most `most`, as equal as they can be; one empty piece if count is 0."""
    pieces = max(1, -(-count // most))
    for piece in range(pieces):
        yield slice(count * piece // pieces, count * (piece + 1) // pieces)
