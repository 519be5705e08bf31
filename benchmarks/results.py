"""Result files: JSON that says what it holds and where it was measured."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from pmc_fast.errors import UserError


def check_writable(path: Path, option: str = "--json") -> None:
    """Raise UserError now rather than after the measuring if `path`, given with `option`, cannot be written."""
    if path.is_dir():
        raise UserError(f"{option}: {path} is a folder; want a file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{option}: {folder} does not exist")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{option}: {path} cannot be written")


def command_line(words: Sequence[str]) -> str:
    """The command that makes a result again; of paths only the last part, since folders differ between machines."""
    return shlex.join(["python", "-m", "benchmarks", *(Path(word).name if os.sep in word else word for word in words)])


def name_of(path: str | None) -> str | None:
    """What a result calls a file or folder that an option named: its last part."""
    return None if path is None else Path(path).name


def write(path: Path, schema: str, content: Mapping[str, object]) -> None:
    """Write `content` with the schema's name first; a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"schema": schema, **content}, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
