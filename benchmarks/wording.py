"""How numbers of results are worded, in tables and pictures alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_COUNT = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def clock(seconds: float) -> str:
    """A time to three digits, such as 60.1 ms."""
    return _in_units(seconds, _SECONDS)


def size(count: float) -> str:
    """A number of bytes to three digits, such as 236 MB."""
    return _in_units(count, _BYTES)


def amount(count: float) -> str:
    """A large number to three digits, such as 47.1 G."""
    return _in_units(count, _COUNT)


def failure(row: Mapping[str, Any]) -> str | None:
    """Why a row of `ops` has no time, in a few words; None if it has one."""
    if row["seconds"] is not None:
        return None
    return "did not run" if row["evidence"].startswith("cannot run") else "wrong, so not timed"


def _in_units(value: float, units: Sequence[tuple[float, str]]) -> str:
    value = float(f"{value:.3g}")  # first, so that 999.9 ms is 1 s rather than 1000 ms
    if value == 0:
        return "0"
    scale, unit = next((pair for pair in units if abs(value) >= pair[0]), units[-1])
    number = value / scale
    return (f"{number:.0f} {unit}" if abs(number) >= 100 else f"{number:.3g} {unit}").rstrip()
