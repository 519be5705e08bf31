"""`decode_attention`: one query token per row over the row's cached keys and values."""

import math

import torch
from torch import Tensor

from pmc_fast import backend
from pmc_fast.ops import _checks


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attention of one new token per row, over the keys and values from each row's first position on; no gradients.

    Equivalent to ``scaled_dot_product_attention(query[:, :, None], key, value, attn_mask=mask, scale=scale,
    enable_gqa=True)[:, :, 0]`` with ``mask = (arange(T) >= first[:, None])[:, None, None]``, each score passed through
    ``softcap * tanh(score / softcap)`` first where softcap is given. Heads that share keys and values read them once.

    Args:
        query: float32, bfloat16 or float16 [N, H, D] (float64 for the reference).
        key: [N, K, T, D], dtype of query; K divides H, and head h uses the keys of head h * K // H.
        value: [N, K, T, D], dtype of query.
        first: int64 [N] in [0, T): the positions before it are left out (padding, or outside a sliding window).
        scale: multiplies the scores; None is D ** -0.5.
        softcap: bounds the scores smoothly (Gemma 2), or None.
        impl: None, "reference" or "native".

    Returns:
        [N, H, D], dtype of query.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or range; scores that are not finite.
        BackendUnavailable: the implementation named cannot run.

    Source: Vaswani et al., arXiv 1706.03762, equation 1.
    """
    if query.dim() != 3:
        raise ValueError(f"query: got shape {list(query.shape)}, expected [N, H, D]")
    if query.dtype not in _checks.FLOATING:
        raise TypeError(f"query: got dtype {query.dtype}, expected float32, bfloat16, float16 or float64")
    rows, heads, dim = query.shape
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != 4 or (tensor.shape[0], tensor.shape[3]) != (rows, dim) or tensor.shape[2] == 0:
            raise ValueError(
                f"{name}: got shape {list(tensor.shape)}, expected [{rows}, K, T, {dim}] with T at least 1"
            )
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {query.dtype}, that of query")
        if tensor.device != query.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {query.device}, that of query")
    if value.shape != key.shape:
        raise ValueError(f"value: got shape {list(value.shape)}, expected {list(key.shape)}, that of key")
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"key: got {key.shape[1]} heads, expected a divisor of the {heads} heads of query")
    _checks.vector("first", first, rows, torch.int64, query)
    scale = dim**-0.5 if scale is None else scale
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected None or a finite number")
    _checks.soft_cap(softcap)
    return _decode_attention(query, key, value, first, scale, softcap, impl)


@torch.library.custom_op("pmc_fast::decode_attention", mutates_args=())
def _decode_attention(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, scale: float, softcap: float | None, impl: str | None
) -> Tensor:
    name = backend.choose("decode_attention", impl, query.device.type, query.dtype)
    _checks.within("first", first, key.shape[2])
    return backend.load("decode_attention", name)(query, key, value, first, scale=scale, softcap=softcap)


@_decode_attention.register_fake
def _(query, key, value, first, scale, softcap, impl):
    return torch.empty_like(query, memory_format=torch.contiguous_format)
