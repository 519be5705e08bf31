"""Scores targets under the output head and takes gradients, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pmc_fast.gpu.checks import no_bad_row, report
from pmc_fast.gpu.gemm import add_product, even_pieces, padded_rows, write_logits, write_product

# Rows of logits held at once: the most that SCRATCH_BYTES hold, between these. Fewer leave the products short of work.
LEAST_ROWS, MOST_ROWS = 2048, 4096
SCRATCH_BYTES = 1 << 30

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def magnification(row_weight: Tensor, logit_scale: float, temperature: float) -> Tensor:
    """float32 [1]: the power of two that brings gradients of products to float16's upper range, [2^14, 2^15)."""
    largest = (row_weight.abs().amax() * (abs(logit_scale) / temperature)).clamp(max=torch.finfo(torch.float32).max)
    exponent = 15 - torch.frexp(largest).exponent
    return torch.ldexp(torch.ones_like(largest), exponent.clamp(max=126))[None]


def chunk_rows(weight: Tensor) -> int:
    row_bytes = weight.shape[0] * weight.element_size()
    return min(MOST_ROWS, max(LEAST_ROWS, SCRATCH_BYTES // row_bytes))


def labelled_rows(target: Tensor, ignore_index: int | None) -> Tensor | None:
    """The numbers of the rows to score, in order; None: all of them, and nobody waits for the device."""
    return None if ignore_index is None else (target != ignore_index).nonzero()[:, 0]


def finished(
    d_x: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    hidden: Tensor,
    rows: Tensor | None,
    magnify: Tensor | None,
) -> Gradients:
    """Gradients in the dtype of hidden and at its scale, d_x with rows of zeros where no row was scored."""
    if magnify is not None:
        for sums in (d_x, d_weight, d_bias):
            if sums is not None:
                sums /= magnify
    d_x, d_weight, d_bias = (None if g is None else g.to(hidden.dtype) for g in (d_x, d_weight, d_bias))
    if d_x is not None and rows is not None:
        d_x = torch.zeros_like(hidden, memory_format=torch.contiguous_format).index_copy_(0, rows, d_x)
    return d_x, d_weight, d_bias


def cross_entropy(
    score_rows: Callable[..., None],
    op: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    row_weight: Tensor,
    *,
    rows: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Gradients]:
    """Each row's nll (0 outside `rows`) and the gradients of sum(row_weight * nll) for hidden, weight, bias as needed.

    ``score_rows(products, target, row_weight, rows, first_row, magnify, nll, bad, *, softcap, logit_scale, temperature)`` is
    the implementation's kernel: each row's nll; with row weights the gradient with respect to the product is written over it.
    """
    dtype, device = weight.dtype, weight.device
    vocab, size = weight.shape
    x = hidden if rows is None else hidden[rows]
    target, row_weight = target.contiguous(), row_weight.contiguous()
    nll = torch.zeros(target.shape, dtype=torch.float32, device=device)
    bad = no_bad_row(len(target), device)

    # The gradient of the head is summed over chunks in float32, and written at once in its own dtype if there is one chunk.
    # One chunk of up to `size` rows more holds no more memory than that sum would.
    most = chunk_rows(weight)
    one_chunk = len(x) <= most + (size if needs[1] and dtype == torch.bfloat16 else 0)
    chunks = list(even_pieces(len(x), len(x) if one_chunk else most, multiple=128))
    # float16 underflows at weights of 1/500; its gradients are magnified until they are sums in float32.
    magnify = None
    if dtype == torch.float16 and chunks and any(needs):
        magnify = magnification(row_weight if rows is None else row_weight[rows], logit_scale, temperature)

    wide = torch.float32 if magnify is not None else dtype
    d_x = torch.empty(len(x), size, dtype=wide, device=device) if needs[0] else None
    d_weight = None
    if needs[1]:
        d_weight = torch.empty(vocab, size, dtype=torch.float32 if len(chunks) > 1 else wide, device=device)
        if not chunks:
            d_weight.zero_()
    d_bias = torch.zeros(vocab, dtype=torch.float32, device=device) if needs[2] else None
    scratch = padded_rows(max((c.stop - c.start for c in chunks), default=0), vocab, dtype, device)
    for chunk in chunks:
        z = scratch[: chunk.stop - chunk.start]
        write_logits(x[chunk], weight, bias, z)
        score_rows(
            z,
            target,
            row_weight if any(needs) else None,
            None if rows is None else rows[chunk],
            chunk.start,
            magnify,
            nll,
            bad,
            softcap=softcap,
            logit_scale=logit_scale,
            temperature=temperature,
        )
        if d_x is not None:
            write_product(d_x[chunk], z, weight)
        if d_weight is not None:
            (write_product if chunk.start == 0 else add_product)(d_weight, z.T, x[chunk])
        if d_bias is not None:
            d_bias += z.sum(0, dtype=torch.float32)
    report(op, bad, len(target))
    return nll, finished(d_x, d_weight, d_bias, hidden, rows, magnify)
