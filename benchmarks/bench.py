"""What a benchmark of one op is: inputs at a real shape, contestants, and the judge of their results."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

OURS = "pmc_fast"


def named(impl: str) -> str:
    """What the contestant is called that runs one implementation of ours by name."""
    return f"{OURS}, {impl}"


def each_implementation(op: str, ours: Callable[..., Any]) -> dict[str, Callable[[Any], Any]]:
    """`ours(inputs, impl=...)` as it chooses by itself, and with each implementation by name; who cannot run says why."""
    from pmc_fast.backend import IMPLEMENTATIONS

    return {OURS: ours, **{named(impl): partial(ours, impl=impl) for impl in IMPLEMENTATIONS[op]}}


class Wrong(Exception):
    """What was to be timed computes something else than it should."""


class CannotRun(Exception):
    """A contestant refuses: it is not installed, or not made for this device, dtype or argument."""


@dataclass(frozen=True)
class Verdict:
    """Whether a result is right, how that was seen in one phrase, and its errors against float64 by name.

    `right` is None if there is no result; `evidence` then says why.
    """

    right: bool | None
    evidence: str
    errors: Mapping[str, float] = field(default_factory=dict)


class Bench(abc.ABC):
    """One op at one shape and dtype: `op` is the op's name, `title` the size, settings and dtype.

    A contestant is a function of what `make_inputs` returned. `yardstick`, where there is one, names the contestant in
    plain torch whose own errors set the error budget of the others; it is judged first.
    """

    op: str
    title: str
    dtype: torch.dtype | None = None
    yardstick: str | None = None
    flops: int = 0  # that any way of computing it takes
    moved_bytes: int = 0  # that must be read and written at least
    large: bool = False  # beyond a PMC batch; for GPUs

    @abc.abstractmethod
    def make_inputs(self, seed: int, device: torch.device) -> Any:
        """Fresh random inputs."""

    @abc.abstractmethod
    def contestants(self) -> Mapping[str, Callable[[Any], Any]]:
        """Who runs, by name, ours first."""

    def preferred(self, device_type: str) -> str | None:
        """The implementation that pmc_fast tries first for this bench's options."""
        return None

    @abc.abstractmethod
    def oracle(self, inputs: Any) -> Any:
        """What `judge` has to know in float64 about these inputs."""

    @abc.abstractmethod
    def judge(
        self, run: Callable[[Any], Any], result: Any, inputs: Any, oracle: Any, budget: Mapping[str, float] | None
    ) -> Verdict:
        """Say whether `result`, which is `run(inputs)`, is right; `run` may be called on other inputs as well.

        `budget` holds the errors of the yardstick; None when it is the yardstick that is judged.
        """


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `want`, in float64 and a slice at a time; NaN counts as infinite."""
    got, want = got.reshape(-1), want.reshape(-1)
    difference = norm = 0.0
    for g, w in zip(got.split(1 << 24), want.split(1 << 24), strict=True):
        w = w.double()
        difference += float((g.detach().double() - w).square().sum())
        norm += float(w.square().sum())
    error = (difference / norm) ** 0.5 if norm else float(difference > 0)
    return error if error == error else float("inf")


def judge_errors(errors: Mapping[str, float], dtype: torch.dtype, budget: Mapping[str, float] | None) -> Verdict:
    """Right when no error exceeds twice the yardstick's, plus some roundings: to `dtype`, and those of float32 sums.

    "value" has more room, for two reasons: torch's linear_cross_entropy sums a bfloat16 loss in bfloat16, and the
    yardstick's error of a single number may be small by luck. The yardstick itself must be within 32 times the eps of
    `dtype`, or 1e-4.
    """
    eps = torch.finfo(dtype).eps
    right = True
    for name, error in errors.items():
        if budget is None:
            right &= error <= max(1e-4, 32 * eps)
        else:
            rounding = 4 * eps if name == "value" else eps / 2
            right &= error <= 2 * budget[name] + rounding + 8 * torch.finfo(torch.float32).eps
    return Verdict(right, ", ".join(f"{name} {error:.1e}" for name, error in errors.items()), errors)
