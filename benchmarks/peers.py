"""Other ways to compute a loss under an output head; each says why where it cannot run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.bench import CannotRun
from benchmarks.compiled import COMPILED, compiled
from benchmarks.head import LabelledInputs

Forward = Callable[[LabelledInputs], torch.Tensor]

CHUNK_ROWS = 256


def mean_losses(eager: Forward) -> dict[str, Forward]:
    """Peers of the mean cross-entropy; `eager` is the one in plain torch."""
    return {
        COMPILED: compiled(eager),
        "chunked torch": chunked,
        "linear_cross_entropy": torch_linear_cross_entropy,
        "liger-kernel": partial(liger, accumulate=None),
        "liger-kernel, float32 sums": partial(liger, accumulate=torch.float32),
        "cut-cross-entropy": partial(cut_cross_entropy, reduction="mean"),
        "quack": quack,
    }


def logprobs(eager: Forward) -> dict[str, Forward]:
    """Peers of the log-probability of each target."""
    return {
        COMPILED: compiled(eager),
        "linear_cross_entropy": lambda x: -torch_linear_cross_entropy(x, reduction="none"),
        "cut-cross-entropy": lambda x: -cut_cross_entropy(x, reduction="none"),
    }


def chunked(x: LabelledInputs) -> torch.Tensor:
    """A few rows at a time, their logits computed again in the backward pass."""

    def part(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor):
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), target, reduction="sum")

    pieces = zip(x.hidden.split(CHUNK_ROWS), x.target.split(CHUNK_ROWS), strict=True)
    losses = [checkpoint(part, hidden, x.weight, x.bias, target, use_reentrant=False) for hidden, target in pieces]
    return torch.stack(losses).sum() / len(x.target)


def torch_linear_cross_entropy(x: LabelledInputs, reduction: str = "mean") -> torch.Tensor:
    """torch's own fused loss, with its default chunks."""
    if not hasattr(F, "linear_cross_entropy"):
        raise CannotRun(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(
        x.hidden, x.weight, x.target, linear_bias=x.bias, reduction=reduction, options=options
    )


def liger(x: LabelledInputs, accumulate: torch.dtype | None) -> torch.Tensor:
    """Triton, with the gradient of the head summed in `accumulate`."""
    _needs_gpu(x)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(accum_dtype=accumulate)(x.weight, x.hidden, x.target, x.bias)


def cut_cross_entropy(x: LabelledInputs, reduction: str) -> torch.Tensor:
    """Triton, without logits in memory."""
    _needs_gpu(x)
    _needs_no_bias(x)
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x.hidden, x.weight, x.target, reduction=reduction)


def quack(x: LabelledInputs) -> torch.Tensor:
    """CuTe DSL, for Hopper and later."""
    _needs_gpu(x)
    _needs_no_bias(x)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x.hidden, x.weight, x.target)


def _needs_gpu(x: LabelledInputs) -> None:
    if x.hidden.device.type != "cuda":
        raise CannotRun("its kernels need a GPU")


def _needs_no_bias(x: LabelledInputs) -> None:
    if x.bias is not None:
        raise CannotRun("it takes no bias")
