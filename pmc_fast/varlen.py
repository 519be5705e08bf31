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


def takes(device: torch.device, dtype: torch.dtype, dim: int, softcap: float | None) -> bool:
    """Whether `attend` can run heads of this size, on this device; if not, the sequences are attended to one after the other."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and dim % 8 == 0
        and dim <= 256
        and (flash_attn_varlen_func is not None or (softcap is None and _parameters() >= _NEEDED))
        and torch.cuda.get_device_capability(device) >= (8, 0)
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
        query: [T, H, D]. key, value: [T, K, D], K divides H.
        lengths: tokens of each sequence, T together.
        softcap: bounds the scores smoothly, or None; needs flash-attn.

    Returns:
        [T, H, D].
    """
    ends, longest = _ends(lengths, query.device), max(lengths)
    seen = (-1 if window is None else window - 1, 0)
    if flash_attn_varlen_func is not None:
        options = {"softmax_scale": scale, "causal": True, "window_size": seen, "softcap": softcap or 0.0}
        return flash_attn_varlen_func(query, key, value, ends, ends, longest, longest, **options)
    groups = query.shape[1] // key.shape[1]
    options = {"scale": scale, "window_size": seen}
    if groups > 1 and "enable_gqa" in _parameters():
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return varlen_attn(query, key, value, ends, ends, longest, longest, **options)


@cache
def _parameters() -> set[str]:
    return set() if varlen_attn is None else set(inspect.signature(varlen_attn).parameters)


@lru_cache(maxsize=4)  # all layers ask for the same
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [sequences + 1], from 0: where each sequence ends."""
    with torch.inference_mode(False):  # a backward pass may need them later
        return torch.tensor([0, *lengths], dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32).to(device)
