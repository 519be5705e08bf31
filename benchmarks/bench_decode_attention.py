"""Attention of one new token per row over a cache: pmc_fast against torch's fused attention, as transformers calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.bench import Bench, Verdict, each_implementation, judge_errors, relative_error
from benchmarks.compiled import COMPILED, compiled
from benchmarks.shapes import (
    DECODE_ROWS,
    DECODE_SAMPLES,
    LARGE_DECODE_ROWS,
    LLAMA_3B_HEADS,
    SMOLLM2_HEADS,
    AttentionHeads,
)


class CacheInputs(NamedTuple):
    """query [N, H, D], key and value [N, K, T, D], which are views into a longer cache, first [N].

    `held` is what pmc_fast gets in place of key and value: them, or a prefix that rows share, and a cache that the rows
    are still filling. `sharers` is what `bench_decode_attention_by_prefix` adds.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    first: torch.Tensor
    held: dict[str, torch.Tensor]
    sharers: torch.Tensor | None = None


def ours(x: CacheInputs, impl: str | None = None) -> torch.Tensor:
    from pmc_fast.ops.decode_attention import decode_attention

    return decode_attention(x.query, first=x.first, **x.held, impl=impl)


def seen(x: CacheInputs) -> torch.Tensor:
    """Which positions each row attends to, bool [N, 1, 1, T]."""
    return (torch.arange(x.key.shape[2], device=x.key.device) >= x.first[:, None])[:, None, None]


def grouped(x: CacheInputs) -> torch.Tensor:
    """The queries that share keys as queries of one head, [N, K, H / K, D]."""
    rows, heads, dim = x.query.shape
    return x.query.view(rows, x.key.shape[1], heads // x.key.shape[1], dim)


def sdpa(x: CacheInputs) -> torch.Tensor:
    return F.scaled_dot_product_attention(grouped(x), x.key, x.value, attn_mask=seen(x)).view_as(x.query)


def eager(x: CacheInputs) -> torch.Tensor:
    scores = grouped(x) @ x.key.transpose(2, 3) * x.query.shape[2] ** -0.5
    return (scores.masked_fill(~seen(x), float("-inf")).softmax(-1) @ x.value).view_as(x.query)


class DecodeAttentionBench(Bench):
    """`rows` answers, `length` tokens into the sequence, of which the first `prefix` are held once a prompt; one layer."""

    op = "decode_attention"
    yardstick = "torch eager"

    def __init__(
        self,
        rows: int,
        heads: AttentionHeads,
        length: int,
        dtype: torch.dtype = torch.float32,
        prefix: int = 0,
        large: bool = False,
    ) -> None:
        self.rows, self.heads, self.length, self.dtype, self.large = rows, heads, length, dtype, large
        self.prefix, self.prompts = prefix, max(1, rows // DECODE_SAMPLES)
        self.flops = 4 * rows * heads.queries * length * heads.dim
        positions = rows * (length - prefix) + self.prompts * prefix
        self.moved_bytes = 2 * positions * heads.keys * heads.dim * dtype.itemsize
        self.title = f"{rows} x {heads.queries} heads ({heads.keys} of keys) x {length} x {heads.dim}"
        if prefix:
            self.title += f", {prefix} of them shared"

    def make_inputs(self, seed: int, device: torch.device) -> CacheInputs:
        generator = torch.Generator(device).manual_seed(seed)
        heads, capacity = self.heads, self.length + 64
        query = torch.randn(self.rows, heads.queries, heads.dim, generator=generator, device=device)
        cache = torch.randn(2, self.rows, heads.keys, capacity, heads.dim, generator=generator, device=device)
        cache = cache.to(self.dtype)
        first = torch.randint(0, self.length // 4, (self.rows,), generator=generator, device=device)
        key, value = cache[..., : self.length, :]
        if not self.prefix:
            return CacheInputs(query.to(self.dtype), key, value, first, {"key": key, "value": value})
        prompt = torch.arange(self.rows, device=device) * self.prompts // self.rows
        prompt_first_row = torch.searchsorted(prompt, torch.arange(self.prompts, device=device))
        first = first[prompt_first_row][prompt]  # a prompt's padding
        shared = cache[:, prompt_first_row, :, : self.prefix]
        cache[..., : self.prefix, :] = shared[:, prompt]
        own = cache[..., self.prefix :, :].clone()
        held = {"key": own[0], "value": own[1], "prefix_key": shared[0], "prefix_value": shared[1]}
        held |= {"prefix_row": prompt, "length": torch.full_like(first, self.length - self.prefix)}
        return CacheInputs(query.to(self.dtype), key, value, first, held)

    def contestants(self) -> Mapping[str, Callable[[CacheInputs], Any]]:
        runs = {**each_implementation(self.op, ours), self.yardstick: eager, "torch sdpa": sdpa}
        return {**runs, COMPILED: compiled(eager)}

    def oracle(self, inputs: CacheInputs) -> torch.Tensor:
        return eager(CacheInputs(*(x.double() for x in inputs[:3]), inputs.first, {}))

    def judge(self, run, result: torch.Tensor, inputs, oracle: torch.Tensor, budget) -> Verdict:
        return judge_errors({"out": relative_error(result, oracle)}, self.dtype, budget)


BENCHES = [
    DecodeAttentionBench(DECODE_ROWS, SMOLLM2_HEADS, 100),
    DecodeAttentionBench(DECODE_ROWS, LLAMA_3B_HEADS, 100),
    DecodeAttentionBench(DECODE_ROWS, SMOLLM2_HEADS, 100, torch.bfloat16),
    DecodeAttentionBench(DECODE_ROWS, SMOLLM2_HEADS, 532, prefix=512),
    DecodeAttentionBench(DECODE_ROWS, LLAMA_3B_HEADS, 192, torch.bfloat16, prefix=64),
    DecodeAttentionBench(LARGE_DECODE_ROWS, LLAMA_3B_HEADS, 160, torch.bfloat16, large=True),
    DecodeAttentionBench(LARGE_DECODE_ROWS, LLAMA_3B_HEADS, 192, torch.bfloat16, prefix=64, large=True),
    DecodeAttentionBench(8, LLAMA_3B_HEADS, 8192, torch.bfloat16, large=True),
]


def test_decode_attention(benchmark, contest) -> None:
    contest(benchmark)
