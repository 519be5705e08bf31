"""`decode_attention` of a micro-batch by the length of its prompts: from which on to read each once for all its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.bench import OURS, CannotRun, named
from benchmarks.bench_decode_attention import CacheInputs, DecodeAttentionBench, eager, ours
from benchmarks.shapes import DECODE_ROWS, LLAMA_3B_HEADS
from pmc_fast import backend

PREFIXES = (64, 256, 1024, 4096)
OWN = 60  # positions of each answer


class DecodeAttentionByPrefixBench(DecodeAttentionBench):
    """Triton's two ways, as a sampler's steps take them: rows that share a prompt are found once for all layers, before."""

    def contestants(self) -> Mapping[str, Callable[[CacheInputs], Any]]:
        ways = {named("each row"): self._attend, named("at once"): partial(self._attend, at_once=True)}
        return {OURS: ours, **ways, self.yardstick: eager}

    def make_inputs(self, seed: int, device: torch.device) -> CacheInputs:
        inputs = super().make_inputs(seed, device)
        if self._reason(inputs):
            return inputs
        from pmc_fast.kernels.prefix_attention import sharers_of

        group = self.heads.queries // self.heads.keys
        return inputs._replace(sharers=sharers_of(inputs.held["prefix_row"], self.prompts, group))

    def _attend(self, x: CacheInputs, at_once: bool = False, **tiles: int) -> torch.Tensor:
        """tiles: what is other than usual of them."""
        if reason := self._reason(x):
            raise CannotRun(reason)
        from pmc_fast.kernels.decode_attention import decode_attention, tiles_for

        options = {"scale": self.heads.dim**-0.5, "softcap": None, "sharers": x.sharers if at_once else None}
        if tiles:
            group = self.heads.queries // self.heads.keys
            options["tiles"] = tiles_for(group, self.heads.dim, self.dtype.itemsize)._replace(**tiles)
        return decode_attention(x.query, first=x.first, **x.held, **options)

    def _reason(self, x: CacheInputs) -> str | None:
        """Why Triton does not run, if so."""
        return backend.why_not(self.op, "triton", x.query.device.type, x.query.dtype)


BENCHES = [
    DecodeAttentionByPrefixBench(DECODE_ROWS, LLAMA_3B_HEADS, prefix + OWN, torch.bfloat16, prefix=prefix)
    for prefix in PREFIXES
]
