"""`linear_logprob` on a GPU: scores from tiles of logits that never leave the chip.

The forward kernel multiplies hidden states with tiles of the head and keeps, of each tile, its maximum, its mass and the
target's logit. The vocabulary is split among programs, so that few rows fill the chip too, and a second kernel joins the
parts. For N rows, V tokens, D dimensions and elements of s bytes: 2 N V D operations; the head is read once for every group
of row blocks, V D s bytes each time, and written are 8 bytes per row and part.

The backward pass computes logits again: in one chunk of rows, as `collapse_loss` does, if they are few, else in slices of
the vocabulary, whose gradient of the head is finished in one product.
"""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.kernels.checks import no_bad_row, report
from pmc_fast.kernels.cross_entropy import (
    INFINITY,
    LOWEST,
    Gradients,
    absent,
    chunk_rows,
    cross_entropy,
    finished,
    gradient_scale,
    head_logits,
    labelled_rows,
    magnification,
    present,
    product_gradient,
)
from pmc_fast.kernels.gemm import add_product, dot_precision, even_pieces, padded_rows, row_major, write_product
from pmc_fast.kernels.interpreted import dot, rounded
from pmc_fast.kernels.variant import Variant

# The backward pass's slices of the vocabulary: as wide as SLICE_BYTES of logits allow, but no narrower than LEAST_TOKENS.
LEAST_TOKENS = 8192
SLICE_BYTES = 1 << 28
SLICE_BLOCK = 4096  # logits per program

# Row blocks that share a pass over the head. Their hidden states are read again for every tile, so they stay in L2.
GROUP = 16


@triton.jit
def forward_kernel(
    hidden,  # [count, size]
    hidden_stride,
    weight,  # [vocab, size]
    weight_stride,
    bias,  # [vocab] or None
    target,  # [count]
    tops,  # [count, splits]
    masses,  # [count, splits]
    target_logits,  # [count]
    count,
    vocab,
    size,
    splits,
    logit_scale,
    softcap,
    inverse_temperature,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,  # DEPTH divides size
    PRECISION: tl.constexpr,  # of float32 products
):
    # All parts of a group of row blocks come before the next group.
    program = tl.program_id(0)
    row_blocks = tl.cdiv(count, ROWS)
    first_block = program // (GROUP * splits) * GROUP
    blocks = tl.minimum(row_blocks - first_block, GROUP)
    within = program % (GROUP * splits)
    row = (first_block + within % blocks) * ROWS + tl.arange(0, ROWS)
    split = within // blocks

    exists = row < count
    row = row.to(tl.int64)
    depth = tl.arange(0, DEPTH)
    hidden += tl.minimum(row, count - 1)[:, None] * hidden_stride + depth[None, :]
    label = tl.load(target + row, mask=exists, other=-1)
    top = tl.full([ROWS], LOWEST, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    tiles = tl.cdiv(vocab, TOKENS)
    for tile in range(split * tiles // splits, (split + 1) * tiles // splits):
        token = tile * TOKENS + tl.arange(0, TOKENS)
        inside = token < vocab
        head = weight + tl.minimum(token, vocab - 1).to(tl.int64)[None, :] * weight_stride + depth[:, None]
        products = tl.zeros([ROWS, TOKENS], tl.float32)
        for start in range(0, size, DEPTH):
            if WHOLE:
                x = tl.load(hidden + start)
                w = tl.load(head + start)
            else:
                x = tl.load(hidden + start, mask=depth[None, :] < size - start, other=0)
                w = tl.load(head + start, mask=depth[:, None] < size - start, other=0)
            products = dot(x, w, products, PRECISION)
        if bias is not None:
            products += tl.load(bias + token, mask=inside, other=0).to(tl.float32)[None, :]
        logits, slope = head_logits(products, logit_scale, softcap, inverse_temperature)
        logits = tl.where(inside[None, :], logits, -INFINITY)
        higher = tl.maximum(top, tl.max(logits, 1))
        mass = mass * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        top = higher
        here = (label >= tile * TOKENS) & (label < (tile + 1) * TOKENS)
        if tl.max(here.to(tl.int32), 0) > 0:  # few tiles hold a target
            label_logit = tl.sum(tl.where(token[None, :] == label[:, None], logits, 0.0), 1)
            tl.store(target_logits + row, label_logit, mask=here)
    part = row * splits + split
    tl.store(tops + part, top, mask=exists)
    tl.store(masses + part, mass, mask=exists)


@triton.jit
def join_kernel(
    tops,  # [count, splits]
    masses,  # [count, splits]
    target_logits,  # [count]
    rows,  # [count], row numbers of the caller; None: 0, 1, ...
    splits,
    logprob,  # [N]
    top_out,  # [count]
    mass_out,  # [count]
    bad,
    SPLITS: tl.constexpr,
):
    index = tl.program_id(0)
    row = tl.load(rows + index) if rows is not None else index
    part = index.to(tl.int64) * splits + tl.arange(0, SPLITS)
    exists = tl.arange(0, SPLITS) < splits
    top = tl.load(tops + part, mask=exists, other=LOWEST)
    mass = tl.load(masses + part, mask=exists, other=0)
    highest = tl.max(top, 0)
    total = tl.sum(mass * tl.exp(top - highest), 0)
    if not ((total > 0) & (total < INFINITY)):  # nothing but -inf, or NaN, or a maximum of +inf, whose mass is NaN
        tl.atomic_min(bad, row.to(tl.int32))
    tl.store(logprob + row, (tl.load(target_logits + index) - highest) - tl.log(total))
    tl.store(top_out + index, highest)
    tl.store(mass_out + index, total)


@triton.jit
def slice_kernel(
    products,  # [count, tokens], float32
    gradients,  # [count, tokens]; may be `products`
    stride,  # of the rows of both, whose padding may be read and written
    bias,  # [tokens] or None
    tokens,
    first_token,
    target,  # [count]
    row_weight,  # [count]
    tops,  # [count]
    masses,  # [count]
    magnify,  # [1], multiplies the gradient; None: 1
    logit_scale,
    softcap,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < stride
    product = tl.load(products + row * stride + columns, mask=inside, eviction_policy="evict_first")
    if bias is not None:
        product += tl.load(bias + columns, mask=columns < tokens, other=0).to(tl.float32)
    logits, slope = head_logits(product, logit_scale, softcap, inverse_temperature)
    scale = gradient_scale(row, row_weight, magnify, logit_scale, inverse_temperature)
    label = tl.load(target + row) - first_token
    gradient = product_gradient(logits, slope, columns, label, tl.load(tops + row), tl.load(masses + row), scale)
    tl.store(gradients + row * stride + columns, rounded(gradient, gradients.dtype.element_ty), mask=inside)


class Tiles(NamedTuple):
    """How `forward_kernel` is launched, apart from its splits."""

    ROWS: int
    TOKENS: int
    DEPTH: int
    num_warps: int
    num_stages: int


def tiles_for(rows: int, vocab: int, size: int, element_bytes: int, capability: int) -> Tiles:
    """Large tiles spare L2, which is what keeps tensor cores waiting; up to 64 rows wait for memory whatever the tile.

    256 tokens take the registers and shared memory of data-centre GPUs since Hopper, whose products read their operands
    from shared memory.
    """
    if element_bytes == 4:
        tiles = Tiles(64, 64, 16, 4, 3) if rows <= 64 else Tiles(128, 128, 16, 8, 3)
    elif rows <= 64:
        tiles = Tiles(64, 128, 64, 4, 4)
    else:
        tiles = Tiles(128, 256 if capability // 10 in (9, 10) else 128, 64, 8, 4)
    extents = (max(16, triton.next_power_of_2(extent)) for extent in (rows, vocab, size))
    most_rows, most_tokens, most_depth = map(min, tiles[:3], extents)
    return tiles._replace(ROWS=most_rows, TOKENS=most_tokens, DEPTH=most_depth)


@cache
def splits_for(row_blocks: int, tiles: int, at_once: int) -> int:
    """Parts of the vocabulary: enough that a group of row blocks fills the chip, and of those the fewest that end first."""
    least = min(tiles, max(1, at_once // min(row_blocks, GROUP)))

    def time(splits: int) -> int:
        return triton.cdiv(row_blocks * splits, at_once) * triton.cdiv(tiles, splits)

    return min(range(least, min(tiles, 4 * least) + 1), key=time)


def device_of(tensor: Tensor) -> tuple[int, int]:
    """Capability and number of multiprocessors; in the interpreter an H100's."""
    if tensor.device.type == "cpu":
        return 90, 132
    properties = torch.cuda.get_device_properties(tensor.device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


class Scores(NamedTuple):
    logprob: Tensor  # [N], 0 at ignored rows
    tops: Tensor  # [count], each scored row's highest tempered logit
    masses: Tensor  # [count], its sum of exp(logit - top)


def score(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
) -> Scores:
    """Scores the rows numbered in `rows`; None: all."""
    total = len(target)
    if rows is not None:
        hidden, target = hidden[rows], target[rows]
    hidden, weight, target = row_major(hidden), row_major(weight), target.contiguous()
    (count, size), vocab = hidden.shape, weight.shape[0]
    new = partial(torch.empty, dtype=torch.float32, device=weight.device)
    scores = Scores(torch.zeros(total, dtype=torch.float32, device=weight.device), new(count), new(count))
    if count == 0:
        return scores

    capability, processors = device_of(weight)
    tiles = tiles_for(count, vocab, size, weight.element_size(), capability)
    row_blocks = triton.cdiv(count, tiles.ROWS)
    at_once = processors * (2 if tiles.ROWS <= 64 else 1)  # programs, by the registers and shared memory that they take
    splits = splits_for(row_blocks, triton.cdiv(vocab, tiles.TOKENS), at_once)
    tops, masses, target_logits = new(count, splits), new(count, splits), new(count)
    forward_kernel[(row_blocks * splits,)](
        hidden,
        hidden.stride(0),
        weight,
        weight.stride(0),
        bias,
        target,
        tops,
        masses,
        target_logits,
        count,
        vocab,
        size,
        splits,
        logit_scale,
        softcap,
        1 / temperature,
        GROUP=GROUP,
        WHOLE=size % tiles.DEPTH == 0,
        PRECISION=dot_precision(),
        **tiles._asdict(),
    )
    bad = no_bad_row(total, weight.device)
    join_kernel[(count,)](
        tops,
        masses,
        target_logits,
        rows,
        splits,
        *scores,
        bad,
        SPLITS=triton.next_power_of_2(splits),
        num_warps=1,
    )
    report("linear_logprob", bad, total)
    return scores


def linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor, *, ignore_index: int | None, **options) -> Tensor:
    return score(hidden, weight, target, labelled_rows(target, ignore_index), **options).logprob


def linear_logprob_backward(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int | None,
    needs: tuple[bool, bool, bool],
    **options,
) -> Gradients:
    """The gradients of sum(upstream * linear_logprob(...)) that `needs` asks for: hidden, weight, bias."""
    rows = labelled_rows(target, ignore_index)
    if len(target if rows is None else rows) > chunk_rows(weight):
        return sliced_backward(upstream, hidden, weight, target, rows, needs=needs, **options)
    row_weight = -upstream.float()
    _, gradients = cross_entropy(
        "linear_logprob", hidden, weight, target, row_weight, rows=rows, needs=needs, **options
    )
    return gradients


def sliced_backward(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """A slice of the vocabulary at a time, in float32 until it is a gradient.

    Logits rounded to 16 bits would not do here: each row's top and mass are those of unrounded ones.
    """
    head = {"softcap": softcap, "logit_scale": logit_scale, "temperature": temperature}
    _, tops, masses = score(hidden, weight, target, rows, bias=bias, **head)
    x, label, row_weight = (t if rows is None else t[rows] for t in (hidden, target, -upstream.float()))
    label, row_weight = label.contiguous(), row_weight.contiguous()
    (vocab, size), count, dtype, device = weight.shape, len(x), weight.dtype, weight.device
    magnify = magnification(row_weight, logit_scale, temperature) if dtype == torch.float16 else None

    d_x = torch.empty(count, size, dtype=torch.float32, device=device) if needs[0] else None
    d_weight = torch.empty(vocab, size, dtype=dtype, device=device) if needs[1] else None
    d_bias = torch.empty(vocab, dtype=torch.float32, device=device) if needs[2] else None
    most = max(LEAST_TOKENS, SLICE_BYTES // (count * weight.element_size()))
    slices = list(even_pieces(vocab, most, multiple=256))
    widest = max(tokens.stop - tokens.start for tokens in slices)
    products = padded_rows(count, widest, torch.float32, device)
    gradients = products if dtype == torch.float32 else padded_rows(count, widest, dtype, device)
    for tokens in slices:
        head_slice, width = weight[tokens], tokens.stop - tokens.start
        z, g = products[:, :width], gradients[:, :width]
        write_product(z, x, head_slice.T)
        block = min(SLICE_BLOCK, triton.next_power_of_2(width))
        slice_kernel[(count, triton.cdiv(width, block))](
            z,
            g,
            z.stride(0),
            None if bias is None else bias[tokens],
            width,
            tokens.start,
            label,
            row_weight,
            tops,
            masses,
            magnify,
            logit_scale,
            softcap,
            1 / temperature,
            BLOCK=block,
            num_warps=8,
        )
        if d_x is not None:
            (write_product if tokens.start == 0 else add_product)(d_x, g, head_slice)
        if d_weight is not None:
            write_head_gradient(d_weight[tokens], g.T, x, magnify)
        if d_bias is not None:
            torch.sum(g, 0, dtype=torch.float32, out=d_bias[tokens])
    d_hidden, _, d_bias = finished(d_x, None, d_bias, hidden, rows, magnify)
    return d_hidden, d_weight, d_bias


def write_head_gradient(out: Tensor, gradients: Tensor, x: Tensor, magnify: Tensor | None) -> None:
    """out = gradients @ x / magnify, rounded once."""
    if magnify is None:
        write_product(out, gradients, x)
    else:
        sums = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        write_product(sums, gradients, x)
        out.copy_(sums.div_(magnify))


def variants(capability: int) -> list[Variant]:
    """The kernels at their production configurations."""
    listed = []
    for model, vocab, size, options in (
        ("SmolLM2-135M", 49152, 576, {}),
        ("Phi-1.5", 51200, 2048, {"bias"}),
        ("Llama-3.2-3B", 128256, 3072, {}),
        ("Gemma-3-12B", 262208, 3840, {"softcap"}),
    ):
        for dtype, kind, element_bytes in (("bfloat16", "*bf16", 2), ("float16", "*fp16", 2), ("float32", "*fp32", 4)):
            head = {
                "bias": kind if "bias" in options else None,
                "logit_scale": "fp32",
                "softcap": "fp32" if "softcap" in options else None,
                "inverse_temperature": "fp32",
            }
            for rows in (64, 8192):
                tiles = tiles_for(rows, vocab, size, element_bytes, capability)
                for precision in ("ieee", "tf32") if dtype == "float32" else ("ieee",):
                    name = f"forward of {rows} rows, {model}, {'tf32' if precision == 'tf32' else dtype}"
                    listed.append(_forward_variant(name, kind, head, tiles, size, precision))
            listed.append(_slice_variant(f"gradient of a slice, {model}, {dtype}", kind, head))
    for splits in (8, 264):
        listed.append(_join_variant(f"join {splits} parts", splits))
    return listed


def _forward_variant(name: str, kind: str, head: dict, tiles: Tiles, size: int, precision: str) -> Variant:
    signature = {"hidden": kind, "hidden_stride": "i32", "weight": kind, "weight_stride": "i32", "target": "*i64"}
    signature |= dict.fromkeys(("tops", "masses", "target_logits"), "*fp32")
    signature |= dict.fromkeys(("count", "vocab", "size", "splits"), "i32")
    constants = {"GROUP": GROUP, "WHOLE": size % tiles.DEPTH == 0, "PRECISION": precision}
    constants |= {"ROWS": tiles.ROWS, "TOKENS": tiles.TOKENS, "DEPTH": tiles.DEPTH}
    return Variant(
        name=name,
        kernel=forward_kernel,
        signature=signature | present(head),
        constants=constants | absent(head),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        matmul=True,
        aligned=(
            "hidden",
            "hidden_stride",
            "weight",
            "weight_stride",
            "vocab",
            "size",
            *(("bias",) if head["bias"] else ()),
        ),
    )


def _slice_variant(name: str, kind: str, head: dict) -> Variant:
    signature = {"products": "*fp32", "gradients": kind, "target": "*i64"}
    signature |= dict.fromkeys(("stride", "tokens", "first_token"), "i32")
    signature |= dict.fromkeys(("row_weight", "tops", "masses"), "*fp32")
    optional = head | {"magnify": "*fp32" if kind == "*fp16" else None}
    return Variant(
        name=name,
        kernel=slice_kernel,
        signature=signature | present(optional),
        constants={"BLOCK": SLICE_BLOCK} | absent(optional),
        num_warps=8,
        num_stages=3,
        aligned=("products", "gradients", "stride", "tokens", *(("bias",) if head["bias"] else ())),
    )


def _join_variant(name: str, splits: int) -> Variant:
    signature = dict.fromkeys(("tops", "masses", "target_logits", "logprob", "top_out", "mass_out"), "*fp32")
    signature |= {"rows": "*i64", "splits": "i32", "bad": "*i32"}
    return Variant(
        name=name,
        kernel=join_kernel,
        signature=signature,
        constants={"SPLITS": triton.next_power_of_2(splits)},
        num_warps=1,
        num_stages=3,
        aligned=("tops", "masses"),
    )
