"""Files that results go to: whether one can be written is known before the work, and readers never see half of it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from pmc_fast.errors import UserError


def check_file(path: str | os.PathLike[str], option: str) -> None:
    """Raise UserError now rather than after the work if the file `path`, given with `option`, cannot be written."""
    path = Path(path)
    try:
        path = _target(path)
        if path.is_dir():
            raise UserError(f"{option}: {path} is a folder; want a file")
        folder = path.absolute().parent
        if not folder.is_dir():
            raise UserError(f"{option}: {folder} is no folder; want a file in one that exists")
        written = [path] if _is_special(path) else [folder, *([path] if path.exists() else [])]
        if not all(os.access(place, os.W_OK) for place in written):
            raise UserError(f"{option}: {path} cannot be written; choose another place")
    except OSError as error:  # such as a name that is too long
        raise UserError(f"{option}: {path} cannot be written: {error.strerror}") from None


def write_file(path: str | os.PathLike[str], text: str) -> None:
    """Write a file, or where a link leads, as `check_file` allowed it, whole or not at all; raises UserError if that fails now."""
    path = _target(Path(path))
    partial = path if _is_special(path) else path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        if partial != path:
            partial.replace(path)
    except OSError as error:
        if partial != path:
            with suppress(OSError):
                partial.unlink()  # a full disk has use for the room
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def _target(path: Path) -> Path:
    """The file itself, which a new one may take the place of; a link stays."""
    return path if _is_special(path) else Path(os.path.realpath(path))


def _is_special(path: Path) -> bool:
    """Whether nothing may take its place: what is there and no plain file, or the system's link to one, such as /dev/stdout."""
    of_the_system = path.is_symlink() and path.absolute().parts[1:2] in (("dev",), ("proc",))
    return path.exists() and (not path.is_file() or of_the_system)
