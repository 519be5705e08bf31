"""What a sampling call is given, checked: prompts, limits, end tokens."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from pmc_fast.errors import described
from pmc_fast.inputs import plain
from pmc_fast.positions import Positions


def check_prompts(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """That they are tensors [B, T] of token ids, and of what is no padding, which is on the left alone."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"input_ids: got {described(input_ids)}, expected an int64 tensor [B, T]; of what a tokenizer returns with "
            'return_tensors="pt", give ["input_ids"] and, as attention_mask, ["attention_mask"]'
        )
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids: got shape {list(input_ids.shape)}, expected [B, T] with at least one token")
    if input_ids.dtype != torch.int64:
        raise TypeError(f"input_ids: got dtype {input_ids.dtype}, expected torch.int64")
    if not len(input_ids):
        raise ValueError("input_ids: got no prompts, expected at least one")
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask: got {described(attention_mask)}, expected a tensor [B, T] or None")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: got shape {list(attention_mask.shape)}, expected {list(input_ids.shape)}, that of input_ids"
        )
    check_places(input_ids.device, "input_ids are", {"attention_mask": attention_mask})
    if (attention_mask[:, -1] == 0).any():
        raise ValueError("attention_mask: a prompt ends in padding; expected padding on the left")
    kept = attention_mask != 0
    if (holes := (kept[:, :-1] > kept[:, 1:]).any(1)).any():
        raise ValueError(
            f"attention_mask: got padding behind a token in row {int(holes.nonzero()[0])}, expected padding on the left alone"
        )


def check_places(device: torch.device, whose: str, tensors: dict[str, Tensor | None]) -> None:
    """That the tensors, by name, are on the device."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.device != device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, expected one on {device}, where {whose}")


def end_tokens(eos_token_id: int | Sequence[int] | Tensor) -> list[int]:
    """The tokens that end an answer; -1 is none."""
    given = plain(eos_token_id)
    try:
        ends = [given] if isinstance(given, int) else [plain(end) for end in given]
    except TypeError:
        ends = [None]
    if any(isinstance(end, bool) or not isinstance(end, int) for end in ends):
        raise TypeError(f"eos_token_id: got {eos_token_id!r}, expected a token id or a list of them")
    if any(end < -1 for end in ends):
        raise ValueError(
            f"eos_token_id: got {eos_token_id!r}, expected ids of at least 0, or -1 for answers that never end"
        )
    if not ends:
        raise ValueError("eos_token_id: got none, expected at least one token id")
    return ends


def check_sequence_ids(sequence_ids: Tensor, prompts: int, num_samples: int) -> None:
    """That there is one for each prompt, and that the noise of all samples has sequences to be drawn from."""
    if not isinstance(sequence_ids, Tensor):
        raise TypeError(f"sequence_ids: got {described(sequence_ids)}, expected an int64 tensor [{prompts}] or None")
    if sequence_ids.shape != (prompts,):
        raise ValueError(f"sequence_ids: got shape {list(sequence_ids.shape)}, expected [{prompts}]")
    if sequence_ids.dtype != torch.int64:
        raise TypeError(f"sequence_ids: got dtype {sequence_ids.dtype}, expected torch.int64")
    most = 2**32 // num_samples
    for one in sequence_ids.aminmax():
        if not 0 <= int(one) < most:
            raise ValueError(
                f"sequence_ids: got {int(one)}, expected integers in [0, {most}), for num_samples={num_samples}"
            )


def answer_limits(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    num_samples: int,
    max_new_tokens: int | Tensor | None,
    max_length: int | None,
    positions: Positions,
) -> Tensor:
    """Tokens per answer at most, int64 [B] on the CPU; checks the arguments it is made from."""
    check_prompts(input_ids, attention_mask)
    if isinstance(num_samples, bool) or not isinstance(num_samples, Integral) or num_samples < 1:
        raise ValueError(f"num_samples: got {num_samples!r}, expected an integer of at least 1")
    if (max_new_tokens is None) == (max_length is None):
        raise ValueError(
            f"max_new_tokens, max_length: got {max_new_tokens} and {max_length}, expected exactly one of them"
        )
    prompts, width = input_ids.shape
    if max_new_tokens is None:
        name, limits = "max_length", whole("max_length", max_length, "an integer").long() - width
    else:
        name, limits = "max_new_tokens", whole("max_new_tokens", max_new_tokens, f"an integer or int64 [{prompts}]")
    if limits.dim() > 1 or (limits.dim() == 1 and (max_new_tokens is None or limits.shape != (prompts,))):
        raise ValueError(
            f"{name}: got {limits.dtype} of shape {list(limits.shape)}, expected an integer or int64 [{prompts}]"
        )
    limits = limits.long().expand(prompts)
    if int(limits.min()) < 1:
        got = max_length if max_new_tokens is None else int(limits.min())
        raise ValueError(
            f"{name}: got {got}, which leaves no room for an answer after prompts padded to {width} tokens"
        )
    if positions.most is not None and width + int(limits.max()) - 1 > positions.most:
        lengths = torch.full_like(limits, width) if attention_mask is None else (attention_mask != 0).sum(1).cpu()
        positions.check_answers(lengths, limits, max_length)
    return limits


def whole(name: str, value: object, wanted: str) -> Tensor:
    """A tensor on the CPU of what must be integers."""
    try:
        limits = torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: got {value!r}, expected {wanted}") from None
    if limits.is_floating_point() or limits.is_complex() or limits.dtype == torch.bool:
        raise ValueError(f"{name}: got {limits.dtype} of shape {list(limits.shape)}, expected {wanted}")
    return limits
