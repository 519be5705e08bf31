"""`linear_logprob` with a head whose vocabulary is shared out among ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pmc_fast.ops import _autograd, _checks
from pmc_fast.ops._autocast import outside_autocast
from pmc_fast.parallel_head.head import check_finite, local_head
from pmc_fast.parallel_head.shards import VocabShards, shards_of
from pmc_fast.reference import head

# Logits that are held at a time, of all rows and a rank's share of the vocabulary.
CHUNK = 2**25


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    shards: VocabShards | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
) -> Tensor:
    """Log-probability of each target token under an output head of which each rank holds a part.

    Equivalent to ``pmc_fast.linear_logprob(hidden, torch.cat(weights of all ranks), target, ...)``; no rank holds logits
    of tokens other than its own. All ranks of the group call it with the same arguments but for weight and bias.

    Differentiable once in hidden, weight and bias, provided that all ranks run the backward pass with the same upstream
    gradient: hidden's gradient is the sum over the ranks, the same on each; weight's and bias's are those of the rank's part.

    Args:
        hidden: float32, bfloat16, float16 or float64 [N, D], the same on every rank.
        weight: this rank's rows of the head, [V_r, D], dtype of hidden; or a DTensor [V, D] sharded on dimension 0.
        target: int64 [N], token ids in [0, V) or ignore_index, the same on every rank.
        shards: which rows these are, ``VocabShards.of(weight, group)``; may be left out for a DTensor.
        bias: this rank's part [V_r], or a DTensor [V] sharded like weight, dtype of hidden; or None.
        softcap, logit_scale, temperature, ignore_index: as in ``pmc_fast.linear_logprob``.

    Returns:
        float32 [N] (float64 for float64 inputs), nats; the same on every rank.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or range; logits that are NaN or +inf, on any rank.

    Source: arXiv 2507.04219, equation 1 (log p(x|q)); Megatron-LM, arXiv 1909.08053, section 3 (parallel embedding).
    """
    options = shards, bias, softcap, logit_scale, temperature, ignore_index
    return score("linear_logprob", hidden, weight, target, *options)


def score(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    shards: VocabShards | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int | None,
) -> Tensor:
    """`linear_logprob` for the op that errors name."""
    shards = shards_of(weight, shards)
    weight, bias = local_head(shards, hidden, weight, bias, softcap, logit_scale)
    _checks.vector("target", target, hidden.shape[0], torch.int64, hidden)
    _checks.ignored(ignore_index)
    _checks.temperature(temperature, allow_zero=False)
    _checks.targets(target, shards.vocab, ignore_index)
    count = len(target)
    rows = torch.arange(len(target), device=target.device)
    if ignore_index is not None:
        rows = rows[target != ignore_index]
        hidden, target = hidden[rows], target[rows]
    picked = _LogProb.apply(op, rows, hidden, weight, bias, target, shards, softcap, logit_scale, temperature)
    return picked if ignore_index is None else picked.new_zeros(count).index_put((rows,), picked)


class _LogProb(torch.autograd.Function):
    """Log-probabilities of targets. The logits of a single chunk are kept; of several, the backward pass makes them again."""

    @staticmethod
    @outside_autocast
    def forward(ctx, op, rows, hidden, weight, bias, target, shards, softcap, logit_scale, temperature):
        mine = (target >= shards.begin) & (target < shards.end)
        local_target = torch.where(mine, target - shards.begin, 0)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits, parts = None, _chunks(hidden, weight)
        local_mass, local_logit = (hidden.new_empty(len(hidden), dtype=wide) for _ in range(2))
        for part in parts:
            logits = head.logits(hidden[part], weight, bias, softcap, logit_scale)
            local_mass[part] = (logits if temperature == 1 else logits / temperature).logsumexp(-1)
            local_logit[part] = logits.gather(1, local_target[part, None])[:, 0] / temperature
        masses, picked = shards.gather(torch.stack([local_mass, torch.where(mine, local_logit, 0)])).unbind(1)
        mass = masses.logsumexp(0)
        check_finite(op, mass, rows)
        kept = logits if len(parts) == 1 and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden, weight, bias, local_target, mine, mass, kept)
        ctx.op = op
        ctx.options = shards, softcap, logit_scale, temperature
        return picked.sum(0) - mass

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, bias, *_ = ctx.saved_tensors
        return _autograd.once(ctx.op, _LogProb._gradients(ctx, upstream), (upstream, hidden, weight, bias))

    @staticmethod
    @torch.no_grad()
    @outside_autocast
    def _gradients(ctx, upstream):
        hidden, weight, bias, local_target, mine, mass, kept = ctx.saved_tensors
        shards, softcap, logit_scale, temperature = ctx.options
        upstream = (upstream / temperature)[:, None]
        needs = ctx.needs_input_grad[2:5]
        d_hidden = torch.zeros_like(hidden, dtype=mass.dtype) if needs[0] else None
        d_weight, d_bias = None, None
        for part in _chunks(hidden, weight):
            logits = head.logits(hidden[part], weight, bias, softcap, logit_scale) if kept is None else kept
            scaled = logits if temperature == 1 else logits / temperature
            grad_logits = (scaled - mass[part, None]).exp_().mul_(-upstream[part])
            grad_logits.scatter_add_(1, local_target[part, None], mine[part, None] * upstream[part])
            hidden_part, weight_part, bias_part = head.gradients(
                grad_logits, logits, hidden[part], weight, softcap, logit_scale, needs
            )
            if needs[0]:
                d_hidden[part] = hidden_part
            d_weight = weight_part if d_weight is None else d_weight.add_(weight_part)
            d_bias = bias_part if d_bias is None else d_bias.add_(bias_part)
        if needs[0]:
            dist.all_reduce(d_hidden, group=shards.group)
        gradients = (
            (torch.zeros_like(x) if g is None else g.to(x.dtype)) if need else None
            for x, g, need in zip((hidden, weight, bias), (d_hidden, d_weight, d_bias), needs, strict=True)
        )
        return None, None, *gradients, *[None] * 5


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK // len(weight))
    return [slice(begin, begin + size) for begin in range(0, len(hidden), size)]
