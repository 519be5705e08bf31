"""Inputs of the linear ops, and what float64 and torch make of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IGNORED = -100


def make(rows=9, size=19, vocab=83, dtype=torch.float32, bias=True, ignored=True):
    """hidden, weight, bias and target."""
    hidden = torch.randn(rows, size, device=DEVICE).to(dtype)
    weight = (torch.randn(vocab, size, device=DEVICE) * size**-0.5).to(dtype)
    b = torch.randn(vocab, device=DEVICE).to(dtype) if bias else None
    target = torch.randint(0, vocab, (rows,), device=DEVICE)
    if ignored:
        target[::5] = IGNORED
    return hidden, weight, b, target


def by_torch(dtype, hidden, weight, bias, target, upstream, softcap, logit_scale, temperature=1.0):
    """log-probabilities and the gradients of sum(upstream * logprob), products in `dtype` and the rest at least float32."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    wide = torch.promote_types(dtype, torch.float32)
    z = logit_scale * F.linear(*leaves).to(wide)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logprob = -F.cross_entropy(z / temperature, target, reduction="none", ignore_index=IGNORED)
    (upstream.to(wide) * logprob).sum().backward()
    return logprob.detach(), *(None if t is None else t.grad for t in leaves)


def assert_as_good_as_torch(got: tuple[Tensor | None, ...], **case) -> None:
    """(logprob, d_hidden, d_weight, d_bias): errors of at most twice those of torch in the dtype of hidden, and rounding."""
    exact = by_torch(torch.float64, **case)
    usual = by_torch(case["hidden"].dtype, **case)
    for name, mine, torchs, want in zip(("logprob", "hidden", "weight", "bias"), got, usual, exact, strict=True):
        assert (mine is None) == (want is None), name
        if want is not None:
            assert mine.shape == want.shape and mine.dtype == torchs.dtype, name
            error, most = ((t.double() - want).abs().max() for t in (mine, torchs))
            # float32 sums in another order differ by a few units; in 16 bits the result's own rounding is the larger.
            units = 4 if mine.dtype == torch.float32 else 1
            rounding = units * torch.finfo(mine.dtype).eps * want.abs().max()
            assert error <= 2 * most + rounding, (
                f"{name}: error {error:.3g}, torch's {most:.3g}, rounding {rounding:.3g}"
            )
