"""Draws one token per row of logits: exact, deterministic, without a sort and without waiting for the GPU."""

from __future__ import annotations

from torch import Tensor

from pmc_fast.gpu.gemm import row_major
from pmc_fast.kernels.draw import draw_from_all
from pmc_fast.kernels.logits import Head
from pmc_fast.kernels.sampling import Draws, Sampling
from pmc_fast.kernels.truncate import draw_truncated


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
    """Masses are float32 exponentials summed in a fixed order: the same row gives the same bits in any company."""
    rows, vocab = logits.shape
    sampling = Sampling(temperature, top_k, top_p, min_p, seed, sequence, position)
    draws = Draws.empty(rows, logits.device)
    draw = draw_truncated if sampling.truncates(vocab) else draw_from_all
    draw(row_major(logits), Head(), sampling, draws)
    return draws.checked("sample")
