"""Weights that several processes share out: FSDP2's and DeepSpeed ZeRO-3's, whole for the time of a call; tensor-parallel ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pmc_fast.errors import UserError

# Whose hooks on a module's forward pass gather and free its weights.
SHARDERS = ("torch.distributed.fsdp.", "deepspeed.")


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within a with block, every rank holds the model's weights whole; afterwards they are shared out as before.

    Equivalent to ``unshard()`` of every module that ``fully_shard`` was applied to and that is sharded, then ``reshard()``;
    or to ``deepspeed.zero.GatheredParameters``. Meanwhile neither sees the modules' forward passes: they gather nothing and
    leave nothing behind for the next backward pass, so ranks may run different numbers of them. For use without gradients.
    All ranks enter it together. Does nothing to a model that is not sharded, or is tensor-parallel.

    Args:
        model: with all modules that hold its weights' shards: the root that ``fully_shard`` was applied to last.

    Raises:
        UserError: a weight is still in parts, since a module around the model holds it, or it is tensor-parallel besides.
    """
    if not _is_distributed():
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    with ExitStack() as after:
        for module in [m for m in model.modules() if isinstance(m, FSDPModule) and _is_sharded(m)]:
            after.callback(module.reshard)
            module.unshard()
        if partitioned := [p for p in model.parameters() if is_zero3(p) and _in_parts(p)]:
            import deepspeed

            after.enter_context(deepspeed.zero.GatheredParameters(partitioned))
        if not is_tensor_parallel(model):
            for parameter in model.parameters():
                refuse_parts(parameter)
        for module in model.modules():
            after.enter_context(_unseen(module))
        yield


def begin_forward(root: nn.Module, backbone: nn.Module) -> None:
    """Within root's forward, have FSDP2 gather the weights of modules between root and the backbone, which are not called.

    Raises:
        UserError: ``fully_shard`` was applied to modules in root, but not to root: it would leave out gradients of others.
    """
    if not _is_distributed():
        return
    from torch.distributed.fsdp import FSDPModule

    inside = [module for module in root.modules() if isinstance(module, FSDPModule) and module is not root]
    if inside and not isinstance(root, FSDPModule):
        name = type(root).__name__
        raise UserError(
            f"{name}: holds modules that fully_shard was applied to; expected it applied to {name}, too, as the last"
        )
    for module in inside:
        if module is not backbone and backbone in module.modules():
            module.unshard()


def kind(module: nn.Module) -> type:
    """The module's class, or what it was before ``fully_shard`` put a subclass in its place, which computes the same."""
    cls = type(module)
    if not cls.__module__.startswith(SHARDERS[0]):
        return cls
    from torch.distributed.fsdp import FSDPModule

    return cls.__bases__[1] if cls.__bases__[0] is FSDPModule else cls


def is_zero3(parameter: Tensor) -> bool:
    """Whether it is in the hands of DeepSpeed ZeRO-3, whole or not."""
    return hasattr(parameter, "ds_id")


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether it holds DTensors that stay in parts: there is no FSDP2 module, which would gather them."""
    if not _is_distributed():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(map(is_dtensor, model.parameters())) and not any(isinstance(m, FSDPModule) for m in model.modules())


def refuse_shared_out(model: nn.Module) -> None:
    """A UserError if ranks share out the model's weights, in whatever way: for code in which each holds all of them."""
    if _is_distributed() and any(is_dtensor(p) or is_zero3(p) for p in model.parameters()):
        raise UserError(
            "model: got weights that processes share out (tensor-parallel, FSDP2 or ZeRO-3), expected whole ones; write the "
            "loop yourself, see docs/distributed.md"
        )


def smallest(model: nn.Module, value: int) -> int:
    """The smallest of the values that the ranks bring which hold parts of a tensor-parallel model; otherwise this one."""
    if not is_tensor_parallel(model):
        return value
    meshes = dict.fromkeys(parameter.device_mesh for parameter in model.parameters() if is_dtensor(parameter))
    for mesh in meshes:
        for group in mesh.get_all_groups():
            total = torch.tensor(value, device=mesh.device_type)
            dist.all_reduce(total, dist.ReduceOp.MIN, group)
            value = int(total)
    return value


def refuse_parts(weight: Tensor) -> None:
    """A UserError if this rank holds only a part of a weight."""
    if _in_parts(weight):
        raise UserError(
            "model: got weights in parts, expected whole ones; call the loss as the forward of "
            "fully_shard(parallel.LossModule(pmc)), or of a DeepSpeed engine of the latter, and do all else within "
            "parallel.gathered(loss_module); a tensor-parallel model must be one before PMC, Sampler or LanguageModel takes it, "
            "and must not be given to fully_shard"
        )


def _in_parts(weight: Tensor) -> bool:
    if is_zero3(weight):
        return weight.ds_status.name != "AVAILABLE"
    return is_dtensor(weight)


def is_dtensor(weight: Tensor) -> bool:
    if not _is_distributed():  # nothing is imported for those who have one process
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_sharded(module: nn.Module) -> bool:
    """Whether an FSDP2 module's own weights, those no FSDP2 module inside of it holds, are in parts."""
    from torch.distributed.fsdp import FSDPModule

    inside = [child for child in module.modules() if child is not module and isinstance(child, FSDPModule)]
    theirs = {id(parameter) for child in inside for parameter in child.parameters()}
    return any(is_dtensor(p) for p in module.parameters() if id(p) not in theirs)


@contextmanager
def _unseen(module: nn.Module) -> Iterator[None]:
    """Within a with block, hooks of SHARDERS on the module's forward pass are off."""
    names = ("_forward_pre_hooks", "_forward_hooks")
    hooks = {name: held for name in names if any(map(_is_theirs, (held := getattr(module, name)).values()))}
    for name, held in hooks.items():
        setattr(module, name, OrderedDict((key, hook) for key, hook in held.items() if not _is_theirs(hook)))
    try:
        yield
    finally:
        for name, held in hooks.items():
            setattr(module, name, held)


def _is_theirs(hook: Callable) -> bool:
    return getattr(hook, "__module__", "").startswith(SHARDERS)
