"""What a decoder layer does to its rows between the products, on a GPU: one launch for all that lies between two of them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.kernels.interpreted import rounded
from pmc_fast.kernels.logits import tanh
from pmc_fast.kernels.variant import Variant, absent, present

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
ELEMENTS = 1024  # of an activation, per program
HEADS_AT_ONCE = 8  # that a program rotates


@triton.jit
def normalize_kernel(
    x,  # [rows, size]
    x_stride,
    added,  # [rows, size] or None
    added_stride,
    total,  # [rows, size], which may be x; None if nothing is added
    total_stride,
    weight,  # [size]
    bias,  # [size] or None
    out,  # [rows, size]
    out_stride,
    stats,  # [rows, 2] or None
    size,
    epsilon,
    offset,
    CENTERED: tl.constexpr,
    SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    inside = column < size
    value = tl.load(x + row * x_stride + column, mask=inside, other=0).to(tl.float32)
    if added is not None:
        value += tl.load(added + row * added_stride + column, mask=inside, other=0).to(tl.float32)
        tl.store(total + row * total_stride + column, value, mask=inside)
    mean = 0.0
    if CENTERED:
        mean = tl.sum(value, 0) / size
        value = tl.where(inside, value - mean, 0)
    factor = 1 / tl.sqrt_rn(tl.sum(value * value, 0) / size + epsilon)
    if stats is not None:
        tl.store(stats + 2 * row, mean)
        tl.store(stats + 2 * row + 1, factor)
    value *= factor
    value *= tl.load(weight + column, mask=inside, other=0).to(tl.float32) + offset
    if bias is not None:
        value += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * out_stride + column, rounded(value, out.dtype.element_ty), mask=inside)


def normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    *,
    centered: bool,
    offset: float = 0.0,
    added: Tensor | None = None,
    total: Tensor | None = None,
    out: Tensor,
    stats: Tensor | None = None,
) -> Tensor:
    """out = (x - mean) / sqrt(variance + epsilon) * (weight + offset) + bias over the last dimension, after x += added.

    Args:
        x: [N, D], float32 where something is added; may be out.
        weight, bias: [D].
        centered: whether the mean is taken away: a layer norm, else an RMS norm.
        added: [N, D] or None.
        total: [N, D] float32, where x + added is written; None is x.
        out: [N, D], of any floating dtype.
        stats: float32 [N, 2], contiguous, to which the mean and 1 / sqrt(variance + epsilon) are written, or None.
    """
    rows, size = x.shape
    block = triton.next_power_of_2(size)
    total = x if total is None else total
    normalize_kernel[(rows,)](
        x,
        x.stride(0),
        added,
        0 if added is None else added.stride(0),
        None if added is None else total,
        total.stride(0),
        weight,
        bias,
        out,
        out.stride(0),
        stats,
        size,
        epsilon,
        offset,
        CENTERED=centered,
        SIZE=block,
        num_warps=warps_of(block),
    )
    return out


@triton.jit
def activation_gate(x, ACTIVATION: tl.constexpr):
    """What an activation other than ReLU multiplies x by: a sigmoid."""
    if ACTIVATION == "silu":
        gate = tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        gate = 0.5 * (1 + tl.erf(0.7071067812 * x))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        gate = 0.5 * (1 + tanh(0.7978845608 * (x + 0.044715 * x * x * x)))
    return gate


@triton.jit
def activate_kernel(
    x,  # [rows, size]
    x_stride,
    up,  # [rows, size] or None
    up_stride,
    out,  # [rows, size], which may be x
    out_stride,
    size,
    ACTIVATION: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = column < size
    value = tl.load(x + row * x_stride + column, mask=inside, other=0).to(tl.float32)
    if ACTIVATION == "relu":
        value = tl.where(value <= 0, 0, value)
    else:
        value *= activation_gate(value, ACTIVATION)
    if up is not None:
        value *= tl.load(up + row * up_stride + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * out_stride + column, rounded(value, out.dtype.element_ty), mask=inside)


def activate(x: Tensor, activation: str, up: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """out = activation(x) * up, for [N, D] whose rows may lie apart; activation is one of `ACTIVATIONS`, and out is x if not given."""
    out = x if out is None else out
    rows, size = x.shape
    activate_kernel[(rows, triton.cdiv(size, ELEMENTS))](
        x,
        x.stride(0),
        up,
        0 if up is None else up.stride(0),
        out,
        out.stride(0),
        size,
        ACTIVATION=activation,
        ELEMENTS=ELEMENTS,
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=["keys_row", "keys_head"])
def rotate_kernel(
    query,  # [rows, HEADS, DIM]
    query_row,  # its strides
    query_head,
    key,  # [rows, KV_HEADS, DIM]
    value,
    key_row,  # their strides
    key_head,
    cosine,  # [positions, ROTATED]
    sine,
    position,  # [rows]
    length,  # [rows]
    turned,  # [rows, HEADS * DIM], contiguous
    keys,  # [rows, KV_HEADS, capacity, DIM]
    values,
    keys_row,  # their strides
    keys_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    AT_ONCE: tl.constexpr,  # heads
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether 16 divides all strides and addresses
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    of_query, of_key = head < HEADS, (head >= HEADS) & (head < HEADS + KV_HEADS)
    kv_head = tl.where(of_key, head - HEADS, head - HEADS - KV_HEADS)
    source = tl.where(of_key, key, value) + row * key_row + kv_head * key_head
    source = tl.where(of_query, query + row * query_row + head * query_head, source)
    slot = row * keys_row + kv_head * keys_head.to(tl.int64) + (tl.load(length + row) - 1) * DIM
    target = tl.where(of_key, keys, values) + slot
    target = tl.where(of_query, turned + (row * HEADS + head) * DIM, target)
    if ALIGNED:  # which Triton 3.8 does not see in a choice: it would load element by element
        source, target = tl.multiple_of(source, (16, 16)), tl.multiple_of(target, (16, 16))
    inside = (head < HEADS + 2 * KV_HEADS) & (column < DIM)
    x = tl.load(source + column, mask=inside, other=0).to(tl.float32)
    if ROTATED:
        turns, first = (head < HEADS + KV_HEADS) & (column < ROTATED), column < ROTATED // 2
        other = tl.load(source + tl.where(first, column + ROTATED // 2, column - ROTATED // 2), mask=turns, other=0)
        other = tl.where(first, -other.to(tl.float32), other.to(tl.float32))
        angle = tl.load(position + row) * ROTATED + column
        x *= tl.load(cosine + angle, mask=turns, other=1)
        x += other * tl.load(sine + angle, mask=turns, other=0)
    tl.store(target + column, rounded(x, turned.dtype.element_ty), mask=inside)


def rotate_and_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cosine: Tensor,
    sine: Tensor,
    position: Tensor,
    length: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Rotary position embedding, and one more position of keys and values in the cache; the rotated query [N, H, D].

    Equivalent, for row n with p = position[n], to ``turned[n] = query[n] * cosine[p] + rotate_half(query[n]) * sine[p]`` on
    the first R elements of each head, the same of key in ``keys[n, :, length[n] - 1]``, and value in ``values`` there.

    Args:
        query: [N, H, D], each head contiguous.
        key, value: [N, K, D], dtype of query, each head contiguous, with the same strides.
        cosine, sine: float32, contiguous [positions, R], R even and at most D; 0 turns nothing.
        position: int64 [N].
        length: int64 [N], positions held, the new one included.
        keys, values: [N, K, T, D], dtype of query, each head contiguous, with the same strides.
    """
    rows, heads, dim = query.shape
    kv_heads = key.shape[1]
    turned = query.new_empty(query.shape)
    strides = (*query.stride()[:2], *key.stride()[:2], *keys.stride()[:2], dim)
    aligned = all(n % 16 == 0 for n in (*strides, *(x.data_ptr() for x in (query, key, value, keys, values, turned))))
    rotate_kernel[(rows, triton.cdiv(heads + 2 * kv_heads, HEADS_AT_ONCE))](
        query,
        *query.stride()[:2],
        key,
        value,
        *key.stride()[:2],
        cosine,
        sine,
        position,
        length,
        turned,
        keys,
        values,
        keys.stride(0),
        keys.stride(1),
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        ROTATED=cosine.shape[1],
        AT_ONCE=HEADS_AT_ONCE,
        COLUMNS=triton.next_power_of_2(dim),
        ALIGNED=aligned,
        num_warps=4,
    )
    return turned


def warps_of(block: int) -> int:
    return min(16, max(1, block // 512))


def variants(capability: int) -> list[Variant]:
    """The kernels at the layers of Llama-3.2-3B and Phi-1.5, in training, too; none of them depends on the GPU."""
    listed = []
    for name, size, kind, bias, heads, stats in (
        ("Llama-3.2-3B", 3072, "*bf16", None, False, None),
        ("Phi-1.5", 2048, "*fp16", "*fp16", False, None),
        ("Llama-3.2-3B in training", 3072, "*bf16", None, False, "*fp32"),
        ("Phi-1.5 in training", 2048, "*fp16", "*fp16", False, "*fp32"),
        ("Qwen3's heads in training", 128, "*bf16", None, True, "*fp32"),
    ):
        added, total = (None, None) if heads else (kind, "*fp32")
        optional = {"bias": bias, "added": added, "total": total, "stats": stats}
        signature = {"x": kind if heads else "*fp32", "weight": kind, "out": kind}
        signature |= {"size": "i32", "epsilon": "fp32", "offset": "fp32"}
        signature |= dict.fromkeys(("x_stride", "added_stride", "total_stride", "out_stride"), "i32")
        block = triton.next_power_of_2(size)
        listed.append(
            Variant(
                name=f"normalize, {name}",
                kernel=normalize_kernel,
                signature=signature | present(optional),
                constants=absent(optional) | {"CENTERED": bias is not None, "SIZE": block},
                num_warps=warps_of(block),
                num_stages=3,
                aligned=("x", "weight", "out", "size", "x_stride", "added_stride", "total_stride", "out_stride")
                + tuple(present(optional)),
            )
        )
    for activation, up in ((name, up) for name in ACTIVATIONS for up in ("*bf16", None)):
        listed.append(
            Variant(
                name=f"activate, {activation}{' times up' * (up is not None)}",
                kernel=activate_kernel,
                signature=dict.fromkeys(("x", "out"), "*bf16")
                | dict.fromkeys(("x_stride", "up_stride", "out_stride", "size"), "i32")
                | present({"up": up}),
                constants=absent({"up": up}) | {"ACTIVATION": activation, "ELEMENTS": ELEMENTS},
                num_warps=4,
                num_stages=3,
                aligned=("x", "out", "size", "x_stride", "up_stride", "out_stride") + (("up",) if up else ()),
            )
        )
    for name, heads, kv_heads, dim, rotated in (
        ("Llama-3.2-3B", 24, 8, 128, 128),
        ("Phi-1.5", 32, 32, 64, 32),
        ("OPT-2.7B", 32, 32, 80, 0),
    ):
        strides = ("query_row", "query_head", "key_row", "key_head")
        signature = dict.fromkeys(("query", "key", "value", "turned", "keys", "values"), "*bf16")
        signature |= {"cosine": "*fp32", "sine": "*fp32", "position": "*i64", "length": "*i64"}
        constants = {"HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "ROTATED": rotated}
        listed.append(
            Variant(
                name=f"rotate, {name}",
                kernel=rotate_kernel,
                signature=signature | dict.fromkeys((*strides, "keys_row", "keys_head"), "i32"),
                constants=constants
                | {"AT_ONCE": HEADS_AT_ONCE, "COLUMNS": triton.next_power_of_2(dim), "ALIGNED": True},
                num_warps=4,
                num_stages=3,
                aligned=("query", "key", "value", "turned", "keys", "values", "cosine", "sine", *strides),
            )
        )
    return listed
