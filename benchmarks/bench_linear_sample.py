"""The head and the draw together: pmc_fast against a linear layer before transformers' processors and multinomial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.bench import Bench, Verdict, each_implementation
from benchmarks.bench_sample import Settings, draw_with_torch_topk, draw_with_transformers, judge_draws
from benchmarks.compiled import COMPILED, compiled
from benchmarks.head import HeadInputs, random_head
from benchmarks.oracle import Truncated, head_logits, truncated
from benchmarks.shapes import DECODE_ROWS, LARGE_DECODE_ROWS, LARGE_HEAD, LLAMA_3B, PHI_1_5, SMOLLM2_135M, Head


class LinearSampleBench(Bench):
    """`rows` hidden states under `head`."""

    op = "linear_sample"

    def __init__(
        self, rows: int, head: Head, settings: Settings, dtype: torch.dtype = torch.float32, large: bool = False
    ) -> None:
        self.rows = rows
        self.head = head
        self.settings = settings
        self.dtype = dtype
        self.large = large
        self.flops = 2 * rows * head.hidden * head.vocab
        self.moved_bytes = (rows + head.vocab) * head.hidden * dtype.itemsize
        bias = " with bias" if head.bias else ""
        self.title = f"{rows} x {head.hidden} x {head.vocab}{bias}, {settings}"

    def make_inputs(self, seed: int, device: torch.device) -> HeadInputs:
        # 4, near a real model's 3.4, with which top-p 0.95 keeps some hundreds of tokens
        return random_head(self.rows, self.head, self.dtype, seed, device, spread=4.0)

    def contestants(self) -> Mapping[str, Callable[[HeadInputs], Any]]:
        from pmc_fast.ops.linear_sample import linear_sample

        def ours(x: HeadInputs, impl: str | None = None) -> torch.Tensor:
            return linear_sample(x.hidden, x.weight, bias=x.bias, **self.settings.cuts(), seed=1, impl=impl).token

        runs = each_implementation(self.op, ours)
        runs["linear + transformers"] = lambda x: draw_with_transformers(F.linear(*x), self.settings)
        runs[COMPILED] = compiled(runs["linear + transformers"])
        if self.settings.top_k is not None:
            runs["linear + torch topk"] = lambda x: draw_with_torch_topk(F.linear(*x), self.settings)
        return runs

    def preferred(self, device_type: str) -> str | None:
        return self.settings.preferred(device_type)

    def oracle(self, inputs: HeadInputs) -> Truncated:
        # the largest logits are about 20: rounded to the dtype, each is off by up to 8 of its eps
        slack = max(1e-4, 16 * torch.finfo(self.dtype).eps)
        return truncated(head_logits(*inputs), **self.settings.cuts(), logit_slack=slack)

    def judge(self, run, result, inputs, oracle, budget) -> Verdict:
        small = Head("small", 997, 64, self.head.bias)
        x = random_head(1, small, self.dtype, 0, inputs.hidden.device, spread=3.0)
        want = self.oracle(x)
        # few enough draws that logits rounded to bfloat16, which is no mistake, stay within their noise
        rows = 8192 if self.dtype == torch.float32 else 1024
        return judge_draws(lambda: run(x._replace(hidden=x.hidden.expand(rows, -1).contiguous())), result, oracle, want)


BENCHES = [
    LinearSampleBench(DECODE_ROWS, SMOLLM2_135M, Settings()),
    LinearSampleBench(DECODE_ROWS, SMOLLM2_135M, Settings(top_k=50)),
    LinearSampleBench(DECODE_ROWS, PHI_1_5, Settings(temperature=1.25, top_k=50)),
    LinearSampleBench(DECODE_ROWS, LLAMA_3B, Settings(top_k=50)),
    LinearSampleBench(DECODE_ROWS, SMOLLM2_135M, Settings(top_k=50), torch.bfloat16),
    LinearSampleBench(LARGE_DECODE_ROWS, LARGE_HEAD, Settings(top_k=50), torch.bfloat16, large=True),
]


def test_linear_sample(benchmark, contest) -> None:
    contest(benchmark)
