"""Warnings that name the line of whoever called this library, however deep in it they arise."""

from __future__ import annotations

import sys
import warnings
from typing import Any

# torch's decorators and ops lie between ours, and code it made, of no module; Trainers call us from within transformers.
_PASSED = ("pmc_fast", "torch", "transformers", None)


class LibraryWarning(UserWarning):
    """What `warn` gives: the command line shows its message alone, for the line is nobody's there."""


def warn(message: str) -> None:
    """A `LibraryWarning` at the innermost line that is neither this library's nor torch's or transformers'."""
    frame, level = sys._getframe(1), 2  # Python 3.12 has skip_file_prefixes for this
    while frame.f_back and _package(frame.f_globals) in _PASSED:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, LibraryWarning, stacklevel=level)


def _package(names: dict[str, Any]) -> str | None:
    name = names.get("__name__")
    return name and name.partition(".")[0]
