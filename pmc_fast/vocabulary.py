"""Which tokens a model has: a tokenizer may know more of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pmc_fast.errors import UserError


def vocabulary_size(model: nn.Module) -> int | None:
    """How many tokens it has embeddings of; None if that cannot be told."""
    return getattr(model.get_input_embeddings(), "num_embeddings", None)


def check_tokens(name: str, tokens: Sequence[int], size: int | None) -> None:
    """Raise UserError, of what `name` says, if one of these tokens is none of the model's."""
    largest = max(tokens, default=-1)
    if size is not None and largest >= size:
        raise UserError(
            f"{name}: the tokenizer makes token {largest} of it, expected ids in [0, {size}), the model's vocabulary; take the "
            "model's own tokenizer, or resize_token_embeddings before training"
        )


def check_ids(input_ids: Tensor, size: int | None) -> None:
    """That the model has an embedding of every token; on a GPU, which would have to be waited for, its lookup asserts that."""
    if size is None or input_ids.device.type != "cpu":
        return
    outside = input_ids[(input_ids < 0) | (input_ids >= size)]
    if len(outside):
        raise ValueError(f"input_ids: got token {int(outside[0])}, expected ids in [0, {size}), the model's vocabulary")
