"""Products of the same rows with several weights, at the same time where a CUDA graph is being captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor


def side_by_side(x: Tensor, products: Sequence[Callable[[Tensor], Tensor]]) -> list[Tensor]:
    """[product(x) for product in products]; in a graph they become branches, which fill the chip together.

    One after the other, products of few rows leave most of its multiprocessors idle.
    """
    if x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return [product(x) for product in products]
    here = torch.cuda.current_stream()
    sides = _streams(x.device, len(products) - 1)
    results = []
    for product, side in zip(products[1:], sides, strict=True):
        side.wait_stream(here)
        with torch.cuda.stream(side):
            results.append(product(x))
    first = products[0](x)
    for side in sides:
        here.wait_stream(side)
    return [first, *results]


@cache
def _streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(count)]
