"""Attention over a packed batch and its gradients: pmc_fast against torch's fused attention, one sequence after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.bench import Bench, Verdict, each_implementation, judge_errors, relative_error
from benchmarks.shapes import LLAMA_3B_HEADS, SMOLLM2_HEADS, AttentionHeads

SHARED = 25  # tokens of a chat template and its system prompt
OWN = (40, 45, 50, 55, 60, 62, 65, 66, 68, 70, 72, 75, 80, 85, 88, 90)  # 16 training sequences beyond that


class PackedInputs(NamedTuple):
    """query [T, H, D], key and value [T, K, D], and the upstream gradient [T, H, D]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    upstream: torch.Tensor


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[int]], torch.Tensor]


def ours(query, key, value, lengths: Sequence[int], impl: str | None = None) -> torch.Tensor:
    from pmc_fast.ops.packed_attention import packed_attention

    return packed_attention(query, key, value, lengths, impl=impl)


def sdpa(query, key, value, lengths: Sequence[int]) -> torch.Tensor:
    """A call for each sequence, with the shared beginning before its keys and values, which are repeated for all heads."""
    groups = query.shape[1] // key.shape[1]
    heads_first = (x.transpose(0, 1)[None] for x in (query, *(x.repeat_interleave(groups, 1) for x in (key, value))))
    (q0, k0, v0), *own = zip(*(x.split(list(lengths), 2) for x in heads_first), strict=True)
    pieces = [F.scaled_dot_product_attention(q0, k0, v0, is_causal=True)] if lengths[0] else []
    for q, k, v in own:
        if lengths[0]:
            k, v = torch.cat([k0, k], 2), torch.cat([v0, v], 2)
        seen = None if q.shape[2] == k.shape[2] else _seen(q.shape[2], k.shape[2], q.device)
        pieces.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None))
    return torch.cat(pieces, 2)[0].transpose(0, 1)


def _seen(tokens: int, keys: int, device: torch.device) -> torch.Tensor:
    return torch.ones(tokens, keys, dtype=torch.bool, device=device).tril(keys - tokens)


class PackedAttentionBench(Bench):
    """One layer's attention in a training step, forward and backward."""

    op = "packed_attention"
    yardstick = "torch sdpa"

    def __init__(
        self,
        lengths: Sequence[int],
        heads: AttentionHeads,
        dtype: torch.dtype = torch.float32,
        large: bool = False,
    ) -> None:
        self.lengths, self.heads, self.dtype, self.large = lengths, heads, dtype, large
        shared, *own = lengths
        scores = shared * (shared + 1) // 2 + sum(n * shared + n * (n + 1) // 2 for n in own)
        self.flops = 14 * scores * heads.queries * heads.dim  # two products forward, five backward
        each = heads.dim * sum(lengths) * dtype.itemsize
        self.moved_bytes = each * (6 * heads.queries + 6 * heads.keys)
        sizes = f"{len(own)} x {min(own)} to {max(own)}" if len(set(own)) > 1 else f"{len(own)} x {own[0]}"
        self.title = f"{sizes} tokens x {heads.queries} heads ({heads.keys} of keys) x {heads.dim}"
        self.title += f", {shared} shared" * (shared > 0) + ", forward + backward"

    def make_inputs(self, seed: int, device: torch.device) -> PackedInputs:
        generator = torch.Generator(device).manual_seed(seed)
        counts = (self.heads.queries, self.heads.keys, self.heads.keys, self.heads.queries)
        shapes = [(sum(self.lengths), count, self.heads.dim) for count in counts]
        *leaves, upstream = (torch.randn(x, generator=generator, device=device).to(self.dtype) for x in shapes)
        return PackedInputs(*(x.requires_grad_() for x in leaves), upstream)

    def contestants(self) -> Mapping[str, Callable[[PackedInputs], Any]]:
        forwards: dict[str, Attend] = {**each_implementation(self.op, ours), self.yardstick: sdpa}
        return {name: partial(self._both, forward) for name, forward in forwards.items()}

    def _both(self, forward: Attend, x: PackedInputs) -> tuple[torch.Tensor, ...]:
        """The output and the gradients of query, key and value."""
        out = forward(*x[:3], self.lengths)
        return out.detach(), *torch.autograd.grad(out, x[:3], x.upstream)

    def oracle(self, inputs: PackedInputs) -> tuple[torch.Tensor, ...]:
        exact = [x.detach().double() for x in inputs]
        return self._both(sdpa, PackedInputs(*(x.requires_grad_() for x in exact[:3]), exact[3]))

    def judge(self, run, result, inputs, oracle, budget) -> Verdict:
        names = ("out", "query", "key", "value")
        errors = {n: relative_error(got, want) for n, got, want in zip(names, result, oracle, strict=True)}
        return judge_errors(errors, self.dtype, budget)


BENCHES = [
    PackedAttentionBench((SHARED, *OWN), SMOLLM2_HEADS),
    PackedAttentionBench((SHARED, *OWN), SMOLLM2_HEADS, torch.bfloat16),
    PackedAttentionBench((SHARED, *OWN), LLAMA_3B_HEADS),
    PackedAttentionBench((0, *(200,) * 16), SMOLLM2_HEADS, large=True),
    PackedAttentionBench((0, 2048), SMOLLM2_HEADS, large=True),
    PackedAttentionBench((0, 2048), SMOLLM2_HEADS, torch.bfloat16, large=True),
]


def test_packed_attention(benchmark, contest) -> None:
    contest(benchmark)
