"""`linear_logprob`: the log-probability of each target under the output head."""

import torch
from torch import Tensor

from pmc_fast import backend
from pmc_fast.ops import _autograd, _checks
from pmc_fast.ops._autocast import outside_autocast


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    impl: str | None = None,
) -> Tensor:
    """Log-probability of each target token under the output head, without holding the logits of all rows.

    Equivalent to ``(logits / temperature).log_softmax(-1).gather(1, target[:, None])[:, 0]`` where
    ``logits = logit_scale * (hidden @ weight.T + bias)``, each passed through ``softcap * tanh(logit / softcap)`` where
    softcap is given; 0 where the target is ignore_index.

    Differentiable once, in reverse mode, in hidden, weight and bias with any upstream gradient; the backward pass computes
    the logits again. On a CPU, where hidden alone requires a gradient, the forward pass makes it of the logits that it has:
    there, an evaluation is faster within torch.no_grad(). Gradients of its gradients and forward-mode derivatives are refused.

    Args:
        hidden: float32, bfloat16 or float16 [N, D] (float64 for the reference).
        weight: the head, [V, D], dtype of hidden.
        target: int64 [N], token ids in [0, V) or ignore_index. Ignored rows cost nothing.
        bias: [V], dtype of hidden, or None.
        softcap: bounds the logits smoothly (Gemma), or None.
        logit_scale: multiplies the logits (Cohere; Granite's divisor inverted).
        temperature: divides the logits, above 0.
        ignore_index: the target that marks a row to leave out; None promises that there is none, and spares a GPU the wait
            to find them.
        impl: None, "reference", "native" or "triton".

    Returns:
        float32 [N] (float64 for float64 inputs), nats.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or range; logits that are NaN or +inf.
        RuntimeError: a derivative that it does not have.
        BackendUnavailable: the implementation named cannot run.

    Source: arXiv 2507.04219, equation 1 (log p(x|q)).
    """
    _checks.head(hidden, weight, bias, softcap, logit_scale)
    _checks.vector("target", target, hidden.shape[0], torch.int64, hidden)
    _checks.ignored(ignore_index)
    _checks.temperature(temperature, allow_zero=False)
    backend.check(impl)
    options = softcap, logit_scale, temperature, ignore_index, impl
    logprob, _ = _differentiable(hidden, weight, target, bias, _ahead(hidden, weight, bias, impl), *options)
    return logprob


def _ahead(hidden: Tensor, weight: Tensor, bias: Tensor | None, impl: str | None) -> Tensor | None:
    """A 0 made of hidden, for `_autograd.once`, if the forward pass is to make the only gradient there is; else None.

    On a GPU a kernel scores rows whose logits it keeps on the chip, so there a product with the head is nothing less to make.
    """
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    wanted = torch.is_grad_enabled() and hidden.requires_grad and not _autograd.in_transform()  # which may hide a need
    return hidden[:0].sum() if frozen and wanted and hidden.device.type == "cpu" and impl != "triton" else None


@torch.library.custom_op("pmc_fast::linear_logprob", mutates_args=())
@outside_autocast
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ahead: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int | None,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """Also what the backward pass wants to find again.

    Without `ahead` each row's normalizer, float32 [N, 2], whatever the implementation takes for it; else the gradient of
    each row's log-probability for its hidden state, [N, D] in the dtype of the log-probabilities.
    """
    name = backend.choose("linear_logprob", impl, hidden.device.type, hidden.dtype)
    _checks.targets(target, weight.shape[0], ignore_index)
    function = "linear_logprob" if ahead is None else "linear_logprob_ahead"
    logprob, kept = backend.load("linear_logprob", name, function)(
        hidden,
        weight,
        target,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        ignore_index=ignore_index,
    )
    return logprob, hidden.new_zeros(hidden.shape[0], 2, dtype=torch.float32) if kept is None else kept


@_linear_logprob.register_fake
def _(hidden, weight, target, bias, ahead, softcap, logit_scale, temperature, ignore_index, impl):
    count, wide = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    kept = (
        hidden.new_empty(count, 2, dtype=torch.float32) if ahead is None else hidden.new_empty(hidden.shape, dtype=wide)
    )
    return hidden.new_empty(count, dtype=wide), kept


@torch.library.custom_op("pmc_fast::linear_logprob_backward", mutates_args=())
@outside_autocast
def _linear_logprob_backward(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    normalizer: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int | None,
    needs: list[bool],
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    name = backend.choose("linear_logprob", impl, hidden.device.type, hidden.dtype)
    gradients = backend.load("linear_logprob", name, "linear_logprob_backward")(
        upstream,
        hidden,
        weight,
        target,
        normalizer,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        ignore_index=ignore_index,
        needs=tuple(needs),
    )
    return filled(gradients, hidden)


def filled(gradients: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients as an op must return them: an empty tensor stands for one that was not asked for."""
    d_hidden, d_weight, d_bias = (like.new_empty(0) if g is None else g for g in gradients)
    return d_hidden, d_weight, d_bias


def empty_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> tuple:
    """What those gradients look like to a compiler."""
    inputs = (hidden, weight, hidden if bias is None else bias)
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else hidden.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


@_linear_logprob_backward.register_fake
def _(upstream, hidden, weight, target, normalizer, bias, softcap, logit_scale, temperature, ignore_index, needs, impl):
    return empty_gradients(hidden, weight, bias, needs)


_backward_once = _autograd.not_differentiable(
    _linear_logprob_backward, "linear_logprob", _autograd.only_once("linear_logprob")
)


def _save(ctx, inputs, output):
    hidden, weight, target, bias, ahead, *ctx.options = inputs
    _, kept = output
    ctx.dtype, ctx.ahead = hidden.dtype, ahead is not None
    ctx.save_for_backward(*((ahead, target, kept) if ctx.ahead else (hidden, weight, target, kept, bias)))
    ctx.set_materialize_grads(False)  # what is kept has none


def _backward(ctx, upstream, _unused):
    if upstream is None:
        return (None,) * (5 + len(ctx.options))
    *options, impl = ctx.options
    if ctx.ahead:
        _, target, gradient = ctx.saved_tensors
        ignore_index = options[-1]
        if ignore_index is not None:
            upstream = upstream.masked_fill(target == ignore_index, 0)  # where anything may stand, NaN too
        return (upstream[:, None] * gradient).to(ctx.dtype), *[None] * (4 + len(ctx.options))
    hidden, weight, target, normalizer, bias = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    d_hidden, d_weight, d_bias = _backward_once(
        upstream, hidden, weight, target, normalizer, bias, *options, needs, impl
    )
    return (
        d_hidden if needs[0] else None,
        d_weight if needs[1] else None,
        None,
        d_bias if needs[2] else None,
        None,
        *[None] * len(ctx.options),
    )


_differentiable = _autograd.differentiable(_linear_logprob, "linear_logprob", _save, _backward)
