"""Scores targets under the output head and takes gradients, a chunk of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.errors import not_finite
from pmc_fast.native import dtype_code, library
from pmc_fast.native.gemm import compute_dtype, even_chunks, vocabulary_slices, write_logits

# Logits held at once. Fewer rows make the products slower, more only take memory.
CHUNK_ROWS = 512

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def cross_entropy(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    row_weight: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Gradients]:
    """Each row's nll (0 where ignored) and the gradients of sum(row_weight * nll) for hidden, weight, bias as needed.

    Ignored rows are left out of every product, rows of weight 0 out of the gradients' products.
    """
    scored = target != ignore_index
    graded = scored & (row_weight != 0) if any(needs) else torch.zeros_like(scored)
    groups = [(graded.nonzero()[:, 0], True), ((scored & ~graded).nonzero()[:, 0], False)]
    dtype, vocab = compute_dtype(weight.dtype), weight.shape[0]
    chunk_rows = max(c.stop - c.start for rows, _ in groups for c in even_chunks(len(rows), CHUNK_ROWS))

    token_nll = torch.zeros(target.shape, dtype=torch.float32)
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
    d_weight = torch.empty(weight.shape, dtype=torch.float32) if needs[1] else None
    d_bias = torch.zeros(vocab, dtype=torch.float32) if needs[2] else None
    scratch = torch.empty(chunk_rows, vocab, dtype=dtype)
    first = True
    for rows, with_gradient in groups:
        for chunk in even_chunks(len(rows), CHUNK_ROWS):
            picked = rows[chunk]
            x, z = hidden[picked].to(dtype), scratch[: len(picked)]
            write_logits(x, weight, bias, z)
            token_nll[picked] = _epilogue(
                op,
                z,
                target[picked],
                row_weight[picked] if with_gradient else None,
                picked,
                softcap,
                logit_scale,
                temperature,
            )
            if not with_gradient:
                continue
            if d_hidden is not None:
                dx = torch.zeros_like(x)
                for tokens, part in vocabulary_slices(weight):
                    dx.addmm_(z[:, tokens], part)
                d_hidden[picked] = dx.to(d_hidden.dtype)
            if d_weight is not None:
                _accumulate(d_weight, z.T, x, first)
            if d_bias is not None:
                d_bias += z.sum(0, dtype=torch.float32)
            first = False
    if d_weight is not None:
        d_weight = d_weight.to(weight.dtype)
    return token_nll, (d_hidden, d_weight, None if d_bias is None else d_bias.to(weight.dtype))


def _accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a @ b, in float32 whatever the dtype of a and b."""
    if a.dtype == total.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
        return
    for rows in even_chunks(total.shape[0], 8192):
        product = a[rows] @ b
        total[rows] = product if first else total[rows] + product


def _epilogue(
    op: str,
    logits: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    rows: Tensor,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
) -> Tensor:
    """Each row's nll; with row weights the gradient with respect to the product is written over the logits."""
    lib, threads = library(), torch.get_num_threads()
    count, vocab = logits.shape
    nll = torch.empty(count, dtype=torch.float32)
    row_weight = None if row_weight is None else row_weight.contiguous()
    workspace = torch.empty(threads * lib.cross_entropy_workspace_bytes(vocab), dtype=torch.uint8)
    bad = lib.cross_entropy(
        logits.data_ptr(),
        dtype_code(logits.dtype),
        count,
        vocab,
        logits.stride(0),
        logit_scale,
        softcap or 0.0,
        temperature,
        target.data_ptr(),
        0 if row_weight is None else row_weight.data_ptr(),
        nll.data_ptr(),
        workspace.data_ptr(),
        threads,
    )
    if bad >= 0:
        raise not_finite(op, int(rows[bad]))
    return nll
