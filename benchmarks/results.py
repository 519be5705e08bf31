"""Result files: JSON that says what it holds and where it was measured."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pmc_fast.errors import UserError
from pmc_fast.outputs import write_file

_KINDS = ("compile", "gpu", "models", "ops", "parallel", "profile", "run", "sampling", "step", "train")
SCHEMAS = tuple(f"pmc_fast.benchmarks.{kind}/1" for kind in _KINDS)


def command_line(words: Sequence[str]) -> str:
    """The command that makes a result again; of paths only the last part, since folders differ between machines."""
    return shlex.join(["python", "-m", "benchmarks", *(Path(word).name if os.sep in word else word for word in words)])


def name_of(path: str | None) -> str | None:
    """What a result calls a file or folder that an option named: its last part."""
    return None if path is None else Path(path).name


def write(path: Path, schema: str, content: Mapping[str, object]) -> None:
    """Write `content` with the schema's name first; a reader never sees half a file."""
    write_file(path, json.dumps({"schema": schema, **content}, indent=2) + "\n")


@contextmanager
def naming(path: Path, content: Mapping[str, Any]) -> Iterator[None]:
    """Turns what reading a file of another form than its schema's raises into a UserError that names the file."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not what {content['schema']} should hold: {reason}") from error


def load(path: Path) -> dict[str, Any]:
    """The content of a result file of a known schema; raises UserError, naming the file, if it is none."""
    content = read(path)
    schema = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(schema, str) or schema not in SCHEMAS:
        raise UserError(f"{path}: schema: got {schema!r}, want one of {', '.join(SCHEMAS)}")
    return content


def read(path: Path) -> Any:
    """What a file of JSON holds; raises UserError, naming the file, if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def machine(environment: Mapping[str, Any], dtype: str | None) -> str:
    """One line of where a result was measured, with what and at which commit, as far as the file knows."""
    threads, commit = environment.get("threads"), environment.get("commit")
    torch_version = environment.get("versions", {}).get("torch")
    parts = [
        environment["device_name"],
        threads and f"{threads} thread{'' if threads == 1 else 's'}",
        torch_version and f"torch {torch_version}",
        commit and f"commit {commit['hash'][:7]}{' (changed)' if commit.get('changed') else ''}",
        dtype,
    ]
    return ", ".join(part for part in parts if part)
