"""`collapse_loss`: the weighted negative log-likelihood and its gradients in one pass."""

from typing import NamedTuple

import torch
from torch import Tensor

from pmc_fast import backend
from pmc_fast.ops import _autograd, _checks
from pmc_fast.ops._autocast import outside_autocast
from pmc_fast.ops.linear_logprob import empty_gradients, filled


class CollapseLoss(NamedTuple):
    """loss: float32 scalar, differentiable. token_nll: float32 [N], nats, for reporting: it carries no gradient."""

    loss: Tensor
    token_nll: Tensor


def collapse_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
    impl: str | None = None,
) -> CollapseLoss:
    """Weighted sum of the targets' negative log-likelihoods, with its gradients computed in the forward pass.

    Equivalent to ``nll = torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")`` and
    ``loss = (token_weight * nll).sum()`` where ``logits = logit_scale * (hidden @ weight.T + bias)``, each passed
    through ``softcap * tanh(logit / softcap)`` where softcap is given. PMC's two-part loss in one call: weights
    1 / N_c for collapse tokens and lambda / N_r for retain tokens.

    The weights are known up front, so no logits are kept or computed twice; a frozen weight or hidden state is left
    out of the work. Upstream gradients multiply the result in the backward pass.

    Differentiable once, in reverse mode, in hidden, weight, bias and token_weight: gradients of its gradients and
    forward-mode derivatives are refused.

    Args:
        hidden: float32, bfloat16 or float16 [N, D] (float64 for the reference).
        weight: the head, [V, D], dtype of hidden.
        target: int64 [N], token ids in [0, V) or ignore_index. Ignored rows cost nothing.
        token_weight: float32 (float64 if hidden is) [N]; a row of weight 0 is scored and costs no work for
            gradients (on a GPU it stays in their products: leaving it out would take a wait).
        bias: [V], dtype of hidden, or None.
        softcap: bounds the logits smoothly (Gemma), or None.
        logit_scale: multiplies the logits (Cohere; Granite's divisor inverted).
        ignore_index: the target that marks a row to leave out; None promises that there is none, and spares a GPU the wait
            to find them.
        impl: None, "reference", "native" or "triton".

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or range; weights or logits that are not finite.
        RuntimeError: a derivative that it does not have.
        BackendUnavailable: the implementation named cannot run.

    Source: arXiv 2507.04219, equation 1.
    """
    _checks.head(hidden, weight, bias, softcap, logit_scale)
    _checks.vector("target", target, hidden.shape[0], torch.int64, hidden)
    _checks.ignored(ignore_index)
    backend.check(impl)
    _checks.vector(
        "token_weight", token_weight, hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32), hidden
    )
    grads, transform = torch.is_grad_enabled(), _autograd.in_transform()  # within one, requires_grad may be hidden
    needs = [grads and t is not None and (transform or t.requires_grad) for t in (hidden, weight, bias)]
    # A 0 made of the inputs, for `_autograd.once`: to save them would keep them in memory until the backward pass.
    of = [x for x in (hidden, weight, token_weight, bias) if x is not None and x.requires_grad]
    behind = sum(x[:0].sum() for x in of) if of and grads and not transform else None
    loss, token_nll, *_ = _differentiable(
        hidden, weight, target, token_weight, bias, behind, softcap, logit_scale, ignore_index, needs, impl
    )
    return CollapseLoss(loss, token_nll.detach())


@torch.library.custom_op("pmc_fast::collapse_loss", mutates_args=())
@outside_autocast
def _collapse_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    bias: Tensor | None,
    behind: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int | None,
    needs: list[bool],
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    name = backend.choose("collapse_loss", impl, hidden.device.type, hidden.dtype)
    _checks.targets(target, weight.shape[0], ignore_index)
    _checks.finite("token_weight", token_weight)
    loss, token_nll, *gradients = backend.load("collapse_loss", name)(
        hidden,
        weight,
        target,
        token_weight,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        needs=tuple(needs),
    )
    return loss, token_nll, *filled(gradients, hidden)


@_collapse_loss.register_fake
def _(hidden, weight, target, token_weight, bias, behind, softcap, logit_scale, ignore_index, needs, impl):
    return (
        token_weight.new_empty(()),
        torch.empty_like(token_weight),
        *empty_gradients(hidden, weight, bias, needs),
    )


def _save(ctx, inputs, output):
    _, token_nll, *gradients = output
    ctx.needs, ctx.count = inputs[9], len(inputs)
    ctx.save_for_backward(token_nll, *gradients, inputs[5])
    ctx.set_materialize_grads(False)  # or backward would fill zeros the size of the head for outputs that nobody sees


def _scale_in_place(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Costs nothing after loss.backward(), whose `upstream` is 1; on a GPU a kernel looks, since the host would wait."""
    if upstream.device.type == "cpu":
        return gradient if float(upstream) == 1 else gradient.mul_(upstream)
    if backend.why_not("collapse_loss", "triton", upstream.device.type, gradient.dtype) is None:
        return backend.load("collapse_loss", "triton", "scale")(gradient, upstream)
    return gradient.mul_(upstream)


def _scaled_copy(gradient: Tensor, upstream: Tensor) -> Tensor:
    return _scale_in_place(gradient.clone(), upstream)


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """In upstream's dtype: a GPU would round it to that of a float16 gradient, where 65536, a usual scale of losses, is inf."""
    one = upstream.reshape(1)  # torch's vmap over no rows would look into one without dimensions
    return (gradient.to(upstream.dtype) * one).to(gradient.dtype)


def _backward(ctx, upstream, *of_gradients):
    if any(second is not None for second in of_gradients):
        raise RuntimeError(_autograd.only_once("collapse_loss"))
    if upstream is None:
        return (None,) * ctx.count
    token_nll, *saved, _ = ctx.saved_tensors
    # The gradients are scaled in place unless the graph is kept for another backward pass, or is being traced (tracers hand
    # in subclasses of Tensor), transformed or batched: the head's is too large to copy.
    batched = torch._C._functorch.is_legacy_batchedtensor(upstream)  # by torch.autograd.grad(is_grads_batched=True)
    if type(upstream) is not Tensor or _autograd.in_transform() or batched:
        scale = _scaled
    elif torch._C._autograd._get_current_graph_task_keep_graph():
        scale = _scaled_copy
    else:
        scale = _scale_in_place
    d_hidden, d_weight, d_bias = (
        scale(g, upstream) if need else None for g, need in zip(saved, ctx.needs, strict=True)
    )
    d_token_weight = upstream.reshape(1) * token_nll if ctx.needs_input_grad[3] else None
    return d_hidden, d_weight, None, d_token_weight, d_bias, *[None] * (ctx.count - 5)


_differentiable = _autograd.differentiable(_collapse_loss, "collapse_loss", _save, _backward)
