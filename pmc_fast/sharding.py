"""Weights that several processes share out: whole for the time of a call (FSDP2), or refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch.distributed as dist
from torch import Tensor, nn

from pmc_fast.errors import UserError


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within a with block, every rank holds the model's weights whole; afterwards they are shared out as before.

    Equivalent to ``unshard()`` of every module that ``fully_shard`` was applied to and that is sharded, then ``reshard()``.
    Meanwhile FSDP2 does not see the modules' forward passes: they gather nothing and leave nothing behind for the next
    backward pass, so ranks may run different numbers of them. For use without gradients. All ranks enter it together. Does
    nothing to a model that is not sharded.

    Args:
        model: with all modules that hold its weights' shards: the root that ``fully_shard`` was applied to last.

    Raises:
        UserError: a weight is still in parts, since a module around the model holds it, or it is tensor-parallel; or a
            DeepSpeed ZeRO-3 model.
    """
    refuse_zero3(next(model.parameters(), None))
    if not _is_distributed():
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    with ExitStack() as after:
        for module in [module for module in modules if _is_sharded(module)]:
            after.callback(module.reshard)
            module.unshard()
        for parameter in model.parameters():
            refuse_sharded(parameter)
        for module in modules:
            after.enter_context(_unseen(module))
        yield


def unshard(model: nn.Module) -> None:
    """Make an FSDP2 module's own weights whole until after the backward pass, as its forward would that is not called."""
    if _is_distributed():
        from torch.distributed.fsdp import FSDPModule

        if isinstance(model, FSDPModule):
            model.unshard()


def refuse_sharded(weight: Tensor) -> None:
    """A UserError if this rank holds only a part of a weight."""
    refuse_zero3(weight)
    if _is_distributed() and _is_dtensor(weight):
        raise UserError(
            "model: got weights in parts (DTensor), expected whole ones; with FSDP2 call the loss as the forward of "
            "fully_shard(parallel.LossModule(pmc)) and do all else within parallel.gathered(loss_module); "
            "tensor-parallel models are not supported"
        )


def refuse_zero3(weight: Tensor | None) -> None:
    if hasattr(weight, "ds_id"):
        raise UserError(
            "model: got weights that DeepSpeed ZeRO-3 has taken apart (ds_id), which is not supported; shard the model "
            "with FSDP2 instead, torch.distributed.fsdp.fully_shard, see docs/distributed.md"
        )


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_dtensor(weight: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def _is_sharded(module: nn.Module) -> bool:
    """Whether an FSDP2 module's own weights, those no FSDP2 module inside of it holds, are in parts."""
    from torch.distributed.fsdp import FSDPModule

    inside = [child for child in module.modules() if child is not module and isinstance(child, FSDPModule)]
    theirs = {id(parameter) for child in inside for parameter in child.parameters()}
    return any(_is_dtensor(p) for p in module.parameters() if id(p) not in theirs)


@contextmanager
def _unseen(module: nn.Module) -> Iterator[None]:
    """Within a with block, FSDP2's hooks on the module's forward pass are off."""
    names = ("_forward_pre_hooks", "_forward_hooks")
    hooks = {name: getattr(module, name) for name in names}
    for name, held in hooks.items():
        setattr(module, name, OrderedDict((key, hook) for key, hook in held.items() if not _is_fsdp(hook)))
    try:
        yield
    finally:
        for name, held in hooks.items():
            setattr(module, name, held)


def _is_fsdp(hook: Callable) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.distributed.fsdp.")
