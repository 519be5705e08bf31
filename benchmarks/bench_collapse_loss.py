"""The loss and its gradients: pmc_fast, eager torch cross-entropy, and other fused losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.bench import each_implementation
from benchmarks.head import HeadBench, LabelledInputs
from benchmarks.oracle import HeadGradients, head_gradients
from benchmarks.shapes import LABEL_ROWS, LARGE_HEAD, LARGE_LABEL_ROWS, LLAMA_1B, MANY_LABEL_ROWS, PHI_1_5, SMOLLM2_135M


def ours(x: LabelledInputs, impl: str | None = None) -> torch.Tensor:
    from pmc_fast.ops.collapse_loss import collapse_loss

    token_weight = torch.full((len(x.hidden),), 1 / len(x.hidden), device=x.hidden.device)
    return collapse_loss(x.hidden, x.weight, x.target, token_weight, bias=x.bias, ignore_index=None, impl=impl).loss


def eager(x: LabelledInputs) -> torch.Tensor:
    return F.cross_entropy(F.linear(x.hidden, x.weight, x.bias), x.target)


def eager_float32_logits(x: LabelledInputs) -> torch.Tensor:
    """As transformers' models compute their loss."""
    return F.cross_entropy(F.linear(x.hidden, x.weight, x.bias).float(), x.target)


class CollapseLossBench(HeadBench):
    """Every token's weight is the same: the mean, since that is what all peers can compute."""

    op = "collapse_loss"

    def forwards(self) -> Mapping[str, Callable[[LabelledInputs], torch.Tensor]]:
        runs = {**each_implementation(self.op, ours), self.yardstick: eager}
        if self.dtype != torch.float32:
            runs["torch eager, float32 logits"] = eager_float32_logits
        return runs | peers.mean_losses(eager)

    def upstream(self, generator: torch.Generator) -> torch.Tensor:
        return torch.ones((), device=generator.device)

    def oracle(self, inputs: LabelledInputs) -> tuple[torch.Tensor, HeadGradients]:
        mean = torch.full((self.rows,), 1 / self.rows, dtype=torch.float64, device=inputs.hidden.device)
        gradients = head_gradients(inputs.hidden, inputs.weight, inputs.target, mean, inputs.bias)
        return gradients.nll.mean(), gradients


BENCHES = [
    CollapseLossBench(MANY_LABEL_ROWS, SMOLLM2_135M),
    CollapseLossBench(LABEL_ROWS, LLAMA_1B),
    CollapseLossBench(LABEL_ROWS, PHI_1_5),
    CollapseLossBench(MANY_LABEL_ROWS, SMOLLM2_135M, torch.bfloat16),
    CollapseLossBench(LABEL_ROWS, LLAMA_1B, torch.bfloat16),
    CollapseLossBench(LARGE_LABEL_ROWS, LARGE_HEAD, torch.bfloat16, large=True),
]


def test_collapse_loss(benchmark, contest) -> None:
    contest(benchmark)
