"""How numbers of results are worded, in tables and pictures alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

OURS = "pmc_fast"

_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_COUNT = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def clock(seconds: float, like: float | None = None) -> str:
    """A time to three digits, such as 60.1 ms; in the unit that suits `like`, so that an axis has one unit."""
    return _in_units(seconds, _SECONDS, like)


def size(count: float, like: float | None = None) -> str:
    """A number of bytes to three digits, such as 236 MB; in the unit that suits `like`."""
    return _in_units(count, _BYTES, like)


def amount(count: float) -> str:
    """A large number to three digits, such as 47.1 G."""
    return _in_units(count, _COUNT, None)


def ratio(value: float) -> str:
    """How many times one is the other: to two decimals, or to three digits if there are more before the point."""
    return f"{value:.2f}" if value < 9.995 else _three_digits(value)


def share(value: float) -> str:
    """A part of a whole in percent, such as 7.3 % and 64 %."""
    if 0 < value < 0.0005:
        return "<0.1 %"
    return f"{100 * value:.1f} %" if value < 0.0995 else f"{100 * value:.0f} %"


def failure(row: Mapping[str, Any]) -> str | None:
    """Why a row of `ops` has no time, in a few words; None if it has one."""
    if row["seconds"] is not None:
        return None
    return "did not run" if row["right"] is None else "wrong, so not timed"


def _in_units(value: float, units: Sequence[tuple[float, str]], like: float | None) -> str:
    value = float(f"{value:.3g}")  # first, so that 999.9 ms is 1 s rather than 1000 ms
    if value == 0:
        return "0"
    reference = abs(value if like is None else like)
    scale, unit = next((pair for pair in units if reference >= pair[0]), units[-1])
    return f"{_three_digits(value / scale)} {unit}".rstrip()


def _three_digits(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"
