"""Questions and answers out of datasets of any kind: lists, torch's, Hugging Face's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pmc_fast.data import QA
from pmc_fast.errors import UserError, described


def questions(name: str, dataset: Iterable[Any]) -> list[str]:
    """The column "question"; a column of answers is not read.

    Args:
        name: what errors call the dataset.
        dataset: rows that are mappings or have attributes, such as a datasets.Dataset, a list of dicts or of ``QA``.

    Raises:
        UserError: there is no row, or one without a question that is a text.
    """
    return [question for (question,) in _columns(name, dataset, "question")]


def rows(name: str, dataset: Iterable[Any]) -> list[QA]:
    """The columns "question" and "answer". Args and raises as for ``questions``."""
    return [QA(*values) for values in _columns(name, dataset, "question", "answer")]


def _columns(name: str, dataset: Iterable[Any], *wanted: str) -> list[tuple[str, ...]]:
    if isinstance(dataset, (str, Mapping)) or not (hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")):
        raise UserError(f"{name}: got {described(dataset)}, expected a dataset: rows with {_quoted(wanted)}")
    there = getattr(dataset, "column_names", None)
    if isinstance(there, list):
        _check_columns(name, there, wanted)
        dataset = dataset.select_columns(list(wanted))  # reading the others may cost, or be what must not be seen
    # torch's datasets need not end their iteration.
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    every = (dataset[i] for i in range(len(dataset))) if sized else iter(dataset)
    found = [_values(f"{name}: row {number}", row, wanted) for number, row in enumerate(every)]
    if not found:
        raise UserError(f"{name}: got no rows, expected at least one")
    return found


def _values(where: str, row: Any, wanted: tuple[str, ...]) -> tuple[str, ...]:
    values = row
    if not isinstance(row, Mapping):  # attributes need not be in a __dict__
        values = {**getattr(row, "__dict__", {}), **{name: getattr(row, name) for name in wanted if hasattr(row, name)}}
    _check_columns(where, list(values), wanted)
    for column in wanted:
        if not isinstance(values[column], str) or not values[column].strip():
            raise UserError(f'{where}: "{column}" is {values[column]!r}, expected a text')
    return tuple(values[column] for column in wanted)


def _check_columns(where: str, there: list[str], wanted: tuple[str, ...]) -> None:
    missing = [column for column in wanted if column not in there]
    if missing:
        raise UserError(
            f"{where}: has no {_quoted(missing)}, only {_quoted(there) or 'none'}; rename a column, "
            f'with a datasets.Dataset by rename_column("...", "{missing[0]}")'
        )


def _quoted(columns: Iterable[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns)
