"""Scores targets under the output head and takes gradients, a chunk of rows at a time.

Per chunk: the logits by one product, one kernel that reads them once (a program per row) and writes the gradient over them,
then the two products of the gradient. For R rows, V tokens and elements of s bytes that kernel moves 2 R V s bytes, a read
and a write, where the row it visits twice stays in cache; scores alone take R V s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.kernels.checks import no_bad_row, report
from pmc_fast.kernels.gemm import add_product, even_pieces, padded_rows, write_logits, write_product
from pmc_fast.kernels.interpreted import rounded
from pmc_fast.kernels.logits import INFINITY, LOWEST, tempered_logits
from pmc_fast.kernels.variant import MODELS, Variant, absent, present

# Rows of logits held at once: the most that SCRATCH_BYTES hold, between these. Fewer leave the products short of work.
LEAST_ROWS, MOST_ROWS = 2048, 4096
SCRATCH_BYTES = 1 << 30

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


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
    """Each row's nll (0 outside `rows`) and the gradients of sum(row_weight * nll) for hidden, weight, bias as needed."""
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
