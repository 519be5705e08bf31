"""`decode_attention` on a GPU: one pass over a row's positions, for all heads that share keys and values together.

A program has one row and one head of keys. It takes scores as [positions, heads], since a matrix product wants its first
side long, and the positions are many where the heads are few. For P positions, K heads of keys, D dimensions and elements
of s bytes a row takes 2 P K D s bytes; neighbouring rows are neighbouring programs, so L2 serves a prefix that they share.
Where it is to be read once for all of them, `prefix_attention` does that, and the rows' own positions alone are done here.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.kernels import prefix_attention
from pmc_fast.kernels.device import device_of, dot_precision
from pmc_fast.kernels.interpreted import dot, rounded
from pmc_fast.kernels.logits import INFINITY, mass_below, tanh
from pmc_fast.kernels.variant import ATTENTIONS, Attention, Variant, absent, present

LEAST_POSITIONS = 256  # of a split: fewer are read before a second kernel has started
MOST_SPLITS = 32
PROGRAMS_AT_ONCE = 4  # of a multiprocessor, so that memory is kept busy


@triton.jit(do_not_specialize=["positions", "prefix_positions", "parts"])
def attend_kernel(
    query,  # [N, H, dim]
    query_row_stride,
    query_head_stride,
    key,  # [N, heads, positions, dim]
    key_row_stride,
    key_head_stride,
    key_stride,  # of its positions
    value,
    value_row_stride,
    value_head_stride,
    value_stride,
    prefix_key,  # [prefixes, heads, prefix_positions, dim] or None
    prefix_key_row_stride,
    prefix_key_head_stride,
    prefix_key_stride,
    prefix_value,
    prefix_value_row_stride,
    prefix_value_head_stride,
    prefix_value_stride,
    prefix_row,  # int64 [N] or None: positions of a prefix are left out
    first,  # int64 [N]
    length,  # int64 [N] or None
    positions,
    prefix_positions,
    heads,  # of keys
    scale,
    softcap,
    out,  # [N, H, dim], or with tops float32 [N, H, parts, dim]: sums that are still to be divided by masses
    tops,  # float32 [N, H, parts] or None; of parts those from here on are filled
    masses,
    bad,  # int32 [1] or None
    parts,
    GROUP: tl.constexpr,  # heads of queries to a head of keys
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    POSITIONS: tl.constexpr,
    HEADS: tl.constexpr,  # GROUP and DIM, padded
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether 16 bytes divide the address of every key and value
):
    split = tl.program_id(0) % SPLITS
    kv_head = (tl.program_id(0) // SPLITS % heads).to(tl.int64)
    row = (tl.program_id(0) // SPLITS // heads).to(tl.int64)
    depth = tl.arange(0, DEPTH)
    head = tl.arange(0, HEADS)
    real = (head < GROUP)[:, None] & (depth < DIM)[None, :]

    query += row * query_row_stride + kv_head * GROUP * query_head_stride
    queries = tl.load(query + head.to(tl.int64)[:, None] * query_head_stride + depth[None, :], mask=real, other=0)
    key += row * key_row_stride + kv_head * key_head_stride
    value += row * value_row_stride + kv_head * value_head_stride
    if prefix_row is not None:
        its_prefix = tl.load(prefix_row + row)
        prefix_key += its_prefix * prefix_key_row_stride + kv_head * prefix_key_head_stride
        prefix_value += its_prefix * prefix_value_row_stride + kv_head * prefix_value_head_stride

    begin = tl.load(first + row).to(tl.int32)
    if prefix_row is None:
        begin = tl.maximum(begin, prefix_positions)
    end = prefix_positions + (positions if length is None else tl.load(length + row).to(tl.int32))
    if SPLITS > 1:
        blocks = tl.cdiv(end - begin, POSITIONS)
        end = tl.minimum(end, begin + (split + 1) * blocks // SPLITS * POSITIONS)
        begin += split * blocks // SPLITS * POSITIONS

    top = tl.full([HEADS], -INFINITY, tl.float32)
    mass = tl.zeros([HEADS], tl.float32)
    total = tl.zeros([DEPTH, HEADS], tl.float32)
    for start in range(begin, end, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        seen = position < end
        there = seen[:, None] & (depth < DIM)[None, :]
        own = (position - prefix_positions).to(tl.int64)
        keys = key + own * key_stride
        values = value + own * value_stride
        if prefix_row is not None:
            keys = tl.where(own < 0, prefix_key + position.to(tl.int64) * prefix_key_stride, keys)
            values = tl.where(own < 0, prefix_value + position.to(tl.int64) * prefix_value_stride, values)
            if ALIGNED:  # which Triton 3.8 does not see in a choice: it would load element by element
                keys, values = tl.multiple_of(keys, 16), tl.multiple_of(values, 16)
        k = tl.load(keys[:, None] + depth[None, :], mask=there, other=0)
        v = tl.load(values[:, None] + depth[None, :], mask=there, other=0)
        score = dot(k, tl.trans(queries), tl.zeros([POSITIONS, HEADS], tl.float32), PRECISION) * scale
        if softcap is not None:
            score = softcap * tanh(score / softcap)
        score = tl.where(seen[:, None], score, -INFINITY)
        higher = tl.maximum(top, tl.max(score, 0))
        weight = rounded(mass_below(score, higher[None, :]), v.dtype)
        shrink = mass_below(top, higher)
        mass = mass * shrink + tl.sum(weight.to(tl.float32), 0)  # of what is multiplied: a mean stays a mean
        total = dot(tl.trans(v), weight, total * shrink[None, :], PRECISION)
        top = higher

    index = (row * heads + kv_head) * GROUP + head
    if tops is not None:
        index = index * parts + split
        tl.store(tops + index, top, mask=head < GROUP)
        tl.store(masses + index, mass, mask=head < GROUP)
    else:
        _report(bad, row, tl.min(((mass > 0) | (head >= GROUP)).to(tl.int32), 0) == 0)
        total = total / mass[None, :]
    result = rounded(tl.trans(total), out.dtype.element_ty)
    tl.store(out + index[:, None] * DIM + depth[None, :], result, mask=real)


@triton.jit
def join_kernel(
    totals,  # [N * H, splits, DIM]
    tops,  # [N * H, splits]
    masses,
    splits,
    heads,  # H
    out,  # [N * H, DIM]
    bad,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,  # splits and DIM, padded
    DEPTH: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    depth = tl.arange(0, DEPTH)
    part = index * splits + split
    top = tl.load(tops + part, mask=split < splits, other=-INFINITY)
    weight = tl.exp(top - tl.max(top, 0))
    mass = tl.sum(weight * tl.load(masses + part, mask=split < splits, other=0), 0)
    there = (split < splits)[:, None] & (depth < DIM)[None, :]
    total = tl.load(totals + part[:, None] * DIM + depth[None, :], mask=there, other=0)
    _report(bad, index // heads, mass != mass)
    result = rounded(tl.sum(total * weight[:, None], 0) / mass, out.dtype.element_ty)
    tl.store(out + index * DIM + depth, result, mask=depth < DIM)


@triton.jit
def _report(bad, row, wrong):
    """wrong: whether a mass is NaN, as a score of NaN or +inf makes it, or of nothing but -inf."""
    if bad is not None:
        tl.atomic_min(bad, row.to(tl.int32), mask=wrong)


class Tiles(NamedTuple):
    """How `attend_kernel` is launched, apart from its splits."""

    POSITIONS: int
    HEADS: int
    DEPTH: int
    num_warps: int
    num_stages: int


def tiles_for(group: int, dim: int, element_bytes: int, aligned: bool = True) -> Tiles:
    """16 KiB of keys at a time, so that several programs fit, and no more than a warp group multiplies at once.

    Keys that are not `aligned` are stored to shared memory by hand, and the weights later in their place. Of 64 positions Hopper's
    second product would read them there, but ptxas 12.8 (in Triton 3.6 and 3.7) loses the address that both have. Half as many
    positions are multiplied from registers first.
    """
    depth = max(16, triton.next_power_of_2(dim))
    positions = max(16, min(64 if aligned else 32, (1 << 14) // (depth * element_bytes)))
    return Tiles(positions, max(16, triton.next_power_of_2(group)), depth, 8 if depth * element_bytes >= 1024 else 4, 2)


def splits_for(programs: int, positions: int, processors: int) -> int:
    """Among how many programs a row's positions are divided, where rows and heads alone leave a GPU short of work."""
    wanted = PROGRAMS_AT_ONCE * processors // max(1, programs)
    return max(1, min(wanted, positions // LEAST_POSITIONS, MOST_SPLITS))


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    *,
    scale: float,
    softcap: float | None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    prefix_row: Tensor | None = None,
    length: Tensor | None = None,
    sharers: Tensor | None = None,
    bad: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """One launch, two where positions are split, three with sharers, which depends on shapes alone: a CUDA graph can hold them.

    sharers: `prefix_attention.sharers_of` prefix_row: read each prefix once for its rows; None: each row reads it.
    bad: int32 [1], lowered to the number of a row whose scores are no numbers; None: nobody looks.
    tiles: how the rows' own pass is launched; None: as `tiles_for` says.
    """
    query, key, value = (_within_heads(x) for x in (query, key, value))
    (rows, heads, dim), (kv_heads, positions) = query.shape, key.shape[1:3]
    prefix_positions = 0
    if prefix_key is not None:
        prefix_key, prefix_value = _within_heads(prefix_key), _within_heads(prefix_value)
        prefix_positions = prefix_key.shape[2]
    out = torch.empty(rows, heads, dim, dtype=query.dtype, device=query.device)
    if rows == 0:
        return out
    processors = device_of(query)[1]
    if sharers is None:
        shared, splits = 0, splits_for(rows * kv_heads, prefix_positions + positions, processors)
    else:
        shared = prefix_attention.splits_for(
            rows, len(prefix_key), sharers.shape[1], kv_heads, prefix_positions, processors
        )
        splits = splits_for(rows * kv_heads, positions, processors)
    parts = shared + splits
    totals, tops, masses = out, None, None
    if parts > 1:
        new = partial(torch.empty, dtype=torch.float32, device=query.device)
        totals, tops, masses = new(rows, heads, parts, dim), new(rows, heads, parts), new(rows, heads, parts)
    if sharers is not None:
        prefix_attention.attend_prefix(
            query,
            prefix_key,
            prefix_value,
            prefix_row,
            first,
            sharers,
            scale,
            softcap,
            shared,
            totals,
            tops,
            masses,
        )
        prefix_key = prefix_value = prefix_row = None
    aligned = _aligned(key, value, prefix_key, prefix_value)
    tiles = tiles or tiles_for(heads // kv_heads, dim, query.element_size(), aligned)
    attend_kernel[(rows * kv_heads * splits,)](
        query,
        *query.stride()[:2],
        key,
        *key.stride()[:3],
        value,
        *value.stride()[:3],
        prefix_key,
        *([0] * 3 if prefix_key is None else prefix_key.stride()[:3]),
        prefix_value,
        *([0] * 3 if prefix_value is None else prefix_value.stride()[:3]),
        None if prefix_row is None else prefix_row.contiguous(),
        first.contiguous(),
        None if length is None else length.contiguous(),
        positions,
        prefix_positions,
        kv_heads,
        scale,
        softcap,
        *(x if x is None else x[:, :, shared:] for x in (totals, tops, masses)),
        bad,
        parts,
        GROUP=heads // kv_heads,
        DIM=dim,
        SPLITS=splits,
        PRECISION=dot_precision(),
        ALIGNED=aligned,
        **tiles._asdict(),
    )
    if parts > 1:
        join_kernel[(rows * heads,)](
            totals,
            tops,
            masses,
            parts,
            heads,
            out,
            bad,
            DIM=dim,
            SPLITS=triton.next_power_of_2(parts),
            DEPTH=tiles.DEPTH,
            num_warps=4,
        )
    return out


def _aligned(*caches: Tensor | None) -> bool:
    """Whether a kernel that Triton compiles for their strides and addresses copies whole vectors of them."""
    strided = (x for x in caches if x is not None)
    return all(n % 16 == 0 for x in strided for n in (*x.stride()[:3], x.shape[3], x.data_ptr()))


def _within_heads(x: Tensor) -> Tensor:
    """`x`, copied only if the dimensions of a head are not neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def variants(capability: int) -> list[Variant]:
    """With a shared prefix and lengths that are read on the device, as sampling wants them, and with none of the two; of keys that
    no vector fits; of the rows' own positions alone, where the prefix is read at once."""
    llama = ATTENTIONS[-1]
    listed = [_attend_variant(shape, "bf16") for shape in ATTENTIONS]
    listed += [_attend_variant(llama, "fp16"), _attend_variant(llama, "fp32"), _attend_variant(llama, "bf16", splits=8)]
    listed.append(_attend_variant(llama, "bf16", plain=True))
    listed.append(_attend_variant(llama, "bf16", aligned=False))
    listed.append(_attend_variant(llama, "bf16", alone=True))
    listed.append(_join_variant(llama, "bf16", splits=8))
    return listed


def _attend_variant(
    shape: Attention, dtype: str, splits: int = 1, plain: bool = False, alone: bool = False, aligned: bool = True
) -> Variant:
    tiles = tiles_for(shape.heads // shape.kv_heads, shape.dim, 4 if dtype == "fp32" else 2, aligned)
    tensors = ("query", "key", "value", "prefix_key", "prefix_value")
    strides = ["query_row_stride", "query_head_stride"]
    strides += [f"{name}_{of}stride" for name in tensors[1:] for of in ("row_", "head_", "")]
    signature = dict.fromkeys(tensors, "*" + dtype) | dict.fromkeys(strides, "i32")
    signature |= dict.fromkeys(("prefix_row", "first", "length"), "*i64")
    signature |= dict.fromkeys(("positions", "prefix_positions", "heads", "parts"), "i32") | {"scale": "fp32"}
    constants = {"GROUP": shape.heads // shape.kv_heads, "DIM": shape.dim, "SPLITS": splits, "PRECISION": "ieee"}
    constants["ALIGNED"] = aligned
    constants |= {"POSITIONS": tiles.POSITIONS, "HEADS": tiles.HEADS, "DEPTH": tiles.DEPTH}
    in_parts = splits > 1 or alone
    signature["out"] = "*fp32" if in_parts else "*" + dtype
    optional = dict.fromkeys(("tops", "masses"), "*fp32" if in_parts else None)
    optional |= {"bad": "*i32", "softcap": "fp32"} if plain else dict.fromkeys(("bad", "softcap"))
    if plain or alone:
        optional |= dict.fromkeys(("prefix_key", "prefix_value", "prefix_row"))
    if plain:
        optional |= {"length": None}
    name = f"{shape.model}, {dtype}" + (f", {splits} splits" if splits > 1 else "")
    name += ", soft-capped" * plain + ", beside a prefix" * alone + ", keys that no vector fits" * (not aligned)
    return Variant(
        name=name,
        kernel=attend_kernel,
        signature=present({**signature, **optional}),
        constants=constants | absent({**signature, **optional}),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        matmul=True,
        aligned=tuple(name for name in (*tensors, *strides, "out") if name not in optional) if aligned else ("out",),
    )


def _join_variant(shape: Attention, dtype: str, splits: int) -> Variant:
    return Variant(
        name=f"join {splits} splits, {shape.model}, {dtype}",
        kernel=join_kernel,
        signature=dict.fromkeys(("totals", "tops", "masses"), "*fp32")
        | {"splits": "i32", "heads": "i32", "out": "*" + dtype},
        constants={"bad": None, "DIM": shape.dim, "SPLITS": triton.next_power_of_2(splits)}
        | {"DEPTH": max(16, triton.next_power_of_2(shape.dim))},
        num_warps=4,
        num_stages=3,
        aligned=("totals", "tops", "masses", "out"),
    )
