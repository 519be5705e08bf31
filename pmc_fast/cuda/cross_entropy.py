"""Scores rows of products with the output head and writes the gradient over them, by csrc/cuda/cross_entropy.cu."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from pmc_fast.cuda import check_rows, dtype_code, library, queue
from pmc_fast.gpu.cross_entropy import cross_entropy as chunked_cross_entropy


def score_rows(
    products: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    rows: Tensor | None,
    first_row: int,
    magnify: None,
    nll: Tensor,
    bad: Tensor,
    *,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
) -> None:
    """Each row's nll; with row weights the gradient with respect to the product is written over it."""
    check_rows("weight", products)
    library().cross_entropy(
        *queue(products),
        products.data_ptr(),
        dtype_code(products.dtype),
        *products.shape,
        products.stride(0),
        logit_scale,
        softcap or 0.0,
        temperature,
        0 if rows is None else rows.data_ptr(),
        first_row,
        target.data_ptr(),
        0 if row_weight is None else row_weight.data_ptr(),
        nll.data_ptr(),
        bad.data_ptr(),
    )


cross_entropy = partial(chunked_cross_entropy, score_rows)
