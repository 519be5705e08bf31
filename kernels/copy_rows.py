"""Copies rows of a sampling call's own keys and values onto others: as many, and as much of them, as the device knows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.kernels.variant import Variant

ELEMENTS = 4096  # copied at a time
PROGRAMS = 1024  # about so many share the copies: there are hardly ever many, and often none


@triton.jit(do_not_specialize=["positions"])  # 1 would be a Python number, which has no dtype
def copy_rows_kernel(
    own,  # [planes / HEADS, rows, HEADS, positions, DIM]
    source,  # int64 [copies]
    destination,
    copies,  # int64 [1]
    length,  # int64 [1]
    rows,
    positions,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,  # programs of a plane
    ELEMENTS: tl.constexpr,
):
    plane = (tl.program_id(0) // PARTS).to(tl.int64)
    row_size = HEADS * positions.to(tl.int64) * DIM
    own += plane // HEADS * rows * row_size + plane % HEADS * positions * DIM
    held = (tl.load(length).to(tl.int32) - 1) * DIM
    for copy in range(tl.program_id(0) % PARTS, tl.load(copies).to(tl.int32), PARTS):
        read = own + tl.load(source + copy) * row_size
        written = own + tl.load(destination + copy) * row_size
        for begin in range(0, held, ELEMENTS):
            element = begin + tl.arange(0, ELEMENTS)
            tl.store(written + element, tl.load(read + element, mask=element < held), mask=element < held)


def copy_rows(own: Tensor, source: Tensor, destination: Tensor, copies: Tensor, length: Tensor) -> None:
    """Copy the beginnings of rows onto others', in one launch that depends on shapes alone: a CUDA graph can hold it.

    Equivalent, with c = copies and t = length - 1, to ``own[:, :, destination[:c], :, :t] = own[:, :, source[:c], :, :t]``.

    Args:
        own: contiguous [L, 2, N, K, T, D], keys and values of each layer.
        source, destination: int64, contiguous [at least c]; the first c of destination in [0, N), none of them twice nor
            among those of source.
        copies: int64 [1].
        length: int64 [1], positions held, counting the one that comes next; in [1, T].
    """
    layers, both, rows, heads, positions, dim = own.shape
    planes = layers * both * heads
    parts = triton.cdiv(PROGRAMS, planes)
    copy_rows_kernel[(planes * parts,)](
        own,
        source,
        destination,
        copies,
        length,
        rows,
        positions,
        DIM=dim,
        HEADS=heads,
        PARTS=parts,
        ELEMENTS=ELEMENTS,
        num_warps=4,
    )


def variants(capability: int) -> list[Variant]:
    """The keys and values of Llama-3.2-3B and Phi-1.5."""
    signature = {"own": "*bf16"} | dict.fromkeys(("source", "destination", "copies", "length"), "*i64")
    return [
        Variant(
            name=f"copy rows, {name}",
            kernel=copy_rows_kernel,
            signature=signature | {"rows": "i32", "positions": "i32"},
            constants={"DIM": dim, "HEADS": heads, "ELEMENTS": ELEMENTS}
            | {"PARTS": triton.cdiv(PROGRAMS, 2 * layers * heads)},
            num_warps=4,
            num_stages=3,
            aligned=("own",),
        )
        for name, layers, heads, dim in (("Llama-3.2-3B", 28, 8, 128), ("Phi-1.5", 24, 32, 64))
    ]
