"""Matrix products with the output head, by the library and in the dtype that this CPU multiplies fastest."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pmc_fast.fast_linear import has_fast_bfloat16, linear, packed
from pmc_fast.native.packed_linear import packed_linear

# Tokens of the vocabulary multiplied at a time in float32. A slice of a product then stays in cache on its way to where
# it belongs, and little of a bfloat16 head is widened at once.
SLICE_TOKENS = 8192


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float32 or has_fast_bfloat16() else torch.float32


def write_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden @ weight.T + bias, where hidden and out have the dtype to compute in."""
    if out.dtype == torch.bfloat16:
        if bias is None:
            torch.mm(hidden, weight.T, out=out)
        else:
            torch.addmm(bias, hidden, weight.T, out=out)
        return
    if (panels := packed(weight)) is not None:
        packed_linear(hidden, panels, None if bias is None else bias.float(), out)
        return
    for tokens in vocabulary_slices(weight):
        part_bias = None if bias is None else bias[tokens].to(out.dtype)
        out[:, tokens] = linear(hidden, weight[tokens].to(out.dtype), part_bias)


def times_head(grad_logits: Tensor, weight: Tensor) -> Tensor:
    """grad_logits @ weight in float32, where grad_logits has the dtype to compute in."""
    total = torch.zeros(len(grad_logits), weight.shape[1], dtype=torch.float32)
    for tokens in vocabulary_slices(weight):
        total += linear(grad_logits[:, tokens], weight[tokens].to(grad_logits.dtype).T)
    return total


def add_head_gradient(total: Tensor, grad_logits: Tensor, hidden: Tensor, first: bool) -> None:
    """total (+)= grad_logits.T @ hidden; what `total` held is overwritten if this is the first product."""
    if total.dtype == grad_logits.dtype:
        torch.mm(grad_logits.T, hidden, out=total) if first else total.addmm_(grad_logits.T, hidden)
        return
    for tokens in vocabulary_slices(total):
        product = grad_logits[:, tokens].T @ hidden
        if first:
            total[tokens] = product
        else:
            total[tokens] += product


def vocabulary_slices(weight: Tensor) -> Iterator[slice]:
    for begin in range(0, weight.shape[0], SLICE_TOKENS):
        yield slice(begin, min(begin + SLICE_TOKENS, weight.shape[0]))


def even_chunks(count: int, most: int) -> list[slice]:
    """[0, count) in the fewest pieces of at most `most`, as equal as they can be; one empty piece if count is 0."""
    pieces = max(1, -(-count // most))
    return [slice(count * piece // pieces, count * (piece + 1) // pieces) for piece in range(pieces)]
