"""Named phases of the work: ranges for profilers, free when none is listening."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

PREFIX = "pmc_fast."  # the ops are pmc_fast::<name>

# In the order in which a step goes through them.
PHASES = (
    "prefill",
    "decode",
    "head",
    "sample",
    "prune",
    "retire",
    "detokenise",
    "score",
    "pack",
    "forward",
    "loss",
    "backward",
    "optimizer",
)

_NOBODY_LISTENS = nullcontext()


def phase(name: str) -> AbstractContextManager:
    """A range named ``pmc_fast.<name>`` for torch.profiler, and for NVTX under ``torch.autograd.profiler.emit_nvtx``.

    Args:
        name: one of ``PHASES``.
    """
    if not torch.autograd._profiler_enabled():
        return _NOBODY_LISTENS
    return torch.profiler.record_function(PREFIX + name)
