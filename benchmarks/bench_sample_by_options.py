"""`sample` with every kind of options: which implementation takes which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.bench_sample import SampleBench, Settings
from benchmarks.compiled import COMPILED
from benchmarks.shapes import DECODE_ROWS, LLAMA_3B, SMOLLM2_135M, Head

ADVANTAGE = 10.0  # of a sure row's token over the others
UNSURE = 8  # every so many rows one is not


class SampleByOptionsBench(SampleBench):
    """Without what takes long to compile. With `sure`, most rows have a token far above the others."""

    def __init__(self, rows: int, head: Head, settings: Settings, sure: bool = False) -> None:
        super().__init__(rows, head, settings)
        self.sure = sure
        self.title += ", sure rows" if sure else ""

    def make_inputs(self, seed: int, device: torch.device) -> torch.Tensor:
        logits = super().make_inputs(seed, device)
        if self.sure:
            generator = torch.Generator(device).manual_seed(seed + 1)
            token = torch.randint(self.head.vocab, (self.rows, 1), generator=generator, device=device)
            sure = torch.arange(self.rows, device=device)[:, None] % UNSURE != 0
            top = logits.amax(dim=1, keepdim=True) + ADVANTAGE
            logits.scatter_(1, token, torch.where(sure, top, logits.gather(1, token)))
        return logits

    def contestants(self) -> Mapping[str, Callable[[torch.Tensor], Any]]:
        return {name: run for name, run in super().contestants().items() if name != COMPILED}


BENCHES = [
    SampleByOptionsBench(rows, head, settings, sure)
    for rows, head in ((DECODE_ROWS, LLAMA_3B), (32, LLAMA_3B), (DECODE_ROWS, SMOLLM2_135M))
    for settings, sure in (
        (Settings(), False),
        (Settings(), True),
        (Settings(min_p=0.05), False),
        (Settings(top_k=50), False),
        (Settings(top_p=1.0, min_p=0.05), False),
        (Settings(top_p=1.0), False),
        (Settings(temperature=0.0, top_p=1.0), False),
    )
]
