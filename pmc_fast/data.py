"""Question/answer rows in JSON lines files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pmc_fast.errors import UserError, described


@dataclass(frozen=True)
class QA:
    """A question and its answer; `where` is the file and line that they were read from, "" if from none."""

    question: str
    answer: str
    where: str = field(default="", compare=False, repr=False)


def read_jsonl(path: str | os.PathLike[str]) -> list[QA]:
    """Read one object with "question" and "answer" per line; other keys and blank lines are skipped.

    Raises UserError, with file and line number, for a file that cannot be read or holds no rows, a line that is not
    UTF-8, not JSON or not an object, and a question or answer that is missing, not a string, or blank.
    """
    path = _path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; want a JSON lines file with question and answer") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); want a JSON lines file") from None
    rows = [_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: the file is empty; want at least one line with question and answer")
    return rows


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[QA]) -> None:
    """Write rows so that `read_jsonl(path) == list(rows)`; missing folders are made.

    Raises UserError, before anything is written, for no rows, rows that are none or that `read_jsonl` would refuse, and for
    a file that cannot be written.
    """
    path, lines = _path(path), []
    if not isinstance(rows, Iterable):
        raise UserError(f"rows: got {described(rows)}, expected a list of QA")
    for number, row in enumerate(rows):
        if not isinstance(row, QA):
            raise UserError(f"rows: row {number} is {described(row)}, expected a QA")
        record = {"question": row.question, "answer": row.answer}
        for key in record:
            _text(record, key, f"rows: row {number}")
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    if not lines:
        raise UserError("rows: got none, expected at least one")
    text = "".join(lines).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def is_utf8(text: str) -> bool:
    """Whether a text can be written and tokenized: half of a surrogate pair cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"path: got {described(path)}, expected the name of a file")
    return Path(path)


def _row(line: bytes, where: str) -> QA:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start} of the line)") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f'{where}: got {described(record)}, want an object {{"question": ..., "answer": ...}}')
    return QA(_text(record, "question", where), _text(record, "answer", where), where)


def _text(record: dict, key: str, where: str) -> str:
    if key not in record:
        raise UserError(f'{where}: no "{key}"; want an object {{"question": ..., "answer": ...}}')
    value = record[key]
    if not isinstance(value, str):
        raise UserError(f'{where}: "{key}" is {described(value)}, want a string')
    if not value.strip():
        raise UserError(f'{where}: "{key}" is empty')
    if not is_utf8(value):
        raise UserError(f'{where}: "{key}" is not UTF-8 text: it holds half of a surrogate pair')
    return value
