"""Several processes on this machine, and counting what they exchange."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


def on_ranks(ranks: int, checks: list[Callable], seed: int, store: Path, *args):
    """Runs check(rank, ranks, seed, *args) of each check, one after the other, in so many gloo processes."""
    torch.multiprocessing.spawn(_rank, (ranks, checks, seed, str(store), args), nprocs=ranks)


def _rank(rank, ranks, checks, seed, store, args):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        for check in checks:
            torch.manual_seed(seed)
            check(rank, ranks, seed, *args)
    finally:
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may abort while Python ends: docs/distributed.md


class CountingGathers(TorchDispatchMode):
    """Counts the all-gathers of tensors within a with block."""

    def __init__(self):
        super().__init__()
        self.gathers = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.gathers += operator.namespace == "c10d" and "allgather" in operator.__name__
        return operator(*args, **(kwargs or {}))
