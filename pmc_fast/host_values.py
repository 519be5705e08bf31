"""Finds out whether what runs gives the host values that lie on a device, which nothing in a CUDA graph can do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LIBRARIES = ("aten", "prims", "mkldnn", "profiler")  # of torch itself; operators of others may look at values unseen
_LOOKING = ("_grouped_mm", "_scaled_grouped_mm")  # unseen, on GPUs that have no kernel for them
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
_COPYING = ("copy_", "where", *_INDEXING)  # to the device even a number
_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class HostValue(Exception):
    """An operation gives the host a value, or has an output whose shape depends on values."""


class RefusingHostValues(TorchDispatchMode):
    """Within a with block, what would give the host a value that lies on this kind of device raises HostValue instead.

    So do copies between the host and the device, and operators that this class knows nothing about. What the host holds in a
    tensor without dimensions counts as a number, where the operator does not copy it to the device.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(map(self._is_there, tensors)) and self._looks(func, args, tensors):
            raise HostValue(str(func))
        out = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and self._is_there(out) != self._is_there(args[0]):
            raise HostValue(str(func))
        return out

    def _is_there(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._device_type

    def _looks(self, func, args: tuple, tensors: list[Tensor]) -> bool:
        if func.namespace not in _LIBRARIES:
            return True
        name = func.overloadpacket.__name__
        if name in _LOOKING or any((t.dim() or name in _COPYING) and not self._is_there(t) for t in tensors):
            return True
        if name == "lift_fresh":  # made of the host's numbers, hence copied if it is not the host's
            return self._device_type != "cpu"
        if name in _INDEXING:  # by a mask
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return not _DEPENDENT.isdisjoint(func.tags)
