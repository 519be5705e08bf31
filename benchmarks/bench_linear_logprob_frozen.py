"""Per-token log-probabilities under a head that gets no gradient, as adapters leave it: forward and backward."""

from __future__ import annotations

import torch

from benchmarks.bench_linear_logprob import LinearLogprobBench
from benchmarks.shapes import LABEL_ROWS, LLAMA_1B, MANY_LABEL_ROWS, SMOLLM2_135M

BENCHES = [
    LinearLogprobBench(rows, head, dtype, frozen=True)
    for dtype in (torch.float32, torch.bfloat16)
    for rows, head in ((LABEL_ROWS, SMOLLM2_135M), (LABEL_ROWS, LLAMA_1B), (MANY_LABEL_ROWS, SMOLLM2_135M))
]
