"""Defines `sample`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pmc_fast.philox import gumbel
from pmc_fast.reference.head import check_finite


def sample(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float,
    min_p: float,
    seed: int,
    sequence: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return draw("sample", logits, temperature, top_k, top_p, min_p, seed, sequence, position)


def draw(
    op: str,
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    min_p: float,
    seed: int,
    sequence: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sample` for the op that errors name."""
    logits = logits.float()
    check_finite(op, logits)
    log_probs = logits.double().log_softmax(-1)
    if temperature == 0:
        token = _first_maximum(logits)
        ones = torch.ones_like(log_probs[:, 0])
        return token, _pick(log_probs, token), (0 * ones).float(), ones.float()

    scaled = logits / temperature
    check_finite(op, scaled)
    top = scaled.amax(-1, keepdim=True)
    mass = (scaled.double() - top).exp()
    kept = torch.ones_like(scaled, dtype=torch.bool)
    if top_k is not None or top_p < 1:
        order = scaled.sort(dim=-1, descending=True, stable=True).indices  # ties by lower token id
        keep = torch.ones_like(kept)
        if top_k is not None:
            keep[:, top_k:] = False
        if top_p < 1:
            ranked = mass.gather(1, order) * keep
            keep &= ranked.cumsum(-1) - ranked < top_p * ranked.sum(-1, keepdim=True)
        kept = torch.zeros_like(kept).scatter(1, order, keep)
    if min_p > 0:
        kept &= scaled >= top + torch.tensor(math.log(min_p), dtype=torch.float32)
    kept_mass = (mass * kept).sum(-1)

    noise = gumbel(seed, sequence, position, logits.shape[1])
    token = _first_maximum((scaled + noise).masked_fill(~kept, -math.inf))
    sampling_logprob = _pick(scaled, token) - top[:, 0].double() - kept_mass.log()
    return token, _pick(log_probs, token), sampling_logprob.float(), (kept_mass / mass.sum(-1)).float()


def _first_maximum(values: Tensor) -> Tensor:
    """argmax, the lowest index on ties (torch promises none)."""
    vocab = values.shape[-1]
    index = torch.arange(vocab, device=values.device)
    return torch.where(values == values.amax(-1, keepdim=True), index, vocab).amin(-1)


def _pick(values: Tensor, token: Tensor) -> Tensor:
    return values.gather(1, token[:, None])[:, 0].float()
