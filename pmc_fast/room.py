"""Whether answers fit behind their questions, into max_length and the model's positions, and are of tokens that it has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from pmc_fast.config import PMCConfig
from pmc_fast.data import QA
from pmc_fast.errors import UserError
from pmc_fast.positions import Positions
from pmc_fast.prompts import Prompts
from pmc_fast.vocabulary import check_tokens, vocabulary_size


def check_sampling(model: nn.Module, prompts: Prompts, forget: Sequence[QA], config: PMCConfig) -> None:
    """Raise UserError for a question with tokens that `model` has not, or if the limit of `config` leaves no room for an answer
    to it, or more than `model` has."""
    asked = [(prompts.prompt_ids(row.question), row) for row in forget]
    _check_tokens(model, asked, "--forget")
    # An answer that is cut off is trained on with an end token.
    if config.max_new_tokens is not None:
        needed = ((len(tokens) + config.max_new_tokens + 1, row) for tokens, row in asked)
        _check_positions(model, needed, "--max-new-tokens")
        return
    tokens, row = max(asked, key=lambda one: len(one[0]))
    if len(tokens) >= config.max_length:
        raise UserError(
            f"--max-length: got {config.max_length}, which leaves no room for an answer behind the {len(tokens)} tokens that "
            f"ask {_named(row)}; raise it, or give --max-new-tokens instead"
        )
    _check_positions(model, [(config.max_length + 1, row)], "--max-length")


def check_evaluation(model: nn.Module, prompts: Prompts, rows: Iterable[QA], tokens: int, prefill: str = "") -> None:
    """Raise UserError for a question with tokens that `model` has not, or if an answer of `tokens` tokens takes more positions."""
    asked = [(prompts.prompt_ids(row.question, prefill), row) for row in rows]
    _check_tokens(model, asked, "question")
    _check_positions(model, ((len(prompt) + tokens, row) for prompt, row in asked), "--evaluation-tokens")


def check_training(model: nn.Module, prompts: Prompts, rows: Iterable[QA], option: str) -> None:
    """Raise UserError if one of the rows, which the file of `option` holds, has tokens or positions that the model has not."""
    whole = [(prompts.prompt_ids(row.question) + prompts.answer_ids(row.answer), row) for row in rows]
    _check_tokens(model, whole, option)
    _check_positions(model, ((len(tokens), row) for tokens, row in whole), option)


def _check_tokens(model: nn.Module, encoded: Iterable[tuple[list[int], QA]], what: str) -> None:
    size = vocabulary_size(model)
    for tokens, row in encoded:
        check_tokens(f"{what}: {_named(row)}", tokens, size)


def _check_positions(model: nn.Module, needed: Iterable[tuple[int, QA]], option: str) -> None:
    """`needed`: tokens, and the row that they belong to; looked at only if the model's positions end."""
    positions = Positions.of(model)
    if not positions.fixed:
        return
    tokens, row = max(needed, key=lambda one: one[0])
    if tokens - 1 > positions.most:  # the last token of an answer needs none
        raise UserError(
            f"{option}: {_named(row)} and its answer take up to {tokens} tokens, but the model has {positions.most} positions"
        )


def _named(row: QA) -> str:
    """Its question, cut short, and where it stands."""
    question = repr(row.question if len(row.question) <= 80 else row.question[:77] + "...")
    return f"{question} ({row.where})" if row.where else question
