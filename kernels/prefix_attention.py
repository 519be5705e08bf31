"""The part of `decode_attention` that rows have in common, on a GPU: a prefix is read once for all rows that share it.

A program has one prefix, one head of keys and a tile of the rows that share the prefix: their queries of that head, up to 64,
are the first side of the products, the positions the second. For S positions, K heads of keys, D dimensions and elements of s
bytes a tile takes 2 S K D s bytes, where `attend_kernel` takes as many for each row. What it leaves are parts: `join_kernel`
joins them with those of the rows' own positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.kernels.device import dot_precision
from pmc_fast.kernels.interpreted import dot, rounded
from pmc_fast.kernels.logits import INFINITY, mass_below, tanh
from pmc_fast.kernels.variant import ATTENTIONS, Attention, Variant, absent, present

# Of prefixes, that are not read again: for these, two more launches and parts in float32 are worth it. On an H200, 160 rows of
# Llama-3.2-3B's heads over 8 prompts: 64 tokens (40 MB) take 34 us at once and 31 otherwise, 256 (159 MB) 46 and 53, 1024
# (637 MB) 55 and 137, 4096 (2.5 GB) 85 and 480.
LEAST_SAVED_BYTES = 150_000_000
MOST_BYTES = 512  # of a position and head, so that queries and blocks fit into any GPU's shared memory
QUERIES = 64  # of a tile: what a warp group multiplies at once
LEAST_SPLIT = 128  # positions
MOST_SPLITS = 16
PROGRAMS_AT_ONCE = 2  # of a multiprocessor


def sharers_if_faster(prefix_row: Tensor, prefix_key: Tensor, heads: int) -> Tensor | None:
    """`sharers_of` where `decode_attention` with that is faster than without, as far as shapes tell; else None."""
    if not faster_at_once(len(prefix_row), prefix_key, heads):
        return None
    return sharers_of(prefix_row, len(prefix_key), heads // prefix_key.shape[1])


def faster_at_once(rows: int, prefix_key: Tensor, heads: int, window: int | None = None) -> bool:
    """Whether prefixes are to be read once for so many rows.

    window: positions that a row sees at most.
    """
    prefixes, kv_heads, positions, dim = prefix_key.shape
    positions = positions if window is None else min(positions, window)
    read_again = (rows - prefixes) * 2 * kv_heads * positions * dim * prefix_key.element_size()
    fits = 2 * (heads // kv_heads) <= QUERIES and dim * prefix_key.element_size() <= MOST_BYTES
    return read_again >= LEAST_SAVED_BYTES and fits


def sharers_of(prefix_row: Tensor, prefixes: int, group: int) -> Tensor:
    """Tiles of rows that share a prefix, found on the device, in launches that depend on shapes alone.

    Args:
        prefix_row: int64 [N] in [0, prefixes).
        group: heads of queries to a head of keys, at most QUERIES.

    Returns:
        int32 [N // R + prefixes, R] with R = QUERIES // group: each tile's rows, all of one prefix, and -1 behind them. Some
        tiles are empty.
    """
    rows, tile_rows = len(prefix_row), QUERIES // group
    tiles = (rows // tile_rows + prefixes, tile_rows)
    sharers = torch.full(tiles, -1, dtype=torch.int32, device=prefix_row.device)
    if rows:
        share_kernel[(triton.cdiv(rows, 32),)](
            prefix_row.contiguous(), sharers, rows, TILE_ROWS=tile_rows, ROWS=32, OTHERS=128, num_warps=4
        )
    return sharers


@triton.jit
def share_kernel(
    prefix_row,  # int64 [rows]
    sharers,  # int32 [rows // TILE_ROWS + prefixes, TILE_ROWS]
    rows,
    TILE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,  # of a program
    OTHERS: tl.constexpr,  # that they are compared with at a time
):
    """The tiles of prefix p begin at b // TILE_ROWS + p, where b rows have prefixes before p: those of p end before the next's."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    prefix = tl.load(prefix_row + row, mask=row < rows, other=0)
    before = tl.zeros([ROWS], tl.int32)
    earlier = tl.zeros([ROWS], tl.int32)  # of the same prefix
    for begin in range(0, rows, OTHERS):
        other = begin + tl.arange(0, OTHERS)
        there = other < rows
        its_prefix = tl.load(prefix_row + other, mask=there, other=0)
        lower = there[None, :] & (its_prefix[None, :] < prefix[:, None])
        same = (other[None, :] < row[:, None]) & (its_prefix[None, :] == prefix[:, None])
        before += tl.sum(lower.to(tl.int32), 1)
        earlier += tl.sum(same.to(tl.int32), 1)
    tile = before // TILE_ROWS + prefix + earlier // TILE_ROWS
    tl.store(sharers + tile * TILE_ROWS + earlier % TILE_ROWS, row, mask=row < rows)


@triton.jit(do_not_specialize=["prefix_positions", "tiles", "parts"])
def attend_prefix_kernel(
    query,  # [N, H, dim]
    query_row_stride,
    query_head_stride,
    prefix_key,  # [prefixes, heads, prefix_positions, dim]
    prefix_key_row_stride,
    prefix_key_head_stride,
    prefix_key_stride,  # of its positions
    prefix_value,
    prefix_value_row_stride,
    prefix_value_head_stride,
    prefix_value_stride,
    prefix_row,  # int64 [N]
    first,  # int64 [N]
    sharers,  # int32 [tiles, TILE_ROWS]
    prefix_positions,
    tiles,
    heads,  # of keys
    scale,
    softcap,
    totals,  # float32 [N, H, parts, dim]
    tops,  # float32 [N, H, parts]
    masses,
    parts,
    TILE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,  # heads of queries to a head of keys
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    POSITIONS: tl.constexpr,
    QUERIES: tl.constexpr,  # at least TILE_ROWS * GROUP
    DEPTH: tl.constexpr,  # DIM, padded
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles % SPLITS
    kv_head = (tl.program_id(0) // tiles // SPLITS).to(tl.int64)
    sharers += tile * TILE_ROWS
    one_of_them = tl.load(sharers)
    if one_of_them < 0:
        return
    its_prefix = tl.load(prefix_row + one_of_them)
    prefix_key += its_prefix * prefix_key_row_stride + kv_head * prefix_key_head_stride
    prefix_value += its_prefix * prefix_value_row_stride + kv_head * prefix_value_head_stride

    depth = tl.arange(0, DEPTH)
    its_query = tl.arange(0, QUERIES)
    row = tl.load(sharers + its_query // GROUP, mask=its_query < TILE_ROWS * GROUP, other=-1).to(tl.int64)
    head = kv_head * GROUP + its_query % GROUP
    real = row >= 0
    there = real[:, None] & (depth < DIM)[None, :]
    query += row * query_row_stride + head * query_head_stride
    queries = tl.load(query[:, None] + depth[None, :], mask=there, other=0)
    sees_from = tl.load(first + row, mask=real, other=prefix_positions).to(tl.int32)

    end = prefix_positions
    begin = tl.minimum(tl.min(sees_from, 0), end)
    if SPLITS > 1:
        blocks = tl.cdiv(end - begin, POSITIONS)
        end = tl.minimum(end, begin + (split + 1) * blocks // SPLITS * POSITIONS)
        begin += split * blocks // SPLITS * POSITIONS

    top = tl.full([QUERIES], -INFINITY, tl.float32)
    mass = tl.zeros([QUERIES], tl.float32)
    total = tl.zeros([QUERIES, DEPTH], tl.float32)
    for start in range(begin, end, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        inside = (position < end)[:, None] & (depth < DIM)[None, :]
        place = position.to(tl.int64)
        k = tl.load(prefix_key + (place * prefix_key_stride)[:, None] + depth[None, :], mask=inside, other=0)
        v = tl.load(prefix_value + (place * prefix_value_stride)[:, None] + depth[None, :], mask=inside, other=0)
        score = dot(queries, tl.trans(k), tl.zeros([QUERIES, POSITIONS], tl.float32), PRECISION) * scale
        if softcap is not None:
            score = softcap * tanh(score / softcap)
        seen = (position < end)[None, :] & (position[None, :] >= sees_from[:, None])
        score = tl.where(seen, score, -INFINITY)
        higher = tl.maximum(top, tl.max(score, 1))
        weight = rounded(mass_below(score, higher[:, None]), v.dtype)
        shrink = mass_below(top, higher)
        mass = mass * shrink + tl.sum(weight.to(tl.float32), 1)  # of what is multiplied: a mean stays a mean
        total = dot(weight, v, total * shrink[:, None], PRECISION)
        top = higher

    index = (row * heads * GROUP + head) * parts + split
    tl.store(tops + index, top, mask=real)
    tl.store(masses + index, mass, mask=real)
    tl.store(totals + index[:, None] * DIM + depth[None, :], total, mask=there)


class Tiles(NamedTuple):
    """How `attend_prefix_kernel` is launched, apart from its splits."""

    POSITIONS: int
    DEPTH: int
    num_warps: int
    num_stages: int


def tiles_for(dim: int, element_bytes: int) -> Tiles:
    """8 KiB of keys at a time, two more blocks on their way, and registers for all sums."""
    depth = max(16, triton.next_power_of_2(dim))
    positions = max(16, min(64, (1 << 13) // (depth * element_bytes)))
    return Tiles(positions, depth, 4 if depth <= 128 and element_bytes == 2 else 8, 3)


def splits_for(rows: int, prefixes: int, tile_rows: int, kv_heads: int, positions: int, processors: int) -> int:
    """Among how many programs a prefix's positions are divided; `rows` are expected to share the prefixes evenly."""
    programs = prefixes * triton.cdiv(triton.cdiv(rows, prefixes), tile_rows) * kv_heads
    return max(1, min(PROGRAMS_AT_ONCE * processors // programs, positions // LEAST_SPLIT, MOST_SPLITS))


def attend_prefix(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_row: Tensor,
    first: Tensor,
    sharers: Tensor,
    scale: float,
    softcap: float | None,
    splits: int,
    totals: Tensor,
    tops: Tensor,
    masses: Tensor,
) -> None:
    """Fill the first `splits` parts of each row and head, in one launch that depends on shapes alone.

    Values must be numbers wherever one of a prefix's rows looks: a NaN that one row looks at others get, too.

    Args:
        query, prefix_key, prefix_value, prefix_row, first, scale, softcap: as the op has them, the dimensions of heads
            neighbours in memory.
        sharers: `sharers_of` these rows.
        totals: float32, contiguous [N, H, parts, D]; become sums of values, times exp(score - top).
        tops, masses: float32, contiguous [N, H, parts]; become the highest score and the sum of exp(score - top). Of a part
            in which a row sees nothing these are -inf and 0.

    Raises:
        ValueError: sharers of other numbers of rows, prefixes or heads.
    """
    (rows, heads, dim), (prefixes, kv_heads) = query.shape, prefix_key.shape[:2]
    group = heads // kv_heads
    tile_rows = QUERIES // group
    count = rows // tile_rows + prefixes
    if sharers.shape != (count, tile_rows):
        raise ValueError(f"sharers: got shape {list(sharers.shape)}, expected {[count, tile_rows]}, from sharers_of")
    attend_prefix_kernel[(count * splits * kv_heads,)](
        query,
        *query.stride()[:2],
        prefix_key,
        *prefix_key.stride()[:3],
        prefix_value,
        *prefix_value.stride()[:3],
        prefix_row.contiguous(),
        first.contiguous(),
        sharers,
        prefix_key.shape[2],
        count,
        kv_heads,
        scale,
        softcap,
        totals,
        tops,
        masses,
        tops.shape[2],
        TILE_ROWS=tile_rows,
        GROUP=group,
        DIM=dim,
        SPLITS=splits,
        QUERIES=QUERIES,
        PRECISION=dot_precision(),
        **tiles_for(dim, query.element_size())._asdict(),
    )


def variants(capability: int) -> list[Variant]:
    """Of each model, and of one in all dtypes."""
    *others, llama = ATTENTIONS
    listed = [_attend_variant(shape, "bf16") for shape in others]
    listed += [_attend_variant(llama, dtype) for dtype in ("bf16", "fp16", "fp32")]
    listed.append(_attend_variant(llama, "bf16", splits=4, softcap=True))
    signature = {"prefix_row": "*i64", "sharers": "*i32", "rows": "i32"}
    constants = {"TILE_ROWS": QUERIES // 3, "ROWS": 32, "OTHERS": 128}
    listed.append(Variant("sharers", share_kernel, signature, constants, num_warps=4, num_stages=3))
    return listed


def _attend_variant(shape: Attention, dtype: str, splits: int = 1, softcap: bool = False) -> Variant:
    group = shape.heads // shape.kv_heads
    tiles = tiles_for(shape.dim, 4 if dtype == "fp32" else 2)
    tensors = ("query", "prefix_key", "prefix_value")
    strides = ["query_row_stride", "query_head_stride"]
    strides += [f"{name}_{of}stride" for name in tensors[1:] for of in ("row_", "head_", "")]
    signature = dict.fromkeys(tensors, "*" + dtype) | dict.fromkeys(strides, "i32")
    signature |= {"prefix_row": "*i64", "first": "*i64", "sharers": "*i32", "scale": "fp32"}
    signature |= dict.fromkeys(("prefix_positions", "tiles", "heads", "parts"), "i32")
    signature |= dict.fromkeys(("totals", "tops", "masses"), "*fp32")
    optional = {"softcap": "fp32" if softcap else None}
    constants = {"TILE_ROWS": QUERIES // group, "GROUP": group, "DIM": shape.dim, "SPLITS": splits, "QUERIES": QUERIES}
    constants |= {"POSITIONS": tiles.POSITIONS, "DEPTH": tiles.DEPTH, "PRECISION": "ieee"}
    return Variant(
        name=f"{shape.model}, {dtype}" + (f", {splits} splits" if splits > 1 else "") + (", soft-capped" * softcap),
        kernel=attend_prefix_kernel,
        signature=signature | present(optional),
        constants=constants | absent(optional),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        matmul=True,
        aligned=(*tensors, *strides, "totals", "tops", "masses"),
    )
