"""Whether answers fit behind their questions: into max_length, and into the positions that a model has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from pmc_fast.config import PMCConfig
from pmc_fast.data import QA
from pmc_fast.errors import UserError
from pmc_fast.positions import Positions
from pmc_fast.prompts import Prompts


def check_sampling(model: nn.Module, prompts: Prompts, forget: Sequence[QA], config: PMCConfig) -> None:
    """Raise UserError if the limit of `config` leaves no room for an answer to a question, or more than `model` has."""
    asked = [(len(prompts.prompt_ids(row.question)), row.question) for row in forget]
    # An answer that is cut off is trained on with an end token.
    if config.max_new_tokens is not None:
        _check(model, ((width + config.max_new_tokens + 1, question) for width, question in asked), "--max-new-tokens")
        return
    width, question = max(asked)
    if width >= config.max_length:
        raise UserError(
            f"--max-length: got {config.max_length}, which leaves no room for an answer behind the {width} tokens that "
            f"ask {_quoted(question)}; raise it, or give --max-new-tokens instead"
        )
    _check(model, [(config.max_length + 1, question)], "--max-length")


def check_evaluation(model: nn.Module, prompts: Prompts, rows: Iterable[QA], tokens: int, prefill: str = "") -> None:
    """Raise UserError if answers of `tokens` tokens to the rows' questions take more positions than the model has."""
    asked = ((row.question, len(prompts.prompt_ids(row.question, prefill))) for row in rows)
    _check(model, ((width + tokens, question) for question, width in asked), "--evaluation-tokens")


def check_training(model: nn.Module, prompts: Prompts, rows: Iterable[QA], option: str) -> None:
    """Raise UserError if one of the rows, which the file of `option` holds, takes more positions than the model has."""
    whole = ((prompts.prompt_ids(row.question) + prompts.answer_ids(row.answer), row.question) for row in rows)
    _check(model, ((len(tokens), question) for tokens, question in whole), option)


def _check(model: nn.Module, needed: Iterable[tuple[int, str]], option: str) -> None:
    """`needed`: tokens and the question that they begin with; looked at only if the model's positions end."""
    positions = Positions.of(model)
    if not positions.fixed:
        return
    tokens, question = max(needed)
    if tokens - 1 > positions.most:  # the last token of an answer needs none
        raise UserError(
            f"{option}: {_quoted(question)} and its answer take up to {tokens} tokens, but the model has {positions.most} "
            "positions"
        )


def _quoted(question: str) -> str:
    return repr(question if len(question) <= 80 else question[:77] + "...")
