"""`linear_sample`: a product by torch into float32 logits, and `sample`'s kernel over them; or both by a kernel for Hopper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmc_fast.cuda import hopper_queue, library
from pmc_fast.cuda.sample import Draw, sample
from pmc_fast.gpu.gemm import even_pieces, padded_rows, write_product
from pmc_fast.phases import phase

SCRATCH_BYTES = 1 << 29  # of logits held at once


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    sequence: Tensor,
    position: Tensor,
    hidden_row: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Logits that several draws are from are multiplied once, if all of them can be held at once."""
    rows, at_once = len(sequence), max(1, SCRATCH_BYTES // (4 * len(weight)))
    if hidden_row is not None:
        # In pieces of hidden rows the host would have to know which draws belong to which.
        if len(hidden) < rows and len(hidden) <= at_once:
            where = {"sequence": sequence, "position": position, "logits_row": hidden_row}
            return _draw_from_products(hidden, weight, **where, **options)
        hidden = hidden[hidden_row]
    drawn = [
        _draw_from_products(hidden[piece], weight, sequence=sequence[piece], position=position[piece], **options)
        for piece in (even_pieces(rows, at_once) if rows else [slice(0, 0)])
    ]
    return drawn[0] if len(drawn) == 1 else tuple(torch.cat(column) for column in zip(*drawn, strict=True))


def _draw_from_products(hidden: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, ...]:
    with phase("head"):
        logits = padded_rows(len(hidden), len(weight), torch.float32, hidden.device)
        write_product(logits, hidden, weight.T)
    with phase("sample"):
        return sample(logits, op="linear_sample", **options)


def linear_sample_on_hopper(
    hidden: Tensor, weight: Tensor, *, sequence: Tensor, position: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """`linear_sample` by csrc/cuda/linear_sample.cu. Not yet run on a GPU, so nothing chooses it: it is to be called by name.

    Args:
        hidden: bfloat16 [N, D], rows at multiples of 16 bytes.
        weight: bfloat16 [V, D], likewise.
        sequence, position: int64 [N].
        options: bias, softcap, logit_scale, temperature, top_k, top_p, min_p and seed, all of them, as the op has them.

    Raises:
        TypeError, ValueError: another dtype; rows elsewhere; shapes or devices that do not fit together.
        BackendUnavailable: the GPU is not Hopper's, or the module was built without sm_90a.
    """
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected [V, {hidden.shape[1]}] to match hidden")
    bias = options["bias"]
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {list(bias.shape)}, expected [{len(weight)}]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {hidden.device}, that of hidden")
    for name, matrix in (("hidden", hidden), ("weight", weight)):
        if matrix.dtype != torch.bfloat16:
            raise TypeError(f"{name}: got dtype {matrix.dtype}, expected torch.bfloat16 for Hopper's kernel")
        stride = _row_stride(matrix)
        if matrix.stride(1) != 1 or stride % 8 or stride < matrix.shape[1] or matrix.data_ptr() % 16:
            raise ValueError(
                f"{name}: got rows {2 * stride} bytes apart from address {matrix.data_ptr():#x} on, elements "
                f"{2 * matrix.stride(1)} apart, expected multiples of 16, no less than a row, and 2"
            )
    where = hopper_queue(hidden)
    rows, most = len(hidden), library().MOST_LINEAR_SAMPLE_ROWS
    drawn = [
        _on_hopper(where, hidden[piece], weight, sequence=sequence[piece], position=position[piece], **options)
        for piece in (even_pieces(rows, most) if rows else [slice(0, 0)])
    ]
    return drawn[0] if len(drawn) == 1 else tuple(torch.cat(column) for column in zip(*drawn, strict=True))


def _on_hopper(where: tuple[int, int], hidden: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Up to 256 rows. Where something is truncated the kernel writes logits, and `sample`'s draws from them."""
    rows, vocab = len(hidden), len(weight)
    draw = Draw(vocab, **options)
    by_rank = options["top_k"] is not None and options["top_k"] < vocab
    truncates = options["temperature"] > 0 and (by_rank or options["top_p"] < 1 or options["min_p"] > 0)
    with phase("head"):
        if truncates:
            scratch = padded_rows(rows, vocab, torch.float32, hidden.device)
            room = scratch.data_ptr(), scratch.stride(0), 0
        else:
            size = library().linear_sample_scratch(*where, rows, vocab)
            scratch = torch.empty(size, dtype=torch.uint8, device=hidden.device)
            room = 0, 0, scratch.data_ptr()
        matrices = [number for m in (hidden, weight) for number in (m.data_ptr(), _row_stride(m))]
        library().linear_sample(*where, *matrices, hidden.shape[1], *room, draw.arguments)
    return draw.checked("linear_sample")


def _row_stride(matrix: Tensor) -> int:
    """Of a single row, whose stride says nothing, one that can be."""
    return matrix.stride(0) if len(matrix) > 1 else -(-matrix.shape[1] // 8) * 8
