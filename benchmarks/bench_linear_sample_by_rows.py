"""`linear_sample` at the numbers of rows that it is called with: which implementation takes which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.bench import each_implementation, named
from benchmarks.bench_linear_sample import LinearSampleBench
from benchmarks.bench_sample import Settings
from benchmarks.head import HeadInputs
from benchmarks.shapes import LLAMA_3B, SMOLLM2_135M

ROWS = (16, 32, 64, 96, 128, 160, 192, 256)
NOTHING_TRUNCATED = Settings(top_p=1.0)


class LinearSampleByRowsBench(LinearSampleBench):
    """Implementations alone, and the CUDA kernel for Hopper that none of them chooses."""

    def contestants(self) -> Mapping[str, Callable[[HeadInputs], Any]]:
        from pmc_fast.ops.linear_sample import linear_sample

        def ours(x: HeadInputs, impl: str | None = None) -> torch.Tensor:
            return linear_sample(x.hidden, x.weight, bias=x.bias, **self.settings.cuts(), seed=1, impl=impl).token

        return {**each_implementation(self.op, ours), named("hopper"): self._on_hopper}

    def _on_hopper(self, x: HeadInputs) -> torch.Tensor:
        from pmc_fast.cuda.linear_sample import linear_sample_on_hopper

        sequence = torch.arange(len(x.hidden), device=x.hidden.device)
        where = {"sequence": sequence, "position": torch.zeros_like(sequence)}
        head = {"bias": x.bias, "softcap": None, "logit_scale": 1.0, "seed": 1}
        return linear_sample_on_hopper(x.hidden, x.weight, **head, **self.settings.cuts(), **where)[0]


BENCHES = [
    LinearSampleByRowsBench(rows, head, settings, torch.bfloat16)
    for settings in (NOTHING_TRUNCATED, Settings(top_k=50))
    for head in (LLAMA_3B, SMOLLM2_135M)
    for rows in ROWS
]
