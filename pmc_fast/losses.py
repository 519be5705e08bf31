"""Losses of other unlearning methods: each one packed forward pass and one `linear_logprob`, no logits held.

    batch = pack(forget_prompts + retain_prompts, forget_answers + retain_answers, lm.device)
    reference = sequence_logprob(initial_lm, batch)[:4]  # of the 4 forget answers; once, before training
    loss = npo(lm, batch, 4, reference)

The first sequences of a batch are to be forgotten (or preferred, see each loss), all that follow are to be kept: the mean
negative log-likelihood of their tokens is added, times `retain_weight`. In the formulas, s is a sequence's summed
log-probability, p a token's probability, |y| a sequence's number of label tokens; all of the labels only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pmc_fast.errors import described
from pmc_fast.models import LanguageModel, evaluating
from pmc_fast.ops import _checks
from pmc_fast.packing import Packed


@torch.no_grad()
def sequence_logprob(lm: LanguageModel, batch: Packed) -> Tensor:
    """The log-probability of each sequence's labels, without gradients and dropout: what `npo` and `dpo` compare with.

    Equivalent to ``-cross_entropy(logits, labels, reduction="none").sum(-1)`` of each sequence.

    Args:
        lm: usually the model before unlearning; with LoRA, the same model within ``peft_model.disable_adapter()``.
        batch: B sequences.

    Returns:
        float32 (float64 if the model is) [B], nats.

    Raises:
        ValueError, TypeError, UserError: as for `npo`.
    """
    _check_kinds(lm, batch)
    with evaluating(lm.model):
        return _sums(batch, _token_logprob(lm, batch))


def npo(
    lm: LanguageModel, batch: Packed, forget: int, reference: Tensor, *, beta: float = 0.1, retain_weight: float = 1.0
) -> Tensor:
    """Negative preference optimization: DPO with nothing but dispreferred answers.

    Equivalent to ``-2 / beta * logsigmoid(-beta * (s - reference)).mean()`` of the forget sequences.

    Args:
        lm: the model being trained.
        batch: B sequences; the first `forget` are to be forgotten, the others to be kept.
        forget: integer in [1, B].
        reference: float32 (float64 if the model is) [forget], those sequences' `sequence_logprob` under the initial model.
        beta: inverse temperature, above 0.
        retain_weight: multiplies the loss of the kept sequences, at least 0.

    Returns:
        float32 (float64 if the model is) scalar; backward() reaches every parameter that requires a gradient.

    Raises:
        ValueError, TypeError: an argument of the wrong type, shape, range or device, or a token outside of the vocabulary (that
            on a CPU alone: a GPU, which would have to be waited for, ends in a device-side assertion).
        UserError: a sequence is longer than the model has positions.

    Source: Zhang et al., arXiv 2404.05868, equation 3.
    """
    _check(lm, batch, forget, above_0={"beta": beta}, at_least_0={"retain_weight": retain_weight})
    _check_reference(reference, forget, lm)
    logprob = _token_logprob(lm, batch)
    ratio = _sums(batch, logprob)[:forget] - reference
    return -2 / beta * logsigmoid(-beta * ratio).mean() + _kept(batch, logprob, forget, retain_weight)


def simnpo(
    lm: LanguageModel,
    batch: Packed,
    forget: int,
    *,
    beta: float = 2.5,
    gamma: float = 0.0,
    retain_weight: float = 1.0,
) -> Tensor:
    """NPO without a reference model, by the mean log-probability of a token instead of the sum.

    Equivalent to ``-2 / beta * logsigmoid(-beta / |y| * s - gamma).mean()`` of the forget sequences. (The delta of
    open-unlearning is gamma / beta.)

    Args:
        gamma: a margin, in units of the logistic function's argument.
        others, returns and raises: as for `npo`.

    Source: Fan et al., arXiv 2410.07163, the SimNPO loss.
    """
    _check(lm, batch, forget, above_0={"beta": beta}, at_least_0={"retain_weight": retain_weight})
    _checks.number("gamma", gamma, "a finite number")
    if not math.isfinite(gamma):
        raise ValueError(f"gamma: got {gamma}, expected a finite number")
    logprob = _token_logprob(lm, batch)
    mean = (_sums(batch, logprob) / _sums(batch, torch.ones_like(logprob)))[:forget]
    return -2 / beta * logsigmoid(-beta * mean - gamma).mean() + _kept(batch, logprob, forget, retain_weight)


def dpo(
    lm: LanguageModel, batch: Packed, pairs: int, reference: Tensor, *, beta: float = 0.1, retain_weight: float = 1.0
) -> Tensor:
    """Direct preference optimization: to each question an answer to prefer, such as "I don't know", to the one to forget.

    Equivalent to ``-logsigmoid(beta * ((s - reference)[:pairs] - (s - reference)[pairs : 2 * pairs])).mean()``.
    (open-unlearning multiplies this by 2 / beta.)

    Args:
        lm: the model being trained.
        batch: B sequences: first the `pairs` preferred answers, then the `pairs` answers to forget, in the same order of
            questions, then those to be kept.
        pairs: integer in [1, B / 2].
        reference: float32 (float64 if the model is) [2 * pairs], the first 2 * pairs sequences' `sequence_logprob` under the initial model.
        others, returns and raises: as for `npo`.

    Source: Rafailov et al., arXiv 2305.18290, equation 7; for unlearning, Maini et al., arXiv 2401.06121.
    """
    _check(
        lm,
        batch,
        pairs,
        above_0={"beta": beta},
        at_least_0={"retain_weight": retain_weight},
        name="pairs",
        sequences_each=2,
    )
    _check_reference(reference, 2 * pairs, lm)
    logprob = _token_logprob(lm, batch)
    ratio = _sums(batch, logprob)[: 2 * pairs] - reference
    margin = beta * (ratio[:pairs] - ratio[pairs:])
    return -logsigmoid(margin).mean() + _kept(batch, logprob, 2 * pairs, retain_weight)


def grad_diff(lm: LanguageModel, batch: Packed, forget: int, *, retain_weight: float = 1.0) -> Tensor:
    """Gradient difference: gradient ascent on the forget sequences, descent on the kept ones.

    Equivalent to ``log(p).mean()`` of the forget sequences' tokens. Its value has no lower bound.

    Args, returns and raises: as for `npo`.

    Source: Liu et al., arXiv 2203.12817; Maini et al., arXiv 2401.06121, section 4.
    """
    _check(lm, batch, forget, at_least_0={"retain_weight": retain_weight})
    logprob = _token_logprob(lm, batch)
    return _mean(logprob, batch.sequence < forget) + _kept(batch, logprob, forget, retain_weight)


def wga(lm: LanguageModel, batch: Packed, forget: int, *, beta: float = 1.0, retain_weight: float = 1.0) -> Tensor:
    """Weighted gradient ascent: ascent that fades as a token becomes improbable.

    Equivalent to ``(p.detach() ** beta * log(p)).mean()`` of the forget sequences' tokens.

    Args:
        beta: exponent of the weight, at least 0; 0 is `grad_diff`.
        others, returns and raises: as for `npo`.

    Source: Wang et al., arXiv 2502.19301 (its alpha is beta here, as in open-unlearning).
    """
    _check(lm, batch, forget, at_least_0={"beta": beta, "retain_weight": retain_weight})
    return _weighted_ascent(lm, batch, forget, beta, 0.0, retain_weight)


def satimp(
    lm: LanguageModel,
    batch: Packed,
    forget: int,
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
    retain_weight: float = 1.0,
) -> Tensor:
    """Gradient ascent weighted by saturation (tokens still probable) and importance (tokens not certain anyway).

    Equivalent to ``(p.detach() ** beta1 * (1 - p.detach()) ** beta2 * log(p)).mean()`` of the forget sequences' tokens.

    Args:
        beta1, beta2: exponents of the two weights, at least 0.
        others, returns and raises: as for `npo`.

    Source: Yang et al., arXiv 2505.11953, section 5.
    """
    _check(lm, batch, forget, at_least_0={"beta1": beta1, "beta2": beta2, "retain_weight": retain_weight})
    return _weighted_ascent(lm, batch, forget, beta1, beta2, retain_weight)


def idk(lm: LanguageModel, batch: Packed, refusals: int, *, retain_weight: float = 1.0) -> Tensor:
    """Fine-tuning on refusals: the first sequences answer the forget questions with "I don't know" or the like.

    Equivalent to ``-log(p).mean()`` of the refusals' tokens.

    Args:
        refusals: how many of the sequences are that, in [1, B].
        others, returns and raises: as for `npo`.

    Source: Maini et al., arXiv 2401.06121, section 4.
    """
    _check(lm, batch, refusals, at_least_0={"retain_weight": retain_weight}, name="refusals")
    logprob = _token_logprob(lm, batch)
    return -_mean(logprob, batch.sequence < refusals) + _kept(batch, logprob, refusals, retain_weight)


def _token_logprob(lm: LanguageModel, batch: Packed) -> Tensor:
    """The log-probability of each label, [N]."""
    return lm.head.logprob(batch.hidden(lm), batch.target, ignore_index=None)


def _weighted_ascent(
    lm: LanguageModel, batch: Packed, forget: int, beta1: float, beta2: float, retain_weight: float
) -> Tensor:
    logprob = _token_logprob(lm, batch)
    p = logprob.detach().exp().clamp(max=1)  # a certain token's log-probability may round to above 0
    weighted = p**beta1 * (1 - p) ** beta2 * logprob
    return _mean(weighted, batch.sequence < forget) + _kept(batch, logprob, forget, retain_weight)


def _sums(batch: Packed, values: Tensor) -> Tensor:
    """Sums over each sequence's labels, [B]."""
    return values.new_zeros(batch.count).index_add(0, batch.sequence, values)


def _kept(batch: Packed, logprob: Tensor, first: int, weight: float) -> Tensor | float:
    """The weighted mean negative log-likelihood of the tokens from that sequence on; 0 if there are none."""
    return 0.0 if first == batch.count else -weight * _mean(logprob, batch.sequence >= first)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Over some of the labels; a GPU is not waited for to count them."""
    return torch.where(where, values, 0.0).sum() / where.sum()


def _check(
    lm: LanguageModel,
    batch: Packed,
    count: int,
    *,
    above_0: Mapping[str, float] = MappingProxyType({}),
    at_least_0: Mapping[str, float],
    name: str = "forget",
    sequences_each: int = 1,
) -> None:
    _check_kinds(lm, batch)
    most = batch.count // sequences_each
    _checks.number(name, count, "an integer", _checks.INTEGERS)
    if not 1 <= count <= most:
        raise ValueError(f"{name}: got {count}, expected 1 to {most}, since the batch has {batch.count} sequences")
    for option, value in {**above_0, **at_least_0}.items():
        _checks.number(option, value, "a number")
    for option, value in above_0.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{option}: got {value}, expected a finite number above 0")
    for option, value in at_least_0.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{option}: got {value}, expected a finite number of at least 0")


def _check_kinds(lm: LanguageModel, batch: Packed) -> None:
    for name, value, kind, made in (
        ("lm", lm, LanguageModel, "models.LanguageModel(model)"),
        ("batch", batch, Packed, "packing.pack(prompts, answers, lm.device)"),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: got {described(value)}, expected a {kind.__name__}: pmc_fast.{made}")
    if batch.input_ids.device != lm.device:
        raise ValueError(f"batch: got device {batch.input_ids.device}, expected {lm.device}, that of the model")


def _check_reference(reference: Tensor, count: int, lm: LanguageModel) -> None:
    if not isinstance(reference, Tensor):
        raise TypeError(
            f"reference: got {described(reference)}, expected float32 [{count}], the sequence_logprob of the first "
            "sequences under the model before unlearning"
        )
    wide = torch.promote_types(lm.head_module.weight.dtype, torch.float32)
    if reference.shape != (count,) or reference.dtype != wide:
        raise ValueError(
            f"reference: got {reference.dtype} of shape {list(reference.shape)}, expected {str(wide).removeprefix('torch.')} "
            f"[{count}], the sequence_logprob of the first sequences"
        )
    if reference.device != lm.device:
        raise ValueError(f"reference: got device {reference.device}, expected {lm.device}, that of the model")
