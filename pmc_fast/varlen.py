"""Causal attention over sequences end to end in one call on a GPU, by flash-attn where it is installed, else by torch's own."""

from __future__ import annotations

import inspect
from functools import cache, lru_cache

import torch
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None
try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

_NEEDED = {"scale", "window_size"}


def takes(query: Tensor, softcap: float | None, dropout: float) -> bool:
    """Whether `attend` can run these inputs; if not, the sequences are attended to one after the other."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and dropout == 0
        and (flash_attn_varlen_func is not None or (softcap is None and _parameters() >= _NEEDED))
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """Each token sees those before it in its own sequence, the last `window` of them and itself at most.

    Args:
        query: [1, H, T, D]. key, value: [1, K, T, D], K divides H.
        lengths: tokens of each sequence, T together.
        softcap: bounds the scores smoothly, or None; needs flash-attn.

    Returns:
        [1, T, H, D].
    """
    ends, longest = _ends(lengths, query.device), max(lengths)
    seen = (-1 if window is None else window - 1, 0)
    if flash_attn_varlen_func is not None:
        tokens = (x[0].transpose(0, 1) for x in (query, key, value))
        options = {"softmax_scale": scale, "causal": True, "window_size": seen, "softcap": softcap or 0.0}
        return flash_attn_varlen_func(*tokens, ends, ends, longest, longest, **options)[None]
    groups = query.shape[1] // key.shape[1]
    options = {"scale": scale, "window_size": seen}
    if groups > 1 and "enable_gqa" in _parameters():
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    tokens = (x[0].transpose(0, 1) for x in (query, key, value))
    return varlen_attn(*tokens, ends, ends, longest, longest, **options)[None]


@cache
def _parameters() -> set[str]:
    return set() if varlen_attn is None else set(inspect.signature(varlen_attn).parameters)


@lru_cache(maxsize=4)  # all layers ask for the same
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [sequences + 1], from 0: where each sequence ends."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
