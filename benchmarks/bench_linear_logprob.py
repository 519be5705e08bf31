"""Per-token log-probabilities, forward and backward: pmc_fast, eager torch, and other fused losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.bench import each_implementation
from benchmarks.head import HeadBench, LabelledInputs
from benchmarks.oracle import HeadGradients, head_gradients
from benchmarks.shapes import LABEL_ROWS, LARGE_HEAD, LARGE_LABEL_ROWS, LLAMA_1B, SMOLLM2_135M


def ours(x: LabelledInputs, impl: str | None = None) -> torch.Tensor:
    from pmc_fast.ops.linear_logprob import linear_logprob

    return linear_logprob(x.hidden, x.weight, x.target, bias=x.bias, ignore_index=None, impl=impl)


def eager(x: LabelledInputs) -> torch.Tensor:
    return F.linear(x.hidden, x.weight, x.bias).log_softmax(-1).gather(1, x.target[:, None])[:, 0]


class LinearLogprobBench(HeadBench):
    """Every token's upstream gradient is different, as in NPO, DPO and GRPO."""

    op = "linear_logprob"

    def forwards(self) -> Mapping[str, Callable[[LabelledInputs], torch.Tensor]]:
        return {**each_implementation(self.op, ours), self.yardstick: eager, **peers.logprobs(eager)}

    def upstream(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(self.rows, generator=generator, device=generator.device)

    def oracle(self, inputs: LabelledInputs) -> tuple[torch.Tensor, HeadGradients]:
        # a log-probability is a negative log-likelihood turned round, and so is its gradient
        gradients = head_gradients(inputs.hidden, inputs.weight, inputs.target, -inputs.upstream, inputs.bias)
        return -gradients.nll, gradients


BENCHES = [
    LinearLogprobBench(LABEL_ROWS, SMOLLM2_135M),
    LinearLogprobBench(LABEL_ROWS, LLAMA_1B),
    LinearLogprobBench(LABEL_ROWS, SMOLLM2_135M, torch.bfloat16),
    LinearLogprobBench(LARGE_LABEL_ROWS, LARGE_HEAD, torch.bfloat16, large=True),
]


def test_linear_logprob(benchmark, contest) -> None:
    contest(benchmark)
