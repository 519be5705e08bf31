"""Several processes on this machine, and counting what they exchange."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

IMPORTED = ["torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "transformers.trainer", "pytest"]


def on_ranks(ranks: int, checks: list[Callable], seed: int, store: Path, *args):
    """Runs check(rank, ranks, seed, *args) of each check, one after the other, in so many gloo processes.

    They are forks of a process that has imported what takes long and nothing else; its environment is that of the first call.
    They end without Python's own end, in which threads of gloo may abort (docs/distributed.md).
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    arguments = (ranks, checks, seed, str(store), args)
    torch.multiprocessing.start_processes(_rank, arguments, nprocs=ranks, start_method="forkserver")


def _rank(rank, ranks, checks, seed, store, args):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        for check in checks:
            torch.manual_seed(seed)
            check(rank, ranks, seed, *args)
        dist.barrier()  # no rank leaves while another is still connecting to it
    finally:
        dist.destroy_process_group()


class CountingGathers(TorchDispatchMode):
    """Counts the all-gathers of tensors within a with block."""

    def __init__(self):
        super().__init__()
        self.gathers = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.gathers += operator.namespace == "c10d" and "allgather" in operator.__name__
        return operator(*args, **(kwargs or {}))
