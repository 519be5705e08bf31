"""Matrix products by torch: float32 sums whatever the dtype of the result, in the pieces that memory allows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def row_major(matrix: Tensor) -> Tensor:
    """`matrix`, copied only if neighbours in a row are not neighbours in memory."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def padded_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for [rows, columns], 16 of whose elements divide its rows' stride: what kernels need for wide loads."""
    return torch.empty(rows, -(-columns // 16) * 16, dtype=dtype, device=device)[:, :columns]


def write_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden @ weight.T + bias, rounded once to the dtype that they share."""
    if bias is None:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.addmm(bias, hidden, weight.T, out=out)


def write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, where out has the dtype of a and b, or float32."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.device.type == "cpu":
        torch.mm(a.float(), b.float(), out=out)  # torch's mixed product is for GPUs
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total is float32."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cpu":
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def even_pieces(count: int, most: int, multiple: int = 1) -> Iterator[slice]:
    """[0, count) in as few pieces of at most `most` as can be, equal up to what makes them multiples of `multiple`."""
    if count == 0:
        return
    size = -(-count // -(-count // most))
    size = min(most, -(-size // multiple) * multiple)
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))
