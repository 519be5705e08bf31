"""What this machine can do at most: copy bandwidth, and the rate of matrix products by dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.measure import Stopwatch, times_as_long
from pmc_fast.fast_linear import linear

PRODUCT, _TOGETHER = "large products", 4  # which take turns with what they limit, so many at once
_REPEATS = 5
_SIZES = {"cpu": 2048, "cuda": 8192}  # of the matrices of a product, by the kind of device


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
    rates = {}
    for dtype in {torch.float32, *dtypes}:
        seconds = min(_best(work, device) for work in _products(device, dtype))
        rates[str(dtype).removeprefix("torch.")] = 2 * _SIZES[device.type] ** 3 / seconds
    if device.type == "cpu":  # what a CPU has no instructions for can be multiplied as float32
        rates = {name: max(rate, rates["float32"]) for name, rate in rates.items()}
    return Limits(bandwidth, rates)


def fastest_product(device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Some of the products whose rate is the limit of this dtype, to be run in turns with what it limits."""
    wide = _products(device, torch.float32) if device.type == "cpu" and dtype != torch.float32 else []
    work = min([*_products(device, dtype), *wide], key=lambda work: _best(work, device))

    def several() -> None:
        for _ in range(_TOGETHER):
            work()

    return several


@dataclass(frozen=True)
class LimitInTurns:
    """The limit of what took turns with `fastest_product`, which took so many seconds in them."""

    limits: Limits
    device: torch.device
    dtype: str
    products: Sequence[float]

    def share(self, flops: float, moved: float, seconds: Sequence[float]) -> float:
        """The least time for so many operations and bytes over what they took, the median over the turns."""
        rates = [_TOGETHER * 2 * _SIZES[self.device.type] ** 3 / product for product in self.products]
        turns = [replace(self.limits, flops_per_s={self.dtype: rate}) for rate in rates]
        return times_as_long([turn.seconds(flops, moved, self.dtype) for turn in turns], seconds)


def _products(device: torch.device, dtype: torch.dtype) -> list[Callable[[], object]]:
    size = _SIZES[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return [torch.no_grad()(work) for work in (lambda: torch.mm(a, b.T, out=out), lambda: linear(a, b))]


def _best(work: Callable[[], object], device: torch.device) -> float:
    work()
    times = []
    for _ in range(_REPEATS):
        with Stopwatch(device) as watch:
            work()
        times.append(watch.seconds)
    return min(times)
