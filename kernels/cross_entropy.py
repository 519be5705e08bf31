"""Scores rows of products with the output head and writes the gradient over them: a program per row reads it once.

For R rows, V tokens and elements of s bytes that kernel moves 2 R V s bytes, a read and a write, where the row it visits
twice stays in cache; scores alone take R V s.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.gpu.cross_entropy import cross_entropy as chunked_cross_entropy
from pmc_fast.kernels.interpreted import rounded
from pmc_fast.kernels.logits import INFINITY, LOWEST, tempered_logits
from pmc_fast.kernels.variant import MODELS, Variant, absent, present


@triton.jit
def product_gradient(logits, slope, columns, target, top, mass, scale):
    """scale * (softmax - onehot) times the soft cap's slope; 0 where a logit is -inf."""
    gradient = tl.exp(logits - top) * (scale / mass)
    return tl.where(columns == target, gradient - scale, gradient) * slope


@triton.jit
def gradient_scale(row, row_weight, magnify, logit_scale, inverse_temperature):
    """What (softmax - onehot) is multiplied by, less the soft cap's slope."""
    scale = tl.load(row_weight + row) * logit_scale * inverse_temperature
    return scale if magnify is None else scale * tl.load(magnify)


@triton.jit
def row_kernel(
    products,  # [chunk, vocab], overwritten by the gradient
    stride,  # of its rows, whose padding may be read and written
    vocab,
    target,  # [N]
    row_weight,  # [N]; None: no gradient
    rows,  # the chunk's row numbers; None: they count from first_row
    first_row,
    magnify,  # [1], multiplies the gradient; None: 1
    nll,  # [N]
    bad,
    logit_scale,
    softcap,
    inverse_temperature,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,  # elements of 16 bytes, which one thread loads and reduces alone
):
    index = tl.program_id(0)
    row = tl.load(rows + index) if rows is not None else first_row + index
    products += index.to(tl.int64) * stride
    label = tl.load(target + row)
    product = tl.load(products + label).to(tl.float32)
    label_logit, label_slope = tempered_logits(product, logit_scale, softcap, inverse_temperature)

    offsets = tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tops = tl.full([BLOCK // WIDTH], LOWEST, tl.float32)
    masses = tl.zeros([BLOCK // WIDTH], tl.float32)
    blocks = tl.cdiv(vocab, BLOCK)
    AGAIN: tl.constexpr = "evict_first" if row_weight is None else "evict_last"
    for block in range(blocks):
        columns = block * BLOCK + offsets
        wide = tl.load(products + columns, mask=columns < stride, eviction_policy=AGAIN).to(tl.float32)
        logits, slope = tempered_logits(wide, logit_scale, softcap, inverse_temperature)
        logits = tl.where(columns < vocab, logits, -INFINITY)
        higher = tl.maximum(tops, tl.max(logits, 1))
        masses = masses * tl.exp(tops - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        tops = higher
    top = tl.max(tops, 0)
    mass = tl.sum(masses * tl.exp(tops - top), 0)
    if not ((mass > 0) & (mass < INFINITY)):  # nothing but -inf, or NaN, or a maximum of +inf, whose mass is NaN
        tl.atomic_min(bad, row.to(tl.int32))
    tl.store(nll + row, (top - label_logit) + tl.log(mass))

    if row_weight is not None:
        scale = gradient_scale(row, row_weight, magnify, logit_scale, inverse_temperature)
        if scale == 0:
            for block in range(blocks):
                columns = block * BLOCK + offsets
                nothing = tl.zeros([BLOCK // WIDTH, WIDTH], products.dtype.element_ty)
                tl.store(products + columns, nothing, mask=columns < stride, eviction_policy="evict_first")
        else:
            for back in range(blocks):  # what was read last is the nearest
                columns = (blocks - 1 - back) * BLOCK + offsets
                mask = columns < stride
                wide = tl.load(products + columns, mask=mask, eviction_policy="evict_first").to(tl.float32)
                logits, slope = tempered_logits(wide, logit_scale, softcap, inverse_temperature)
                gradient = product_gradient(logits, slope, columns, label, top, mass, scale)
                gradient = rounded(gradient, products.dtype.element_ty)
                tl.store(products + columns, gradient, mask=mask, eviction_policy="evict_first")


def row_launch(vocab: int, element_bytes: int, softcap: bool) -> tuple[int, int]:
    """BLOCK and warps of `row_kernel`: the longer the row, the fewer are visited at once.

    A row's second visit is to find it in cache. One program of 32 warps fills an SM: 132 rows of 128256 tokens in 16 bits are
    34 MB of an H100's 50 MB L2, and the last 200 KB of each may still be in its SM's L1. Of longer rows (Gemma's 262208
    tokens: 69 MB and more) part of the second visit reads memory.
    """
    row_bytes = vocab * element_bytes
    warps = 32 if row_bytes > 128 * 1024 else 16 if row_bytes > 32 * 1024 else 8
    loads = 2 if softcap else 4  # that a thread has under way at once; its 64 registers hold no more
    vectors = triton.next_power_of_2(triton.cdiv(row_bytes, 16))
    return min(vectors, loads * 32 * warps) * 16 // element_bytes, warps


def score_rows(
    products: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    rows: Tensor | None,
    first_row: int,
    magnify: Tensor | None,
    nll: Tensor,
    bad: Tensor,
    *,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
) -> None:
    """Each row's nll; with row weights the gradient with respect to the product is written over it."""
    count, vocab = products.shape
    block, warps = row_launch(vocab, products.element_size(), softcap is not None)
    row_kernel[(count,)](
        products,
        products.stride(0),
        vocab,
        target,
        row_weight,
        rows,
        first_row,
        magnify,
        nll,
        bad,
        logit_scale,
        softcap,
        1 / temperature,
        BLOCK=block,
        WIDTH=16 // products.element_size(),
        num_warps=warps,
    )


cross_entropy = partial(chunked_cross_entropy, score_rows)


def variants(capability: int) -> list[Variant]:
    """The kernel at its production configurations; none of them depends on the GPU."""
    signature = {"stride": "i32", "vocab": "i32", "target": "*i64", "rows": "*i64", "first_row": "i32"}
    signature |= {"nll": "*fp32", "bad": "*i32", "logit_scale": "fp32", "inverse_temperature": "fp32"}
    listed = []
    for model in MODELS:
        for dtype, kind, element_bytes in (("bfloat16", "*bf16", 2), ("float16", "*fp16", 2), ("float32", "*fp32", 4)):
            block, warps = row_launch(model.vocab, element_bytes, model.softcap)
            for graded in (True, False):
                optional = {
                    "row_weight": "*fp32" if graded else None,
                    "magnify": "*fp32" if graded and dtype == "float16" else None,
                    "softcap": "fp32" if model.softcap else None,
                }
                listed.append(
                    Variant(
                        name=f"{'scores and gradient' if graded else 'scores'}, {model.name}, {dtype}",
                        kernel=row_kernel,
                        signature=signature | {"products": kind} | present(optional),
                        constants={"BLOCK": block, "WIDTH": 16 // element_bytes} | absent(optional),
                        num_warps=warps,
                        num_stages=3,
                        aligned=("products", "stride", "vocab"),
                    )
                )
    return listed
