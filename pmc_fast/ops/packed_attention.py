"""`packed_attention`: causal attention within sequences end to end, which may share their beginning."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pmc_fast import backend
from pmc_fast.errors import described
from pmc_fast.ops import _autograd, _checks
from pmc_fast.ops._autocast import outside_autocast


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """Causal attention within each sequence of a packed batch, whose sequences may begin with tokens that are held once.

    Equivalent, for each sequence's own tokens, to ``scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale,
    enable_gqa=True)`` where q are its queries, k and v the keys and values of the shared beginning and its own, [1, heads,
    tokens, D] each, and ``mask = (ahead >= 0) & (ahead < window)`` with ``ahead = arange(shared, shared + own)[:, None] -
    arange(shared + own)``; each score passed through ``softcap * tanh(score / softcap)`` first where softcap is given. Tokens
    of the shared beginning see those of it alone.

    Differentiable once, in reverse mode, in query, key and value; the backward pass computes the scores again, so that no
    matrix of scores is kept. The shared beginning's gradient is the sum over all sequences. Gradients of its gradients and
    forward-mode derivatives are refused.

    Args:
        query: float32, bfloat16 or float16 [T, H, D] (float64 for the reference).
        key: [T, K, D], dtype of query; K divides H, and head h uses the keys of head h * K // H.
        value: [T, K, D], dtype of query.
        lengths: list or tuple of integers of at least 0, T together: tokens of the shared beginning (0 if there is none),
            then of each sequence beyond it.
        scale: multiplies the scores; None is D ** -0.5.
        softcap: bounds the scores smoothly (Gemma 2), or None.
        window: how many positions a token sees at most, its own included, or None.
        impl: None, "reference" or "native".

    Returns:
        [T, H, D], dtype of query. NaN in what a token sees makes its row NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or range.
        RuntimeError: a derivative that it does not have.
        BackendUnavailable: the implementation named cannot run.

    Source: Vaswani et al., arXiv 1706.03762, equation 1; the blocks and the backward pass: Dao, arXiv 2307.08691.
    """
    _checks.tensor("query", query)
    if query.dim() != 3 or query.shape[1] == 0 or query.shape[2] == 0:
        raise ValueError(f"query: got shape {list(query.shape)}, expected [T, H, D] with H and D at least 1")
    if query.dtype not in _checks.FLOATING:
        raise TypeError(f"query: got dtype {query.dtype}, expected float32, bfloat16, float16 or float64")
    tokens, heads, dim = query.shape
    for name, x in (("key", key), ("value", value)):
        _checks.tensor(name, x)
        if x.dim() != 3 or x.shape[0] != tokens or x.shape[2] != dim:
            raise ValueError(f"{name}: got shape {list(x.shape)}, expected [{tokens}, K, {dim}] to match query")
        if x.dtype != query.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {query.dtype}, that of query")
        if x.device != query.device:
            raise ValueError(f"{name}: got device {x.device}, expected {query.device}, that of query")
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"key: got {key.shape[1]} heads, expected a divisor of the {heads} heads of query")
    if value.shape[1] != key.shape[1]:
        raise ValueError(f"value: got {value.shape[1]} heads, expected {key.shape[1]}, those of key")
    _lengths(lengths, tokens)
    scale = dim**-0.5 if scale is None else scale
    _checks.scale(scale)
    _checks.soft_cap(softcap)
    if window is not None:
        _checks.integer("window", window, "None or an integer in [1, 2^63)", 1)
    backend.check(impl)
    out, _ = _differentiable(query, key, value, list(lengths), scale, softcap, window, impl)
    return out


def _lengths(lengths: Sequence[int], tokens: int) -> None:
    wanted = f"a list or tuple of integers of at least 0, the {tokens} tokens of query together"
    if not isinstance(lengths, list | tuple):
        raise TypeError(f"lengths: got {described(lengths)}, expected {wanted}")
    for length in lengths:
        _checks.number("lengths", length, wanted, _checks.INTEGERS)
    if len(lengths) == 0 or min(lengths) < 0 or sum(lengths) != tokens:
        raise ValueError(f"lengths: got {list(lengths)}, expected {wanted}")


@torch.library.custom_op("pmc_fast::packed_attention", mutates_args=())
@outside_autocast
def _packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    scale: float,
    softcap: float | None,
    window: int | None,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """Also float32 [T, H]: whatever the implementation's backward pass wants to find again."""
    name = backend.choose("packed_attention", impl, query.device.type, query.dtype)
    options = {"scale": scale, "softcap": softcap, "window": window}
    out, log_mass = backend.load("packed_attention", name)(query, key, value, lengths, **options)
    return out, query.new_zeros(query.shape[:2], dtype=torch.float32) if log_mass is None else log_mass


@_packed_attention.register_fake
def _(query, *args):
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.custom_op("pmc_fast::packed_attention_backward", mutates_args=())
@outside_autocast
def _packed_attention_backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_mass: Tensor,
    lengths: Sequence[int],
    scale: float,
    softcap: float | None,
    window: int | None,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    name = backend.choose("packed_attention", impl, query.device.type, query.dtype)
    options = {"scale": scale, "softcap": softcap, "window": window}
    return backend.load("packed_attention", name, "packed_attention_backward")(
        upstream, query, key, value, out, log_mass, lengths, **options
    )


@_packed_attention_backward.register_fake
def _(upstream, query, key, value, *args):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


_backward_once = _autograd.not_differentiable(
    _packed_attention_backward, "packed_attention", _autograd.only_once("packed_attention")
)


def _save(ctx, inputs, output):
    query, key, value, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.set_materialize_grads(False)  # the second output has none


def _backward(ctx, upstream, _unused):
    if upstream is None:
        return (None,) * (3 + len(ctx.options))
    return *_backward_once(upstream, *ctx.saved_tensors, *ctx.options), *[None] * len(ctx.options)


_differentiable = _autograd.differentiable(_packed_attention, "packed_attention", _save, _backward)
