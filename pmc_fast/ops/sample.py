"""`sample`: one token per row of logits, drawn exactly from the truncated distribution."""

from typing import NamedTuple

import torch
from torch import Tensor

from pmc_fast import backend
from pmc_fast.ops import _checks
from pmc_fast.ops._autocast import outside_autocast


class Sample(NamedTuple):
    """One drawn token per row; N rows. None of it carries a gradient: for those of log-probabilities use `linear_logprob`.

    token: int64 [N].
    logprob: float32 [N], nats; under the untempered, untruncated distribution.
    sampling_logprob: float32 [N], nats; under the distribution really drawn from. 0 when greedy.
    kept_mass: float32 [N], in (0, 1]; what truncation kept of the tempered distribution. 1 when greedy.
    """

    token: Tensor
    logprob: Tensor
    sampling_logprob: Tensor
    kept_mass: Tensor


@torch.no_grad()
def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    sequence: Tensor | None = None,
    position: Tensor | None = None,
    impl: str | None = None,
) -> Sample:
    """Draw one token per row by temperature, then top-k, top-p and min-p, with noise that belongs to (row, position).

    Equivalent to ``torch.multinomial(kept.softmax(-1), 1)`` where ``kept = (logits / temperature)`` with -inf outside
    the kept set, but reproducible: the token is ``argmax(kept + gumbel(seed, sequence, position))`` (the Gumbel-max
    trick, an exact draw), so it does not depend on the other rows, their order or the implementation.

    No gradients, as of ``multinomial``, whether logits require one or not: neither of the token nor of its log-probabilities.
    For these take ``logits.log_softmax(-1).gather(1, token[:, None])``, or `linear_logprob` of the token.

    Args:
        logits: float32, bfloat16 or float16 [N, V]; -inf marks tokens that must not be drawn.
        temperature: divides the logits; 0 takes the most probable token, the lowest id on ties.
        top_k: keep the k most probable tokens; None keeps all.
        top_p: of those, keep the smallest most-probable set whose mass (of what top-k kept) reaches p, in (0, 1].
        min_p: of those, keep tokens of at least min_p times the largest probability, in [0, 1]. Ties at the edge of
            top-k and top-p are kept by lower token id.
        seed: integer in [0, 2^63).
        sequence: int64 [N] in [0, 2^32), which text each row belongs to; default 0, 1, ..., N - 1.
        position: int64 [N] in [0, 2^32), which token of its text each row draws; default 0.
        impl: None, "reference", "native", "triton" or "cuda".

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or range; a row with NaN or +inf, or only -inf.
        BackendUnavailable: the implementation named cannot run.

    Source: arXiv 2507.04219, section 4 (sampling); Philox noise as in ``pmc_fast.philox.gumbel``.
    """
    _checks.matrix("logits", logits)
    if logits.shape[1] == 0:
        raise ValueError(f"logits: got shape {list(logits.shape)}, expected at least one token")
    _checks.sampling(temperature, top_k, top_p, min_p, seed)
    backend.check(impl)
    _checks.coordinates(sequence, position, logits)
    return Sample(*_sample(logits, temperature, top_k, top_p, min_p, seed, sequence, position, impl))


def coordinates(rows: Tensor, sequence: Tensor | None, position: Tensor | None) -> tuple[Tensor, Tensor]:
    """The noise coordinates of each row, by default its number and 0; reads given ones to check them."""
    if sequence is None:
        sequence = torch.arange(rows.shape[0], device=rows.device)
    else:
        _checks.counters("sequence", sequence)
    if position is None:
        position = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    else:
        _checks.counters("position", position)
    return sequence, position


def preferred(device_type: str, temperature: float, top_k: int | None, top_p: float, min_p: float) -> str | None:
    """The implementation to try first for a draw with these options; None: in the usual order.

    Top-p alone is Triton's where most rows are sure of their token, and CUDA's elsewhere, where Triton takes many times as long;
    the host does not know the rows, so CUDA draws. All other options measured are Triton's. On an H200, in microseconds of the GPU,
    float32 logits that are not in its cache:

    =============  ======  ======  ======  ======  =====  ======  =====  ======  =====  ======
    options          top_p=0.95    "sure" rows*    and min_p**    and top_k=50    none
    -------------  --------------  --------------  -------------  -------------  -------------
    rows           CUDA    Triton  CUDA    Triton  CUDA   Triton  CUDA   Triton  CUDA   Triton
    =============  ======  ======  ======  ======  =====  ======  =====  ======  =====  ======
    160 x 128256      307    1080     281      99    299      81    417     109    190     122
    32 x 128256       130    1640     100      48    119      47    144      84     69      43
    =============  ======  ======  ======  ======  =====  ======  =====  ======  =====  ======

    * seven of eight have a token 10 above all others. ** 0.05.
    """
    by_mass_alone = top_k is None and top_p < 1 and min_p == 0 and temperature > 0
    return "cuda" if device_type == "cuda" and by_mass_alone else None


@torch.library.custom_op("pmc_fast::sample", mutates_args=())
@outside_autocast
def _sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    min_p: float,
    seed: int,
    sequence: Tensor | None,
    position: Tensor | None,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device = logits.device.type
    name = backend.choose("sample", impl, device, logits.dtype, preferred(device, temperature, top_k, top_p, min_p))
    sequence, position = coordinates(logits, sequence, position)
    return backend.load("sample", name)(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        sequence=sequence,
        position=position,
    )


def empty_sample(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a draw for every row looks like to a compiler."""
    count = rows.shape[0]
    token = rows.new_empty(count, dtype=torch.int64)
    logprob, sampling_logprob, kept_mass = (rows.new_empty(count, dtype=torch.float32) for _ in range(3))
    return token, logprob, sampling_logprob, kept_mass


@_sample.register_fake
def _(logits, temperature, top_k, top_p, min_p, seed, sequence, position, impl):
    return empty_sample(logits)
