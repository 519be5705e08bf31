"""Memory in pages of 2 MiB."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

PAGE = 1 << 21

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def setting() -> str | None:
    """To whom Linux gives them: "always", "madvise" (whoever asks, as `empty` does) or "never"; None where there are none."""
    try:
        return next(word[1:-1] for word in _SETTING.read_text().split() if word.startswith("["))
    except (OSError, StopIteration):
        return None


def empty(nbytes: int) -> Tensor:
    """uint8 [nbytes], not initialised, in huge pages if it fills one and the system has them to give, else as any memory.

    What streams through memory meets a new page every 4 KiB else, and a processor that multiplies meanwhile does not look far
    enough ahead to have its address in time.
    """
    if nbytes < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    memory = mmap.mmap(-1, nbytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % PAGE
    return whole[begin : begin + nbytes]
