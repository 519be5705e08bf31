"""What callers give, as plain lists: indices of questions, texts, rows, parts of a state. Anything else is a UserError that says where."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import getattr_static
from numbers import Integral
from typing import Any

from pmc_fast.data import QA
from pmc_fast.errors import UserError, described

_FIELDS = ("question", "answer")
_ROWS = "a list of rows with question and answer"

IsText = Callable[[object], bool]


def indices(name: str, values: Iterable[Any], count: int) -> list[int]:
    """Integers in [0, count): out of a list, a tensor, whatever can be iterated over."""
    wanted = f"one of the {count} forget questions, an integer from 0 to {count - 1}"
    if not _is_list(values := plain(values)):
        raise UserError(f"{name}: got index {reprlib.repr(values)}, expected a list or a tensor of them, each {wanted}")
    found = []
    for value in map(plain, values):
        if isinstance(value, bool) or not hasattr(value, "__index__") or not 0 <= operator.index(value) < count:
            raise UserError(f"{name}: got index {reprlib.repr(value)}, expected {wanted}")
        found.append(operator.index(value))
    return found


def batches(values: Iterable[Any]) -> list[Any]:
    """The micro-batches of an optimizer step."""
    return listed("batches", values, "a list of micro-batches, each of them indices of forget questions")


def texts(name: str, values: Iterable[Any], is_text: IsText) -> list[Any]:
    """Those that `is_text` takes for texts."""
    found = listed(name, values, "a list of texts")
    for number, value in enumerate(found):
        if not is_text(value):
            raise UserError(f"{name}: number {number} is {_no_text(value)}")
    return found


def is_text(value: object) -> bool:
    """Whether it is a text, be it blank."""
    return isinstance(value, str)


def counts(name: str, values: Iterable[Any]) -> list[int]:
    """Integers of at least 0."""
    wanted = "an integer of at least 0"
    found = listed(name, values, f"a list, of each {wanted}")
    for number, value in enumerate(found):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UserError(f"{name}: number {number} is {described(value)}, expected {wanted}")
    return found


def positive(name: str, value: int) -> int:
    """An integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise UserError(f"{name}: got {described(value)}, expected an integer of at least 1")
    return int(value)


def fields(name: str, value: Any, names: Sequence[str], source: str) -> list[Any]:
    """The values of a dict with these keys and no others, which `source` made."""
    if not isinstance(value, dict) or value.keys() != set(names):
        got = f"a dict of {', '.join(map(repr, value)) or 'nothing'}" if isinstance(value, dict) else described(value)
        raise UserError(f"{name}: got {got}, expected what {source} returned, a dict of {', '.join(map(repr, names))}")
    return [value[key] for key in names]


def rows(name: str, values: Iterable[Any], is_text: IsText) -> list[QA]:
    """Questions and answers, out of objects that have both as attributes or mappings that have both as keys."""
    return [_row(f"{name}: row {number}", row, is_text) for number, row in enumerate(listed(name, values, _ROWS))]


def listed(name: str, values: Any, wanted: str) -> list[Any]:
    """A list of what can be iterated over, which a text or a mapping is not meant to be."""
    if not _is_list(values := plain(values)):
        raise UserError(f"{name}: got {described(values)}, expected {wanted}")
    return list(values)


def some(name: str, found: list[Any]) -> list[Any]:
    """The same list, which must not be empty."""
    if not found:
        raise UserError(f"{name}: got none, expected at least one")
    return found


def has_method(name: str, value: object, method: str, wanted: str, *, required: bool = False) -> None:
    """That an object, if it is given or required, has what is called of it."""
    # A class has its objects' methods, too, which only an object can be asked for.
    unbound = isinstance(value, type) and not isinstance(
        getattr_static(value, method, None), staticmethod | classmethod
    )
    if (required or value is not None) and (unbound or not callable(getattr(value, method, None))):
        got = f"the class {value.__name__}" if isinstance(value, type) else described(value)
        raise UserError(f"{name}: got {got}, expected {wanted}")


def check_pmc(value: object) -> None:
    """That it is a PMC, or does what one does."""
    has_method("pmc", value, "supervised_loss", "a PMC: pmc_fast.PMC(model, tokenizer)", required=True)


def plain(value: Any) -> Any:
    """What tensors and arrays hold, as Python's own numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_list(values: Any) -> bool:
    """Whether it is more than one value: a text is one, and so is a mapping."""
    return isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping)


def _row(where: str, row: Any, is_text: IsText) -> QA:
    held = row if isinstance(row, Mapping) else {name: getattr(row, name) for name in _FIELDS if hasattr(row, name)}
    if any(name not in held for name in _FIELDS):
        raise UserError(
            f"{where} is of type {type(row).__name__}, expected question and answer: pmc_fast.data.QA(question, answer), or "
            "a dict with both"
        )
    for name in _FIELDS:
        if not is_text(held[name]):
            raise UserError(f"{where}: its {name} is {_no_text(held[name])}")
    return QA(*(held[name] for name in _FIELDS))


def _no_text(value: object) -> str:
    wanted = "a text"
    if isinstance(value, str):
        wanted = "UTF-8 text, without half of a surrogate pair" if value.strip() else "a text that is not blank"
    return f"{described(value)}, expected {wanted}"
