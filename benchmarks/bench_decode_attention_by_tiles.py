"""`decode_attention` of a micro-batch in Triton by how much a program takes at once: which tiles serve memory best.

A program of 64 positions and four warps leaves a multiprocessor of Hopper's room for three; smaller ones for up to twelve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.bench import OURS, named
from benchmarks.bench_decode_attention import CacheInputs, eager, ours
from benchmarks.bench_decode_attention_by_prefix import OWN, DecodeAttentionByPrefixBench
from benchmarks.shapes import DECODE_ROWS, LLAMA_3B_HEADS

# Positions at a time, warps, stages: those that spill no register when they are compiled for sm_90.
TILES = (
    (64, 4, 2),
    (64, 2, 2),
    (32, 4, 3),
    (32, 4, 2),
    (32, 2, 2),
    (16, 4, 3),
    (16, 4, 2),
    (16, 2, 3),
    (16, 2, 2),
    (16, 1, 2),
)


class DecodeAttentionByTilesBench(DecodeAttentionByPrefixBench):
    """Each row reads all that it sees, its prompt included."""

    def contestants(self) -> Mapping[str, Callable[[CacheInputs], Any]]:
        ways = {
            named(f"{positions} positions, {warps} warp{'s' * (warps > 1)}, {stages} stages"): partial(
                self._attend, POSITIONS=positions, num_warps=warps, num_stages=stages
            )
            for positions, warps, stages in TILES
        }
        return {OURS: ours, **ways, self.yardstick: eager}


BENCHES = [
    DecodeAttentionByTilesBench(rows, LLAMA_3B_HEADS, prefix + OWN, torch.bfloat16, prefix=prefix)
    for rows, prefix in ((DECODE_ROWS, 64), (DECODE_ROWS, 1024), (96, 64), (48, 64), (16, 64))
]
