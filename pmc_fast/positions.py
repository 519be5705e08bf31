"""How many tokens a model has positions for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pmc_fast.errors import UserError
from pmc_fast.warning import warn

# How the tables are called that are no nn.Embedding but cannot be read past their end either (GPT-J, CodeGen, CTRL).
_FIXED_TABLES = ("embed_positions", "pos_encoding")


@dataclass(frozen=True)
class Positions:
    """most: the tokens of a prompt and its answer that the model was made for; None if it says nothing.

    fixed: whether there is no position beyond, such as where they come from a `table`. Otherwise (rotary embeddings) it can go on.
    chunk: tokens of a chunk, see `chunk_of`. tuned: the place in a row from which on attention is scaled by it, see `tuned_of`.
    model: its class's name.
    """

    most: int | None
    fixed: bool
    chunk: int | None = None
    tuned: int | None = None
    table: bool = field(default=False, compare=False)
    model: str = field(default="", compare=False)

    @classmethod
    def of(cls, model: nn.Module) -> Positions:
        """Those of a transformers causal language model: a table is as long as its configuration says."""
        config = model.config.get_text_config()
        if config.model_type == "mpt":  # its attention bias ends there
            return cls(config.max_seq_len, True)
        most, name = getattr(config, "max_position_embeddings", None), type(model).__name__
        more = {"chunk": chunk_of(config), "tuned": tuned_of(config), "model": name}
        if most is None:
            return cls(None, False, **more)
        words = model.get_input_embeddings()
        # Some tables begin with rows that no position has: OPT's with two.
        learned = any(
            isinstance(module, nn.Embedding) and module is not words and most <= module.num_embeddings <= most + 2
            for module in model.modules()
        )
        computed = any(
            name.rpartition(".")[2] in _FIXED_TABLES and len(table) == most for name, table in model.named_buffers()
        )
        return cls(most, learned or computed, table=learned or computed, **more)

    def check_answers(self, prompts: Tensor, limits: Tensor, max_length: int | None, more: int = 0) -> None:
        """That prompts have room for their answers, whose last token the model is not asked to go on from.

        For models that say how many positions they have.

        Args:
            prompts, limits: int64 [B] on the CPU, tokens of each prompt and of its answer at most; B at least 1.
            max_length: what the limits come from, if it is that.
            more: tokens that come behind an answer.
        """
        row = int((prompts + limits).argmax())
        prompt, limit = int(prompts[row]), int(limits[row])
        excess = prompt + limit - 1 + more - self.most
        if excess <= 0:
            return
        name, got = ("max_new_tokens", limit) if max_length is None else ("max_length", max_length)
        where = f"the model has positions for {self.most} tokens{'' if more else ', all but the last one of an answer'}"
        if not self.fixed:  # as transformers' generate does
            warn(
                f"max_new_tokens or max_length: prompt and answer may have more than {self.most} tokens together, the model's "
                "max_position_embeddings; its answers may be worse there"
            )
        elif prompt + more > self.most:
            raise UserError(f"input_ids: got a prompt of {prompt} tokens, expected at most {self.most - more}: {where}")
        else:
            raise UserError(f"{name}: got {got}, expected at most {got - excess}: {where}")

    def check_sequence(self, name: str, length: int, hint: str = "") -> None:
        """That a sequence of this length can be trained on."""
        if self.fixed and length > self.most:
            raise UserError(
                f"{name} has {length} tokens, prompt and answer together, expected at most {self.most}: the model has no "
                f"more positions{hint}"
            )
        if self.chunk is not None and length > self.chunk:
            raise UserError(
                f"{name} has {length} tokens, prompt and answer together, expected at most {self.chunk}: {self.model} attends in "
                f"chunks of {self.chunk} tokens (attention_chunk_size), beyond which this version cannot train"
            )

    def check_packed(self, tokens: int) -> None:
        """That a packed batch of so many tokens can be trained on."""
        if self.tuned is not None and tokens >= self.tuned:
            raise UserError(
                f"batch: got {tokens} tokens packed together, expected fewer than {self.tuned}: from there on {self.model} scales "
                "attention by a token's place in the row (floor_scale), whatever its position is; take fewer or shorter rows"
            )


def tuned_of(config: Any) -> int | None:
    """From which place in a row on a model with this configuration scales the queries of layers without rotary embedding."""
    tunes = getattr(config, "attn_temperature_tuning", False) and 0 in getattr(config, "no_rope_layers", ())
    return int(config.floor_scale) if tunes else None


def chunk_of(config: Any) -> int | None:
    """Tokens of a chunk, before which some layers of a model with this configuration see nothing (Llama 4); None if none do.

    transformers' masks of chunks have their size where those of sliding windows have the window.
    """
    types = getattr(config, "layer_types", None)
    return getattr(config, "attention_chunk_size", None) if types is None or "chunked_attention" in types else None
