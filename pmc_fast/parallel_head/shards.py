"""How a head's vocabulary is shared out among the ranks of a process group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from pmc_fast.errors import UserError
from pmc_fast.ops import _checks


@dataclass(frozen=True)
class VocabShards:
    """The part of the vocabulary whose rows of the head this rank holds: tokens [begin, end) of `vocab`."""

    group: dist.ProcessGroup
    begin: int
    end: int
    vocab: int

    @classmethod
    def of(cls, weight: Tensor, group: dist.ProcessGroup | None = None, vocab: int | None = None) -> VocabShards:
        """The shards that the ranks' weights make, one after the other in the order of ranks; of any sizes.

        Every rank of the group calls it, once: it looks at all ranks' shapes, so that all raise if one does not fit.

        Args:
            weight: this rank's rows of the head, [V_r, D], at least one; or a DTensor [V, D] sharded on dimension 0.
            group: the process group; None is the default one. A DTensor brings its own.
            vocab: V, which the ranks' rows must add up to; None takes their sum.

        Raises:
            UserError: shards that do not fit the group or one another, or are of several dtypes or devices; a group that
                this rank is not of.
        """
        if isinstance(weight, DTensor):
            weight, group, vocab = weight.to_local(), mesh_group("weight", weight), weight.shape[0]
        elif group is None:
            group = dist.group.WORLD
        if group is None:
            raise UserError("group: got None without a default process group; call init_process_group first")
        if dist.get_rank(group) < 0:
            raise UserError(
                f"group: got one that rank {dist.get_rank()} is not of, expected the group that shares the head"
            )
        parts: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, (list(weight.shape), str(weight.dtype), weight.device.type), group)
        shapes, *kinds = zip(*parts, strict=True)
        if any(len(shape) != 2 for shape in shapes):
            raise UserError(f"weight: got the shapes {list(shapes)} on the ranks of the group, expected 2 dimensions")
        for name, each in zip(("dtypes", "devices"), kinds, strict=True):
            if len(set(each)) > 1:
                raise UserError(
                    f"weight: got the {name} {', '.join(each)} on the ranks of the group, expected the same"
                )
        rows = [shape[0] for shape in shapes]
        if min(rows) == 0 or len({shape[1] for shape in shapes}) > 1 or (vocab is not None and sum(rows) != vocab):
            total = "" if vocab is None else f" and {vocab} rows in all"
            raise UserError(
                f"weight: got the shapes {list(shapes)} on the {len(shapes)} ranks of the group, expected at least one row "
                f"on each, one width{total}"
            )
        begin = sum(rows[: dist.get_rank(group)])
        return cls(group, begin, begin + weight.shape[0], sum(rows))

    def local(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of the head's weight or bias, checked to be the size it should be."""
        _checks.tensor(name, tensor)
        if isinstance(tensor, DTensor):
            if mesh_group(name, tensor) != self.group:
                raise ValueError(f"{name}: got a DTensor of another process group than the shards'")
            tensor = tensor.to_local()
        if len(tensor) != self.end - self.begin:
            raise ValueError(
                f"{name}: got {len(tensor)} rows, expected {self.end - self.begin}, this rank's share of the vocabulary "
                f"among the {dist.get_world_size(self.group)} ranks of the shards' group"
            )
        return tensor

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return dist.get_rank(self.group)

    def gather(self, values: Tensor) -> Tensor:
        """The values of all ranks, [ranks, ...]: the same bits on every rank."""
        return gather(values, self.group)


def gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    values = values.contiguous()
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.stack(parts)


def mesh_group(name: str, tensor: DTensor) -> dist.ProcessGroup:
    """The process group over which a DTensor is sharded on dimension 0."""
    if tensor.placements != (Shard(0),):
        dimensions = f"a mesh of {tensor.device_mesh.ndim} dimension{'s' * (tensor.device_mesh.ndim > 1)}"
        raise UserError(
            f"{name}: got a DTensor placed {tensor.placements} on {dimensions}, expected (Shard(dim=0),) on a mesh of one "
            "dimension, such as mesh['tp']"
        )
    return tensor.device_mesh.get_group()


def shards_of(weight: Tensor, shards: VocabShards | None, name: str = "weight") -> VocabShards:
    """The shards given, or those that a DTensor, which an error calls `name`, tells without asking the other ranks."""
    _checks.tensor(name, weight)
    if shards is not None:
        return shards
    if not isinstance(weight, DTensor):
        raise UserError(
            "shards: got None with a plain weight, expected VocabShards.of(weight, group) or a DTensor weight"
        )
    group, vocab, ranks = mesh_group(name, weight), weight.shape[0], weight.device_mesh.size()
    rows = -(-vocab // ranks)  # as torch.chunk shares them out
    if rows * (ranks - 1) >= vocab:
        raise UserError(f"{name}: got {vocab} rows on {ranks} ranks, in shares of {rows}: the last rank has none")
    begin = rows * dist.get_rank(group)
    return VocabShards(group, begin, min(begin + rows, vocab), vocab)
