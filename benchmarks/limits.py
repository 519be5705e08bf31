"""What this machine can do at most: copy bandwidth, and the rate of matrix products by dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from benchmarks.measure import Stopwatch
from pmc_fast.fast_linear import linear

_REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """bytes_per_s counts reads and writes; flops_per_s is by dtype's name."""

    bytes_per_s: float
    flops_per_s: dict[str, float]

    def seconds(self, flops: float, moved: float, dtype: str) -> float:
        """The least time for so many operations on `dtype` and so many bytes moved."""
        return max(flops / self.flops_per_s[dtype] if flops else 0.0, moved / self.bytes_per_s)


@torch.no_grad()
def measure_limits(device: torch.device, dtypes: Iterable[torch.dtype]) -> Limits:
    """The best of a few runs of a large copy, and for each dtype of a large product by torch and by `fast_linear.linear`."""
    megabytes = 256 if device.type == "cpu" else 2048
    source = torch.ones(megabytes << 18, device=device)
    copy = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _best(lambda: copy.copy_(source), device)
    size = 2048 if device.type == "cpu" else 8192
    rates = {}
    for dtype in {torch.float32, *dtypes}:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = min(_best(lambda: torch.mm(a, b.T, out=out), device), _best(lambda: linear(a, b), device))  # noqa: B023
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
    if device.type == "cpu":  # what a CPU has no instructions for can be multiplied as float32
        rates = {name: max(rate, rates["float32"]) for name, rate in rates.items()}
    return Limits(bandwidth, rates)


def _best(work: Callable[[], object], device: torch.device) -> float:
    work()
    times = []
    for _ in range(_REPEATS):
        with Stopwatch(device) as watch:
            work()
        times.append(watch.seconds)
    return min(times)
