"""Result files: JSON that says what it holds and where it was measured."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from pmc_fast.outputs import write_file


def command_line(words: Sequence[str]) -> str:
    """The command that makes a result again; of paths only the last part, since folders differ between machines."""
    return shlex.join(["python", "-m", "benchmarks", *(Path(word).name if os.sep in word else word for word in words)])


def name_of(path: str | None) -> str | None:
    """What a result calls a file or folder that an option named: its last part."""
    return None if path is None else Path(path).name


def write(path: Path, schema: str, content: Mapping[str, object]) -> None:
    """Write `content` with the schema's name first; a reader never sees half a file."""
    write_file(path, json.dumps({"schema": schema, **content}, indent=2) + "\n")
