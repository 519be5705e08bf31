"""`decode_attention`: one query token per row over the row's cached keys and values."""

import torch
from torch import Tensor

from pmc_fast import backend
from pmc_fast.gpu.checks import no_bad_row, report_scores
from pmc_fast.ops import _autograd, _checks
from pmc_fast.ops._autocast import outside_autocast

NO_GRADIENTS = (
    "decode_attention is for inference and has no gradients; call it within torch.no_grad(), or train with "
    "scaled_dot_product_attention"
)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    prefix_row: Tensor | None = None,
    length: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attention of one new token per row, over the keys and values from each row's first position on; for inference only.

    Equivalent to ``scaled_dot_product_attention(query[:, :, None], key, value, attn_mask=mask, scale=scale,
    enable_gqa=True)[:, :, 0]`` with ``mask = (arange(T) >= first[:, None])[:, None, None]``, each score passed through
    ``softcap * tanh(score / softcap)`` first where softcap is given. Heads that share keys and values read them once.
    With a prefix, key and value stand for ``cat([prefix_key[prefix_row], key], 2)`` and likewise: what many rows have in
    common, such as a prompt, is held once. With lengths, ``mask`` also asks for ``arange(T) < length[:, None]``: a cache can
    be given at its full capacity while it is being filled.

    There are no gradients, so tensors that require one are refused but within ``torch.no_grad()``.

    Args:
        query: float32, bfloat16 or float16 [N, H, D] (float64 for the reference).
        key: [N, K, T, D], dtype of query; K divides H, and head h uses the keys of head h * K // H.
        value: [N, K, T, D], dtype of query.
        first: int64 [N] in [0, T), with a prefix in [0, S + T): the positions before it are left out (padding, or
            outside a sliding window). With lengths, below length, or S + length.
        scale: multiplies the scores; None is D ** -0.5.
        softcap: bounds the scores smoothly (Gemma 2), or None.
        prefix_key, prefix_value: [P, K, S, D], dtype of query, or both None.
        prefix_row: int64 [N] in [0, P), the prefix of each row; given exactly if prefix_key is.
        length: int64 [N] in [1, T], how many of its own positions each row holds; the rest of key and value is not
            looked at. None: T.
        impl: None, "reference", "native" or "triton".

    Returns:
        [N, H, D], dtype of query.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or range; scores that are NaN or +inf, or nothing but
            -inf; a tensor that requires a gradient.
        BackendUnavailable: the implementation named cannot run.

    Source: Vaswani et al., arXiv 1706.03762, equation 1.
    """
    _checks.tensor("query", query)
    if query.dim() != 3 or query.shape[2] == 0:
        raise ValueError(f"query: got shape {list(query.shape)}, expected [N, H, D] with D at least 1")
    if query.dtype not in _checks.FLOATING:
        raise TypeError(f"query: got dtype {query.dtype}, expected float32, bfloat16, float16 or float64")
    rows, heads, dim = query.shape
    _positions("", key, value, rows, query)
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"key: got {key.shape[1]} heads, expected a divisor of the {heads} heads of query")
    _checks.vector("first", first, rows, torch.int64, query)
    given = [x is not None for x in (prefix_key, prefix_value, prefix_row)]
    if any(given) and not all(given):
        raise ValueError("prefix_key, prefix_value, prefix_row: got some of them, expected all or none")
    if prefix_key is not None:
        _positions("prefix_", prefix_key, prefix_value, None, query)
        if prefix_key.shape[1] != key.shape[1]:
            raise ValueError(f"prefix_key: got {prefix_key.shape[1]} heads, expected {key.shape[1]}, those of key")
        _checks.vector("prefix_row", prefix_row, rows, torch.int64, query)
    if length is not None:
        _checks.vector("length", length, rows, torch.int64, query)
    scale = dim**-0.5 if scale is None else scale
    _checks.scale(scale)
    _checks.soft_cap(softcap)
    if torch.is_grad_enabled():
        _refuse_gradients(query=query, key=key, value=value, prefix_key=prefix_key, prefix_value=prefix_value)
    prefix = (prefix_key, prefix_value, prefix_row)
    backend.check(impl)
    return _without_derivatives(query, key, value, first, scale, softcap, *prefix, length, impl)


def _positions(name: str, key: Tensor, value: Tensor, rows: int | None, query: Tensor) -> None:
    """Checks keys and values of so many rows, or of any number."""
    dim = query.shape[2]
    for kind, tensor in (("key", key), ("value", value)):
        _checks.tensor(f"{name}{kind}", tensor)
        fits = tensor.dim() == 4 and tensor.shape[3] == dim and tensor.shape[2] > 0
        if not fits or rows not in (None, len(tensor)):
            raise ValueError(
                f"{name}{kind}: got shape {list(tensor.shape)}, expected [{'P' if rows is None else rows}, K, T, {dim}] "
                "with T at least 1"
            )
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}{kind}: got dtype {tensor.dtype}, expected {query.dtype}, that of query")
        if tensor.device != query.device:
            raise ValueError(f"{name}{kind}: got device {tensor.device}, expected {query.device}, that of query")
    if value.shape != key.shape:
        raise ValueError(f"{name}value: got shape {list(value.shape)}, expected {list(key.shape)}, that of {name}key")


def _refuse_gradients(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: got a tensor that requires a gradient, expected one that does not: {NO_GRADIENTS}"
            )


@torch.library.custom_op("pmc_fast::decode_attention", mutates_args=())
@outside_autocast
def _decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    scale: float,
    softcap: float | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    prefix_row: Tensor | None,
    length: Tensor | None,
    impl: str | None,
) -> Tensor:
    name = backend.choose("decode_attention", impl, query.device.type, query.dtype)
    prefix_positions, options = 0, {"scale": scale, "softcap": softcap, "length": length}
    if prefix_key is not None:
        _checks.within("prefix_row", prefix_row, len(prefix_key))
        prefix_positions = prefix_key.shape[2]
        options |= {"prefix_key": prefix_key, "prefix_value": prefix_value, "prefix_row": prefix_row}
    if length is None:
        _checks.within("first", first, prefix_positions + key.shape[2])
    else:
        _checks.length_and_first(length, first, key.shape[2], prefix_positions)
    attend = backend.load("decode_attention", name)
    if name != "triton":
        return attend(query, key, value, first, **options)
    if prefix_key is not None:
        choose = backend.load("prefix_attention", name, "sharers_if_faster")
        options["sharers"] = choose(prefix_row, prefix_key, query.shape[1])
    bad = no_bad_row(len(query), query.device)
    out = attend(query, key, value, first, **options, bad=bad)
    report_scores(bad, len(query))
    return out


@_decode_attention.register_fake
def _(query, *args):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_without_derivatives = _autograd.not_differentiable(_decode_attention, "decode_attention", NO_GRADIENTS)
