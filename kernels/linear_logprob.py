"""`linear_logprob` on a GPU: scores from tiles of logits that never leave the chip.

The forward kernel multiplies hidden states with tiles of the head and keeps, of each tile, its maximum, its mass and the
target's logit. The vocabulary is split among programs, so that few rows fill the chip too, and a second kernel joins the
parts. For N rows, V tokens, D dimensions and elements of s bytes: 2 N V D operations; the head is read once for every group
of row blocks, V D s bytes each time, and written are 8 bytes per row and part.

The backward pass computes logits again: in one chunk of rows, as `collapse_loss` does, if they are few, else in slices of
the vocabulary, whose gradient of the head is finished in one product. Slices need each row's maximum and mass over the whole
vocabulary: the forward pass hands them over as the normalizer. Not their log-sum-exp: at logits of 100 it is rounded to
multiples of 8e-6, by which p - 1 of a confident row would be off.
"""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.gpu.checks import no_bad_row, report
from pmc_fast.gpu.cross_entropy import Gradients, chunk_rows, labelled_rows
from pmc_fast.gpu.gemm import row_major
from pmc_fast.kernels.cross_entropy import cross_entropy
from pmc_fast.kernels.device import device_of, dot_precision
from pmc_fast.kernels.interpreted import dot
from pmc_fast.kernels.logits import INFINITY, LOWEST, tempered_logits
from pmc_fast.kernels.sliced_backward import sliced_backward
from pmc_fast.kernels.variant import MODELS, Variant, absent, present

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
        logits, slope = tempered_logits(products, logit_scale, softcap, inverse_temperature)
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
    normalizer,  # [N, 2]
    bad,
    SPLITS: tl.constexpr,
):
    index = tl.program_id(0)
    row = tl.load(rows + index) if rows is not None else index.to(tl.int64)
    part = index.to(tl.int64) * splits + tl.arange(0, SPLITS)
    exists = tl.arange(0, SPLITS) < splits
    top = tl.load(tops + part, mask=exists, other=LOWEST)
    mass = tl.load(masses + part, mask=exists, other=0)
    highest = tl.max(top, 0)
    total = tl.sum(mass * tl.exp(top - highest), 0)
    if not ((total > 0) & (total < INFINITY)):  # nothing but -inf, or NaN, or a maximum of +inf, whose mass is NaN
        tl.atomic_min(bad, row.to(tl.int32))
    tl.store(logprob + row, (tl.load(target_logits + index) - highest) - tl.log(total))
    tl.store(normalizer + 2 * row, highest)
    tl.store(normalizer + 2 * row + 1, total)


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


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    """Also the normalizer, float32 [N, 2]: each row's highest tempered logit and its sum of exp(logit - highest).

    Ignored rows are zeros in both.
    """
    rows, total = labelled_rows(target, ignore_index), len(target)
    if rows is not None:
        hidden, target = hidden[rows], target[rows]
    hidden, weight, target = row_major(hidden), row_major(weight), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    (count, size), vocab = hidden.shape, weight.shape[0]
    new, zeros = (partial(f, dtype=torch.float32, device=weight.device) for f in (torch.empty, torch.zeros))
    logprob, normalizer = zeros(total), zeros(total, 2)
    if count == 0:
        return logprob, normalizer

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
        logprob,
        normalizer,
        bad,
        SPLITS=triton.next_power_of_2(splits),
        num_warps=1,
    )
    report("linear_logprob", bad, total)
    return logprob, normalizer


def linear_logprob_backward(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    normalizer: Tensor,
    *,
    ignore_index: int | None,
    needs: tuple[bool, bool, bool],
    **options,
) -> Gradients:
    """The gradients of sum(upstream * linear_logprob(...)) that `needs` asks for: hidden, weight, bias."""
    rows = labelled_rows(target, ignore_index)
    if len(target if rows is None else rows) > chunk_rows(weight):
        return sliced_backward(upstream, hidden, weight, target, normalizer, rows=rows, needs=needs, **options)
    row_weight = -upstream.float()
    _, gradients = cross_entropy(
        "linear_logprob", hidden, weight, target, row_weight, rows=rows, needs=needs, **options
    )
    return gradients


def variants(capability: int) -> list[Variant]:
    """The kernels at their production configurations."""
    listed = []
    for model in MODELS:
        for dtype, kind, element_bytes in (("bfloat16", "*bf16", 2), ("float16", "*fp16", 2), ("float32", "*fp32", 4)):
            head = model.optional(kind) | {"logit_scale": "fp32", "inverse_temperature": "fp32"}
            for rows in (64, 8192):
                tiles = tiles_for(rows, model.vocab, model.size, element_bytes, capability)
                for precision in ("ieee", "tf32") if dtype == "float32" else ("ieee",):
                    name = f"forward of {rows} rows, {model.name}, {'tf32' if precision == 'tf32' else dtype}"
                    listed.append(_forward_variant(name, kind, head, tiles, model.size, precision))
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


def _join_variant(name: str, splits: int) -> Variant:
    signature = dict.fromkeys(("tops", "masses", "target_logits", "logprob", "normalizer"), "*fp32")
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
