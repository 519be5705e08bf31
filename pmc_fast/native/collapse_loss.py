"""`collapse_loss` on a CPU: a chunk of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from pmc_fast.errors import not_finite
from pmc_fast.native import address, dtype_code, library
from pmc_fast.native.gemm import add_head_gradient, compute_dtype, even_chunks, times_head, write_logits

# Logits held at once, by the dtype of the products. Fewer rows make these slower, the gradient of the head above all, and
# more only take memory. The label tokens of a PMC batch (500-600) fit; a bfloat16 gradient that is one product needs no
# float32 copy of the head to be summed in, which is worth more rows.
CHUNK_ROWS = {torch.float32: 640, torch.bfloat16: 2048}


def collapse_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """The loss, each row's nll (0 where ignored) and the gradients for hidden, weight, bias as needed.

    Ignored rows are left out of every product, rows of weight 0 out of the gradients' products.
    """
    scored = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    graded = scored & (token_weight != 0) if any(needs) else torch.zeros_like(scored)
    dtype, vocab = compute_dtype(weight.dtype), weight.shape[0]
    chunks = [
        (rows[chunk], with_gradient)
        for rows, with_gradient in ((graded.nonzero()[:, 0], True), ((scored & ~graded).nonzero()[:, 0], False))
        for chunk in even_chunks(len(rows), CHUNK_ROWS[dtype])
    ]
    one_product = sum(with_gradient for _, with_gradient in chunks) == 1

    token_nll = torch.zeros(target.shape, dtype=torch.float32)
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
    # A sum of several products is finished in float32; a single one is rounded once as it is.
    d_weight = torch.empty(weight.shape, dtype=weight.dtype if one_product else torch.float32) if needs[1] else None
    d_bias = torch.zeros(vocab, dtype=torch.float32) if needs[2] else None
    scratch = torch.empty(max(len(rows) for rows, _ in chunks), vocab, dtype=dtype)
    first = True
    for rows, with_gradient in chunks:
        x, z = hidden[rows].to(dtype), scratch[: len(rows)]
        write_logits(x, weight, bias, z)
        token_nll[rows] = _epilogue(
            z, target[rows], token_weight[rows] if with_gradient else None, rows, softcap, logit_scale
        )
        if not with_gradient:
            continue
        if d_hidden is not None:
            d_hidden[rows] = times_head(z, weight).to(d_hidden.dtype)
        if d_weight is not None:
            add_head_gradient(d_weight, z, x, first)
        if d_bias is not None:
            d_bias += z.sum(0, dtype=torch.float32)
        first = False
    if d_weight is not None:
        d_weight = d_weight.to(weight.dtype)
    d_bias = None if d_bias is None else d_bias.to(weight.dtype)
    return torch.dot(token_weight, token_nll), token_nll, d_hidden, d_weight, d_bias


def _epilogue(
    logits: Tensor,
    target: Tensor,
    token_weight: Tensor | None,
    rows: Tensor,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """Each row's nll; with row weights the gradient with respect to the product is written over the logits."""
    lib, threads = library(), torch.get_num_threads()
    count, vocab = logits.shape
    nll = torch.empty(count, dtype=torch.float32)
    workspace = torch.empty(threads * lib.head_workspace_bytes(vocab), dtype=torch.uint8)
    bad = lib.cross_entropy(
        logits.data_ptr(),
        dtype_code(logits.dtype),
        count,
        vocab,
        logits.stride(0),
        logit_scale,
        softcap or 0.0,
        target.data_ptr(),
        address(token_weight),
        nll.data_ptr(),
        workspace.data_ptr(),
        threads,
    )
    if bad >= 0:
        raise not_finite("collapse_loss", int(rows[bad]))
    return nll
