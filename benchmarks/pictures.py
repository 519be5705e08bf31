"""The pictures of `python -m benchmarks report`, in one style."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from benchmarks.wording import amount, clock, failure, size

OURS = "pmc_fast"
LOG_FROM = 20  # a longest bar this many times the shortest would leave the shortest unseen

_OURS_COLOUR, _PEER_COLOUR, _INK, _FAINT = "#7b3294", "#b4b4bc", "#222222", "#6f6f78"
_PEER_COLOURS = ("#8c8c96", "#d7601a", "#1a7f5a", "#c9a227", "#3a78b5", "#a6483f")
_MARKERS = "osD^vPX*<>"
_PARTS = (("sample_s", "sample", "#3a78b5"), ("score_s", "decode, score", "#c9a227"), ("train_s", "train", "#1a7f5a"))
_MEASURES = (("unlearn_quality", "unlearn quality, %"), ("utility", "utility, %"))
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "text.parse_math": False,  # a dollar sign in a title is a dollar sign
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6ea",
    "grid.linewidth": 0.8,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
}


def save(figure: Figure, path: Path) -> None:
    """Write a picture as PNG."""
    with rc_context(_STYLE):  # ticks are made when they are drawn
        figure.savefig(path, dpi=130, facecolor="white")


@rc_context(_STYLE)
def bench(title: str, where: str, rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Bars of the time and extra memory of each contestant; None if no one was timed."""
    timed = {place: row for place, row in enumerate(rows) if failure(row) is None}
    if not timed:
        return None
    names = [row["contestant"] for row in rows]
    peaks = [row["peak_bytes"] for row in rows]
    figure, panels = _bar_panels(title, where, names, peaks)
    axes = panels[0]
    spreads = {place: row["seconds"] for place, row in timed.items()}
    logarithmic = _time_axis(axes, list(spreads.values()))
    axes.set_title("median time, 20th to 80th percentile" + (", on a logarithmic scale" if logarithmic else ""))
    for place, row in timed.items():
        seconds = spreads[place]
        axes.barh(place, seconds["median"], height=0.62, color=_bar_colour(names[place]))
        _error_bar(axes, place, seconds["median"], (seconds["p20"], seconds["p80"]))
        times = "" if row["ratio"] is None or names[place] == OURS else f"  ({row['ratio']:.3g}x)"
        _label(axes, place, max(seconds["median"], seconds["p80"]), clock(seconds["median"]) + times)
    for place, row in enumerate(rows):
        if place not in timed:
            axes.text(0.01, place, failure(row), transform=axes.get_yaxis_transform(), va="center", color=_FAINT)
    return figure


@rc_context(_STYLE)
def step(title: str, where: str, content: Mapping[str, Any]) -> Figure:
    """Bars of one micro-batch's time, in its parts, and of its peak memory, of both contestants."""
    names = ["published", OURS]
    peaks = [content[name]["peak_bytes"] for name in names]
    labels = [f"{name}\n{content[name]['sampled_tokens']:.0f} tokens" for name in names]
    figure, panels = _bar_panels(title, where, names, peaks, labels)
    axes = panels[0]
    ends = [content["spread"][name]["total_s"] for name in names]
    lengths = [sum(content[name][key] for key, _, _ in _PARTS) for name in names]
    longest = max(*lengths, *(high for _, high in ends))
    _linear_axis(axes, longest, clock)
    for place, name in enumerate(names):
        start = 0.0
        for key, part, colour in _PARTS:
            seconds = content[name][key]
            axes.barh(place, seconds, left=start, height=0.5, color=colour, label=None if place else part)
            if seconds > 0.12 * longest:  # enough room for the words
                middle = start + seconds / 2
                axes.text(middle, place, clock(seconds), ha="center", va="center", color="white", weight="bold")
            start += seconds
        low, high = ends[place]
        _error_bar(axes, place, content[name]["total_s"], (low, high))
        _label(axes, place, max(start, high), clock(content[name]["total_s"]))
    axes.set_title("time of one micro-batch")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=len(_PARTS), borderaxespad=0.1, handlelength=1)
    return figure


@rc_context(_STYLE)
def run(title: str, where: str, content: Mapping[str, Any]) -> Figure:
    """Unlearn quality and utility against the seconds of training, and bars of peak memory."""
    found = {name: content[name] for name in ("published", OURS) if content[name] is not None}
    peaks = [part["peak_bytes"] for part in found.values()]
    widths = [3, 3] + ([2] if any(peaks) else [])
    figure = _figure(title, where, (11.5, 3.9))
    panels = figure.subplots(1, len(widths), width_ratios=widths)
    for axes, (measure, heading) in zip(panels, _MEASURES, strict=False):
        for name, part in found.items():
            times, values = ([point[key] for point in part["curve"]] for key in ("seconds", measure))
            front, colour = (3, _OURS_COLOUR) if name == OURS else (2, _PEER_COLOURS[0])
            axes.plot(times, values, "o-", markersize=4, linewidth=2, color=colour, zorder=front, label=name)
        axes.set_title(heading)
        axes.set_ylim(-3, 103)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("seconds of training")
    panels[1].legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=2, borderaxespad=0.1, handlelength=1.5)
    if any(peaks):
        _name_axis(panels[2], list(found), list(found))
        _memory_bars(panels[2], list(found), peaks, height=0.4)
        panels[2].set_ylim(len(found) - 0.4, -0.6)
    return figure


@rc_context(_STYLE)
def roofline(
    title: str, where: str, rows: Sequence[Mapping[str, Any]], peak: float | None, bandwidth: float | None
) -> Figure:
    """Operations per second against operations per byte: a colour per contestant, a marker per size, the limits."""
    contestants = list(dict.fromkeys(row["contestant"] for row in rows))
    sizes = list(dict.fromkeys(row["title"] for row in rows))
    peers = [name for name in contestants if name != OURS]
    colours = {name: _PEER_COLOURS[place % len(_PEER_COLOURS)] for place, name in enumerate(peers)}
    colours[OURS] = _OURS_COLOUR
    markers = {name: _MARKERS[place % len(_MARKERS)] for place, name in enumerate(sizes)}
    figure = _figure(title, where, (10, 5))
    axes = figure.subplots()
    points = [(row["flops"] / row["bytes"], row["flops"] / row["seconds"]["median"]) for row in rows]
    for row, point in zip(rows, points, strict=True):
        style = {"marker": markers[row["title"]], "color": colours[row["contestant"]]}
        axes.plot(*point, **style, markersize=9, markeredgecolor="white", linestyle="none", zorder=3)
    across, up = ([point[axis] for point in points] for axis in (0, 1))
    left, right = _decades(across + ([peak / bandwidth] if peak and bandwidth else []))
    roof = [min(x * bandwidth if bandwidth else math.inf, peak or math.inf) for x in (left, right)]
    bottom, top = _decades(up + ([peak] if peak else [y for y in roof if y < math.inf]))
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    limits = []
    if bandwidth or peak:
        corner = [peak / bandwidth] if peak and bandwidth and left < peak / bandwidth < right else []
        axes.plot([left, *corner, right], [roof[0], *[peak] * len(corner), roof[1]], color=_INK, linewidth=1.5)
        words = [f"{amount(peak)} operations/s"] if peak else []
        words += [f"{size(bandwidth)}/s"] if bandwidth else []
        limits.append(Line2D([], [], color=_INK, linewidth=1.5, label="limit: " + ", ".join(words)))
    axes.set(xlabel="operations per byte", ylabel="operations per second")
    for axis, wording in ((axes.xaxis, "{:g}".format), (axes.yaxis, amount)):
        axis.set_major_formatter(_ticks(wording))
        axis.set_minor_formatter(NullFormatter())
    dots = [Line2D([], [], marker="s", linestyle="none", color=colours[name], label=name) for name in contestants]
    shapes = [
        Line2D([], [], marker=markers[name], linestyle="none", color=_FAINT, label=textwrap.fill(name, 36))
        for name in sizes
    ]
    figure.legend(handles=[*limits, *dots, *shapes], loc="outside right upper", labelspacing=0.8)
    return figure


def _figure(title: str, where: str, inches: tuple[float, float]) -> Figure:
    """An empty picture with its title at the top and the machine at the bottom."""
    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(title, 100), x=0.01, ha="left", fontsize=11, weight="bold")
    figure.supxlabel(where, x=0.01, ha="left", fontsize=8, color=_FAINT)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def _bar_panels(
    title: str, where: str, names: Sequence[str], peaks: Sequence[int | None], labels: Sequence[str] | None = None
) -> tuple[Figure, list[Axes]]:
    """A panel of bars for times and, where peaks are known, one with the bars of memory; a line per name, top down."""
    known = any(peak is not None for peak in peaks)
    figure = _figure(title, where, (10, 1.5 + 0.42 * max(2, len(names))))
    panels = list(
        figure.subplots(1, 2 if known else 1, sharey=True, squeeze=False, width_ratios=[3, 2][: 1 + known])[0]
    )
    _name_axis(panels[0], names, labels or [textwrap.fill(name, 26) for name in names])
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    if known:
        _memory_bars(panels[1], names, peaks)
        panels[1].tick_params(axis="y", length=0)
    return figure, panels


def _name_axis(axes: Axes, names: Sequence[str], labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), labels)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    for name, label in zip(names, axes.get_yticklabels(), strict=True):
        if name == OURS:
            label.set(weight="bold", color=_OURS_COLOUR)


def _memory_bars(axes: Axes, names: Sequence[str], peaks: Sequence[int | None], height: float = 0.62) -> None:
    axes.set_title("peak extra memory")
    axes.grid(False, axis="y")
    _linear_axis(axes, max(peak or 0 for peak in peaks) or 1, size)
    for place, peak in enumerate(peaks):
        if peak is not None:
            axes.barh(place, peak, height=height, color=_bar_colour(names[place]))
            _label(axes, place, peak, size(peak))


def _bar_colour(name: str) -> str:
    return _OURS_COLOUR if name == OURS else _PEER_COLOUR


def _time_axis(axes: Axes, spreads: Sequence[Mapping[str, float]]) -> bool:
    """Scale the axis to the times; whether that took a logarithmic one."""
    medians = [spread["median"] for spread in spreads]
    longest = max(max(spread["median"], spread["p80"]) for spread in spreads)
    if max(medians) <= LOG_FROM * min(medians):
        _linear_axis(axes, longest, clock)
        return False
    low = 10.0 ** math.floor(math.log10(min(spread["p20"] for spread in spreads) / 2))
    axes.set_xscale("log")
    axes.set_xlim(low, low * (longest / low) ** (1 / 0.72))
    axes.xaxis.set_major_formatter(_ticks(clock))
    axes.xaxis.set_minor_formatter(NullFormatter())
    return True


def _linear_axis(axes: Axes, longest: float, wording: Callable[[float], str]) -> None:
    """From 0, with room for a label behind the longest bar."""
    axes.set_xlim(0, longest / 0.72)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(_ticks(wording))


def _ticks(wording: Callable[[float], str]) -> Callable[[float, int | None], str]:
    return lambda value, place: wording(value)


def _error_bar(axes: Axes, place: int, median: float, ends: tuple[float, float]) -> None:
    reach = [[max(0.0, median - ends[0])], [max(0.0, ends[1] - median)]]
    axes.errorbar(median, place, xerr=reach, color=_INK, elinewidth=1.2, capsize=3)


def _label(axes: Axes, place: int, behind: float, text: str) -> None:
    axes.annotate(text, (behind, place), (6, 0), textcoords="offset points", va="center")


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Powers of ten that enclose the values and leave room at both ends."""
    return 10.0 ** math.floor(math.log10(min(values) / 1.5)), 10.0 ** math.ceil(math.log10(max(values) * 1.5))
