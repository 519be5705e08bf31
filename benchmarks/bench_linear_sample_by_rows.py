"""`linear_sample` at the numbers of rows that it is called with: which implementation takes which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.bench import OURS
from benchmarks.bench_linear_sample import LinearSampleBench
from benchmarks.bench_sample import Settings
from benchmarks.head import HeadInputs
from benchmarks.shapes import LLAMA_3B, SMOLLM2_135M

ROWS = (16, 32, 64, 96, 128, 160, 192, 256)
NOTHING_TRUNCATED = Settings(top_p=1.0)


class LinearSampleByRowsBench(LinearSampleBench):
    """Our implementations alone."""

    def contestants(self) -> Mapping[str, Callable[[HeadInputs], Any]]:
        return {name: run for name, run in super().contestants().items() if name.startswith(OURS)}


BENCHES = [
    LinearSampleByRowsBench(rows, head, settings, torch.bfloat16)
    for settings in (NOTHING_TRUNCATED, Settings(top_k=50))
    for head in (LLAMA_3B, SMOLLM2_135M)
    for rows in ROWS
]
