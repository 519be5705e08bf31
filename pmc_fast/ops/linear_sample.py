"""`linear_sample`: the output head and `sample` in one op."""

import torch
from torch import Tensor

from pmc_fast import backend
from pmc_fast.ops import _checks
from pmc_fast.ops._autocast import outside_autocast
from pmc_fast.ops.sample import Sample, coordinates, empty_sample, preferred


@torch.no_grad()
def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    sequence: Tensor | None = None,
    position: Tensor | None = None,
    hidden_row: Tensor | None = None,
    impl: str | None = None,
) -> Sample:
    """Draw one token per hidden state from the output head's distribution, holding few logits at a time.

    Equivalent to ``sample(logit_scale * (hidden @ weight.T + bias), ...)``, each logit passed through
    ``softcap * tanh(logit / softcap)`` first where softcap is given. With hidden_row, hidden stands for
    ``hidden[hidden_row]``: many draws from the same distribution, whose logits "native" computes and truncates once, and
    "triton" and "cuda" compute once.

    No gradients, as of ``sample``: for those of a drawn token's log-probability use `linear_logprob`.

    Args:
        hidden: float32, bfloat16 or float16 [N, D]; with hidden_row, [R, D].
        weight: the head, [V, D], dtype of hidden.
        bias: [V], dtype of hidden, or None.
        softcap: bounds the logits smoothly (Gemma), or None.
        logit_scale: multiplies the logits (Cohere; Granite's divisor inverted).
        temperature, top_k, top_p, min_p, seed, sequence, position: as in ``sample``.
        hidden_row: int64 [N] in [0, R), the hidden state that each draw is from, or None.
        impl: None, "reference", "native", "triton" or "cuda".

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or range; logits that are NaN or +inf, by their row
            of hidden ("native") or of ``hidden[hidden_row]``.
        BackendUnavailable: the implementation named cannot run.

    Source: arXiv 2507.04219, section 4 (sampling).
    """
    _checks.head(hidden, weight, bias, softcap, logit_scale)
    _checks.sampling(temperature, top_k, top_p, min_p, seed)
    backend.check(impl)
    if hidden_row is not None:
        _checks.tensor("hidden_row", hidden_row)
        _checks.vector("hidden_row", hidden_row, hidden_row.numel(), torch.int64, hidden)
    _checks.coordinates(sequence, position, hidden if hidden_row is None else hidden_row)
    draw = (temperature, top_k, top_p, min_p, seed, sequence, position, hidden_row)
    return Sample(*_linear_sample(hidden, weight, bias, softcap, logit_scale, *draw, impl))


@torch.library.custom_op("pmc_fast::linear_sample", mutates_args=())
@outside_autocast
def _linear_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    top_k: int | None,
    top_p: float,
    min_p: float,
    seed: int,
    sequence: Tensor | None,
    position: Tensor | None,
    hidden_row: Tensor | None,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device = hidden.device.type
    name = backend.choose(
        "linear_sample", impl, device, hidden.dtype, preferred(device, temperature, top_k, top_p, min_p)
    )
    sequence, position = coordinates(hidden if hidden_row is None else hidden_row, sequence, position)
    shared = {}
    if hidden_row is not None:
        _checks.within("hidden_row", hidden_row, len(hidden))
        if name == "reference":
            hidden = hidden[hidden_row]
        else:
            shared["hidden_row"] = hidden_row
    return backend.load("linear_sample", name)(
        hidden,
        weight,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        sequence=sequence,
        position=position,
        **shared,
    )


@_linear_sample.register_fake
def _(hidden, *args):
    hidden_row = args[-2]
    return empty_sample(hidden if hidden_row is None else hidden_row)
