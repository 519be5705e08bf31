"""What a tensor-parallel model itself makes of tokens, to compare with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import implicit_replication

from pmc_fast.errors import UserError
from pmc_fast.parallel_head.shards import VocabShards


@torch.no_grad()
def own_logits(model: nn.Module, backbone: nn.Module, ids: Tensor, shards: VocabShards) -> Tensor:
    """The logits that the model gives for tokens, of this rank's part of the vocabulary, [B, T, V_r].

    Args:
        model: returns logits that are whole, this rank's part, or a DTensor.
        backbone: the model without its head.
        ids: int64 [B, T], the same on every rank.

    Raises:
        UserError: the model cannot be run, or its hidden states are not whole.
    """
    try:
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
        with implicit_replication():  # for a head whose weight alone is a DTensor
            logits = model(input_ids=ids, use_cache=False).logits
    except RuntimeError as error:
        raise UserError(
            f"model: got layers that cannot run, since their weights are DTensors and their inputs are not ({error}); "
            "expected parallelize_module on them, or a model that transformers loaded with a tp_plan, or "
            "fully_shard(parallel.LossModule(pmc)) around the one PMC that holds the model"
        ) from error
    if isinstance(hidden, DTensor) or hidden.shape[:2] != ids.shape:
        got = "a DTensor" if isinstance(hidden, DTensor) else f"shape {list(hidden.shape)} for {list(ids.shape)} tokens"
        raise UserError(
            f"model: got last hidden states in parts ({got}), expected plain tensors, the same on every rank; let the last "
            "layer give Replicate() outputs as local tensors"
        )
    if isinstance(logits, DTensor):
        return logits.redistribute(placements=[Shard(-1)]).to_local()
    return logits[..., shards.begin : shards.end] if logits.shape[-1] == shards.vocab else logits
