"""`linear_logprob` on a CPU: a slice of the vocabulary at a time, so that few logits are held."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pmc_fast.errors import not_finite
from pmc_fast.native import dtype_code, library
from pmc_fast.native.gemm import HeadSlice, add_head_gradient, compute_dtype, even_chunks, vocabulary_slices

if TYPE_CHECKING:
    from pmc_fast import _C

# Tokens of a slice at most, a multiple of what is packed together.
SLICE_TOKENS = 2048
# Rows that are multiplied with a slice at a time.
CHUNK_ROWS = 2048


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    ignore_index: int | None,
    **options,
) -> tuple[Tensor, Tensor]:
    """Also the normalizer, float32 [N, 2]: each row's highest tempered logit and its sum of exp(logit - highest).

    Ignored rows are zeros in both.
    """
    rows = _where(_scored(target, ignore_index))
    logits = _SlicedLogits(_rows(hidden, rows), _rows(target, rows), weight, bias, **options)
    score = _score(logits, rows)
    return _spread(_logprob(score).float(), rows, len(target)), _spread(score[:, :2].float(), rows, len(target))


def linear_logprob_ahead(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    ignore_index: int | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Also each row's gradient for hidden, float32 [N, D], from the same logits.

    Ignored rows are zeros in both.
    """
    count, rows = len(target), _where(_scored(target, ignore_index))
    target, options = _rows(target, rows), {"softcap": softcap, "logit_scale": logit_scale, "temperature": temperature}
    logits = _SlicedLogits(_rows(hidden, rows), target, weight, bias, **options)
    gradient = torch.zeros(logits.x.shape, dtype=torch.float32)
    score = _score(logits, rows, gradient)
    # The target is not among the terms summed up: of a sure row's gradient 1 - p is all that is left, and p rounded with the
    # others would take its digits. From the mass it is as exact as the log-probability.
    logprob, scale = _logprob(score), logit_scale / temperature
    of_target = -logprob.expm1() * scale
    if softcap is not None:
        of_target *= 1 - (score[:, 2] * temperature / softcap) ** 2
    gradient *= (-scale / score[:, 1:2]).float()
    gradient.addcmul_(weight[target], of_target[:, None].float())
    return _spread(logprob.float(), rows, count), _spread(gradient, rows, count)


def _score(logits: _SlicedLogits, rows: Tensor | None, sums: Tensor | None = None) -> Tensor:
    """pmc::RowScore of each row, float64 [rows, 3].

    sums: float32 zeros [rows, D]; become the sums over all tokens but the target of exp(logit - highest), times the soft cap's
        derivative, times the token's row of the head.
    """
    score = torch.tensor([-math.inf, 0, 0], dtype=torch.float64).repeat(len(logits.x), 1)
    for tokens in logits.slices:
        head = logits.head(tokens)
        for chunk in logits.chunks:
            z, kernels = logits.write(head, tokens, chunk)
            if sums is None:
                kernels.score(score[chunk].data_ptr())
            else:
                kernels.score_terms(score[chunk].data_ptr(), sums[chunk].data_ptr(), sums.shape[1])
                head.add_product(z, sums[chunk])
    if len(bad := (~score[:, 0].isfinite()).nonzero()):
        raise not_finite("linear_logprob", int(bad[0] if rows is None else rows[bad[0]]))
    return score


def _logprob(score: Tensor) -> Tensor:
    top, mass, target_logit = score.unbind(1)
    return target_logit - top - mass.log()


def linear_logprob_backward(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    normalizer: Tensor,
    *,
    bias: Tensor | None,
    ignore_index: int | None,
    needs: tuple[bool, bool, bool],
    **options,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of sum(upstream * linear_logprob(...)) that `needs` asks for: hidden, weight, bias.

    Rows whose upstream gradient is 0 are left out of every product.
    """
    rows = _where(_scored(target, ignore_index) & (upstream != 0))
    x = _rows(hidden, rows)
    logits = _SlicedLogits(x, _rows(target, rows), weight, bias, **options)
    row_weight, normalizer = _rows(-upstream, rows), _rows(normalizer, rows)
    d_x = torch.zeros(x.shape, dtype=torch.float32) if needs[0] else None
    d_weight = torch.empty(weight.shape, dtype=weight.dtype) if needs[1] else None
    d_bias = torch.zeros(len(weight), dtype=torch.float32) if needs[2] else None
    # A sum of several products is finished in float32; a single one is rounded once as it is.
    in_place = weight.dtype == logits.dtype and (logits.dtype == torch.float32 or len(logits.chunks) == 1)
    sums = None if in_place or d_weight is None else torch.empty(logits.width, weight.shape[1], dtype=torch.float32)
    for tokens in logits.slices:
        head = logits.head(tokens)
        part = None if d_weight is None else d_weight[tokens]
        total = part if sums is None else sums[: len(part)]
        for chunk in logits.chunks:
            z, kernels = logits.write(head, tokens, chunk)
            kernels.gradient(normalizer[chunk].data_ptr(), row_weight[chunk].data_ptr())
            if d_x is not None:
                head.add_product(z, d_x[chunk])
            if total is not None:
                add_head_gradient(total, z, logits.x[chunk], first=chunk.start == 0)
            if d_bias is not None:
                d_bias[tokens] += z.sum(0, dtype=torch.float32)
        if total is not part:
            part.copy_(total)
    d_hidden = None if d_x is None else _spread(d_x.to(hidden.dtype), rows, len(hidden))
    return d_hidden, d_weight, None if d_bias is None else d_bias.to(weight.dtype)


class _SlicedLogits:
    """Logits of some rows for some tokens, one block after another in the same memory, and the kernels that take them."""

    def __init__(
        self,
        hidden: Tensor,
        target: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        softcap: float | None,
        logit_scale: float,
        temperature: float,
    ) -> None:
        self.dtype = compute_dtype(weight.dtype)
        self.x = hidden.to(self.dtype)
        self._target, self._weight, self._bias = target, weight, bias
        self._transform = logit_scale, softcap or 0.0, temperature
        self.slices = vocabulary_slices(weight, most=SLICE_TOKENS, copied=True)  # or its gradient is, for many rows
        self.width = max(tokens.stop - tokens.start for tokens in self.slices)
        self.chunks = even_chunks(len(hidden), CHUNK_ROWS)
        longest = max(chunk.stop - chunk.start for chunk in self.chunks)
        self._memory = torch.empty(longest * self.width, dtype=self.dtype)
        same = weight.dtype == self.dtype
        self._wide = None if same else torch.empty(self.width, weight.shape[1], dtype=self.dtype)
        self._threads = torch.get_num_threads()
        self._workspace = torch.empty(self._threads * library().head_workspace_bytes(self.width), dtype=torch.uint8)

    def head(self, tokens: slice) -> HeadSlice:
        return HeadSlice(self._weight, self._bias, tokens, self.dtype, self._wide)

    def write(self, head: HeadSlice, tokens: slice, chunk: slice) -> tuple[Tensor, _C.LogitSlice]:
        """The logits of a chunk of rows, until the next ones are written."""
        count, width = chunk.stop - chunk.start, tokens.stop - tokens.start
        z = self._memory[: count * width].view(count, width)
        head.write_logits(self.x[chunk], z)
        return z, library().LogitSlice(
            z.data_ptr(),
            dtype_code(z.dtype),
            count,
            width,
            z.stride(0),
            tokens.start,
            *self._transform,
            self._target[chunk].data_ptr(),
            self._workspace.data_ptr(),
            self._threads,
        )


def _scored(target: Tensor, ignore_index: int | None) -> Tensor:
    return torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index


def _where(chosen: Tensor) -> Tensor | None:
    """The numbers of the rows chosen; None: all of them, and nothing needs to be copied."""
    return None if chosen.all() else chosen.nonzero()[:, 0]


def _rows(values: Tensor, rows: Tensor | None) -> Tensor:
    return (values if rows is None else values[rows]).contiguous()


def _spread(values: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """The rows where they belong among `count`, of which the others are zeros."""
    return values if rows is None else values.new_zeros(count, *values.shape[1:]).index_copy_(0, rows, values)
