"""Several processes on this machine, and counting what they exchange."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

IMPORTED = ["torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "transformers.trainer", "pytest"]


def on_ranks(ranks: int, checks: list[Callable], seed: int, store: Path, *args):
    """Runs check(rank, ranks, seed, *args) of each check, one after the other, in so many gloo processes.

    They end without Python's own end, in which threads of gloo may abort (docs/distributed.md).
    """
    forking()
    arguments = (ranks, checks, seed, str(store), args)
    torch.multiprocessing.start_processes(_rank, arguments, nprocs=ranks, start_method="forkserver")


def forking():
    """Multiprocessing's context of processes that are forks of one that has imported what takes long and nothing else.

    Its environment is that of the first of them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def as_torchrun(ranks: int, words: list[str]):
    """Runs a program, words[0], in so many forks, in the environment that torchrun would give them."""
    forking()
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.start_processes(_program, (ranks, store.port, words), nprocs=ranks, start_method="forkserver")


def _program(rank, ranks, port, words):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_RUN_ID="tests")
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


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
