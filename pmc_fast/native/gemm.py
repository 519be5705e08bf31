"""Matrix products with the output head, by the library and in the dtype that this CPU multiplies fastest."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from pmc_fast.fast_linear import add_linear, has_fast_bfloat16, linear, operand
from pmc_fast.native.packed_linear import packed_linear

# Tokens of the vocabulary multiplied at a time in float32: a slice of a product then stays in cache on its way to where it
# belongs.
SLICE_TOKENS = 8192
# Elements of a slice of the head, or of its gradient, that is held in another dtype meanwhile. Beyond 32 MiB malloc would take
# fresh pages from the system for each.
COPIED_ELEMENTS = 1 << 22
# A slice begins where a packed panel does: a multiple of the columns of any instruction set's.
PANEL_TOKENS = 64


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float32 or has_fast_bfloat16() else torch.float32


class HeadSlice:
    """Some tokens of a head; `dtype` is that to compute in, `wide` memory for them in it if the head has another one."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, tokens: slice, dtype: torch.dtype, wide: Tensor | None = None
    ) -> None:
        self._own = operand(weight, tokens.start, tokens.stop) if dtype == torch.float32 else None
        self._weight, self._dtype, self._wide = weight[tokens], dtype, wide
        self._bias = None if bias is None else bias[tokens].to(dtype)

    @cached_property
    def weight(self) -> Tensor:
        if self._wide is None:
            return self._weight.to(self._dtype)
        return self._wide[: len(self._weight)].copy_(self._weight)

    def write_logits(self, hidden: Tensor, out: Tensor) -> None:
        """out = hidden @ weight.T + bias, where hidden and out have the dtype to compute in."""
        if self._own is not None:
            packed_linear(hidden, self._own, self._bias, out)
        else:
            linear(hidden, self.weight, self._bias, out=out)

    def add_product(self, grad_logits: Tensor, total: Tensor) -> None:
        """total += grad_logits @ weight, where total is float32."""
        add_linear(grad_logits, self.weight.T, total)


def write_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden @ weight.T + bias, where hidden and out have the dtype to compute in."""
    whole = out.dtype == torch.bfloat16 or operand(weight) is not None
    slices = [slice(0, len(weight))] if whole else vocabulary_slices(weight, copied=weight.dtype != out.dtype)
    for tokens in slices:
        HeadSlice(weight, bias, tokens, out.dtype).write_logits(hidden, out[:, tokens])


def times_head(grad_logits: Tensor, weight: Tensor) -> Tensor:
    """grad_logits @ weight in float32, where grad_logits has the dtype to compute in."""
    total = torch.zeros(len(grad_logits), weight.shape[1], dtype=torch.float32)
    for tokens in vocabulary_slices(weight, copied=weight.dtype != grad_logits.dtype):
        HeadSlice(weight, None, tokens, grad_logits.dtype).add_product(grad_logits[:, tokens], total)
    return total


def add_head_gradient(total: Tensor, grad_logits: Tensor, hidden: Tensor, first: bool) -> None:
    """total (+)= grad_logits.T @ hidden; what `total` held is overwritten if this is the first product."""
    if total.dtype == grad_logits.dtype:
        torch.mm(grad_logits.T, hidden, out=total) if first else total.addmm_(grad_logits.T, hidden)
        return
    for tokens in vocabulary_slices(total, copied=True):
        product = grad_logits[:, tokens].T @ hidden
        if first:
            total[tokens] = product
        else:
            total[tokens] += product


def vocabulary_slices(weight: Tensor, *, copied: bool, most: int | None = None) -> list[slice]:
    """All tokens of a head [V, D], at most `most` (SLICE_TOKENS) at a time, fewer if slices of it are copied."""
    most = SLICE_TOKENS if most is None else most
    if copied:
        most = min(most, max(1, COPIED_ELEMENTS // max(1, weight.shape[1]) // PANEL_TOKENS) * PANEL_TOKENS)
    return [slice(begin, min(begin + most, len(weight))) for begin in range(0, len(weight), most)]


def even_chunks(count: int, most: int) -> list[slice]:
    """[0, count) in the fewest pieces of at most `most`, as equal as they can be; one empty piece if count is 0."""
    pieces = max(1, -(-count // most))
    return [slice(count * piece // pieces, count * (piece + 1) // pieces) for piece in range(pieces)]
