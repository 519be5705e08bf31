"""Benches of ops that take a language model's head and have gradients: inputs, runs, judgement."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from benchmarks.bench import Bench, Verdict, judge_errors, relative_error
from benchmarks.measure import Stopwatch
from benchmarks.oracle import HeadGradients
from benchmarks.shapes import Head


class HeadInputs(NamedTuple):
    """hidden [N, D], weight [V, D], bias [V] or None."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


def random_head(
    rows: int, head: Head, dtype: torch.dtype, seed: int, device: torch.device, spread: float
) -> HeadInputs:
    """Standard normal hidden states, and a head under which logits have the standard deviation `spread`."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(rows, head.hidden, generator=generator, device=device)
    weight = torch.randn(head.vocab, head.hidden, generator=generator, device=device).mul_(spread / head.hidden**0.5)
    bias = torch.randn(head.vocab, generator=generator, device=device) if head.bias else None
    return HeadInputs(*(None if x is None else x.to(dtype) for x in (hidden, weight, bias)))


class LabelledInputs(NamedTuple):
    """hidden [N, D], weight [V, D], bias [V] or None; target [N]; upstream float32 [N] or [].

    hidden requires a gradient, and so do weight and bias unless the head is frozen.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor
    upstream: torch.Tensor


class Result(NamedTuple):
    """What the op returned, and the gradients of what requires one."""

    value: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None


def with_gradients(forward: Callable[[LabelledInputs], torch.Tensor]) -> Callable[[LabelledInputs], Result]:
    """Forward and backward; `forward_seconds`, an attribute of what is returned, gets the first part of each call."""

    def run(x: LabelledInputs) -> Result:
        inputs = [t for t in (x.hidden, x.weight, x.bias) if t is not None and t.requires_grad]
        with Stopwatch(x.hidden.device) as watch:
            value = forward(x)
        run.forward_seconds.append(watch.seconds)
        gradients = torch.autograd.grad(value, inputs, x.upstream.to(value.dtype))
        return Result(value.detach(), *gradients, *[None] * (3 - len(gradients)))

    run.forward_seconds = []
    return run


class HeadBench(Bench):
    """`rows` label tokens under `head`, forward and backward; a head that is `frozen` gets no gradient."""

    yardstick = "torch eager"

    def __init__(
        self, rows: int, head: Head, dtype: torch.dtype = torch.float32, large: bool = False, frozen: bool = False
    ) -> None:
        self.rows = rows
        self.head = head
        self.dtype = dtype
        self.large = large
        self.frozen = frozen
        # logits, gradient of hidden, gradient of the head; hidden and head read, their gradients written
        self.flops = (4 if frozen else 6) * rows * head.hidden * head.vocab
        self.moved_bytes = (2 * rows + (1 if frozen else 2) * head.vocab) * head.hidden * dtype.itemsize
        about = (" with bias" if head.bias else "") + (", frozen" if frozen else "")
        self.title = f"{rows} x {head.hidden} x {head.vocab}{about}, forward + backward"

    @abc.abstractmethod
    def forwards(self) -> Mapping[str, Callable[[LabelledInputs], torch.Tensor]]:
        """The forward pass of each contestant."""

    @abc.abstractmethod
    def upstream(self, generator: torch.Generator) -> torch.Tensor:
        """The gradient that reaches the op's value, on the generator's device."""

    @abc.abstractmethod
    def oracle(self, inputs: LabelledInputs) -> tuple[torch.Tensor, HeadGradients]:
        """The op's value and gradients in float64."""

    def contestants(self) -> Mapping[str, Callable[[LabelledInputs], Result]]:
        return {name: with_gradients(forward) for name, forward in self.forwards().items()}

    def make_inputs(self, seed: int, device: torch.device) -> LabelledInputs:
        head = random_head(self.rows, self.head, self.dtype, seed, device, spread=2.0)
        generator = torch.Generator(device).manual_seed(seed + 1)
        target = torch.randint(self.head.vocab, (self.rows,), generator=generator, device=device)
        head.hidden.requires_grad_()
        for part in head[1:]:
            if part is not None:
                part.requires_grad_(not self.frozen)
        return LabelledInputs(*head, target, self.upstream(generator))

    def judge(self, run, result: Result, inputs, oracle: tuple[torch.Tensor, HeadGradients], budget) -> Verdict:
        value, gradients = oracle
        errors = {"value": relative_error(result.value, value)}
        for name in ("hidden", "weight", "bias"):
            if (want := getattr(gradients, name)) is not None and getattr(inputs, name).requires_grad:
                errors[f"d_{name}"] = relative_error(getattr(result, name), want)
        return judge_errors(errors, self.dtype, budget)
