"""One pass over the prompts of a sampling call, which leaves their keys and values in a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pmc_fast import attention
from pmc_fast.cache import SampleCache, layers_of
from pmc_fast.errors import UserError
from pmc_fast.models import LanguageModel


@dataclass(frozen=True)
class Prefill:
    """hidden: the prompts' last hidden states [B, D]; mask: int64 [B, T]; position: int64 [B], of the last tokens."""

    hidden: Tensor
    cache: SampleCache
    mask: Tensor
    padded: bool
    position: Tensor
    calls: list[attention.AttentionCall]

    @property
    def padding(self) -> Tensor:
        """int64 [B], the tokens of padding before each prompt."""
        return (self.mask == 0).sum(1)

    @property
    def suits_decode_attention(self) -> bool:
        """Whether `decode_attention` could have done the attention calls, from what the cache holds."""
        layers = self.cache.layers
        return (
            [call.layer for call in self.calls] == list(range(len(layers)))
            and all(call.same_shape for call in self.calls)
            and all(call.keys_at == layer.keys.data_ptr() for call, layer in zip(self.calls, layers, strict=True))
        )


def prefill(lm: LanguageModel, input_ids: Tensor, attention_mask: Tensor | None) -> Prefill:
    """Run the model over prompts padded on the left.

    Raises:
        UserError: the model does not use the cache.
    """
    width = input_ids.shape[1]
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    cache = SampleCache(layers_of(lm.model.config), width)
    padded = not bool(mask.all())
    position = (mask.cumsum(1) - 1).clamp(min=0)
    options = {"attention_mask": mask} if padded else {}
    with attention.watching() as calls:
        hidden = lm.hidden(input_ids, position_ids=position, past_key_values=cache, use_cache=True, **options)
    if cache.get_seq_length() != width:
        raise UserError("model: it does not fill the key/value cache it is given, so it cannot be sampled from")
    return Prefill(hidden[:, -1], cache, mask, padded, position[:, -1], calls)
