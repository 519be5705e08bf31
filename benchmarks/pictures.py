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
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from benchmarks.wording import OURS, amount, clock, failure, ratio, share, size

LOG_FROM = 20  # a longest bar this many times the shortest would leave the shortest unseen

_OURS_COLOUR, _SECOND_COLOUR, _PEER_COLOUR, _INK, _FAINT = "#7b3294", "#c3a5cf", "#b4b4bc", "#222222", "#6f6f78"
_PEER_COLOURS = ("#8c8c96", "#d7601a", "#1a7f5a", "#c9a227", "#3a78b5", "#a6483f")
_MARKERS = "osD^vPX*<>"
_PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # under text, so that no line strikes it through
_SAMPLING, _SCORING, _TRAINING = "#3a78b5", "#c9a227", "#1a7f5a"
_PARTS = (("sample_s", "sample", _SAMPLING), ("score_s", "decode, score", _SCORING), ("train_s", "train", _TRAINING))
_PHASE_COLOURS = {
    **dict.fromkeys(("prefill", "decode", "head", "sample", "prune", "retire"), _SAMPLING),
    **dict.fromkeys(("detokenise", "score"), _SCORING),
    **dict.fromkeys(("pack", "forward", "loss", "backward", "optimizer"), _TRAINING),
}
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
    """Bars of the time and extra memory of each contestant; None if no one was timed.

    Times that are far apart are dots on a logarithmic scale, on which the length of a bar would say nothing.
    """
    timed = [row for row in rows if failure(row) is None]
    if not timed:
        return None
    names = [row["contestant"] for row in timed]
    figure, panels = _bar_panels(title, where + _failures(rows), names, [row["peak_bytes"] for row in timed])
    axes = panels[0]
    logarithmic = _time_axis(axes, [row["seconds"] for row in timed])
    axes.set_title("median time, 20th to 80th percentile" + (", on a logarithmic scale" if logarithmic else ""))
    for place, row in enumerate(timed):
        seconds, colour = row["seconds"], _bar_colour(names[place])
        if logarithmic:
            axes.plot(seconds["median"], place, "o", markersize=9, color=colour)
        else:
            axes.barh(place, seconds["median"], height=0.62, color=colour)
        notes = [] if row["ratio"] is None or names[place] == OURS else [f"{ratio(row['ratio'])}x"]
        if row["repeats"] == 1:
            notes.append("one run")
        else:
            _error_bar(axes, place, seconds["median"], (seconds["p20"], seconds["p80"]))
        label = clock(seconds["median"]) + (f"  ({', '.join(notes)})" if notes else "")
        _label(axes, place, max(seconds["median"], seconds["p80"]), label)
    return figure


def _failures(rows: Sequence[Mapping[str, Any]]) -> str:
    """Who has no time, in lines of their own: why they have none is in the table."""
    whys = dict.fromkeys(why for row in rows if (why := failure(row)))
    named = (f"{why}: {'; '.join(row['contestant'] for row in rows if failure(row) == why)}" for why in whys)
    return "".join(f"\n{textwrap.fill(line, 150)}" for line in named)


@rc_context(_STYLE)
def step(title: str, where: str, content: Mapping[str, Any]) -> Figure:
    """Bars of one micro-batch's time, in its parts, and of its peak memory, of both contestants."""
    names = ["published", OURS]
    peaks = [content[name]["peak_bytes"] for name in names]
    labels = [f"{name}\n{content[name]['sampled_tokens']:.0f} tokens" for name in names]  # sampled
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
        if len(content["turns"][name]) > 1:
            _error_bar(axes, place, content[name]["total_s"], ends[place])
        _label(axes, place, max(start, ends[place][1]), clock(content[name]["total_s"]))
    axes.set_title("time of one micro-batch")
    found = content["ratio"]
    axes.set_xlabel(
        f"published / {OURS}: sampling, per token {ratio(found['sample_per_token'])}, training {ratio(found['train'])}, "
        f"total, at equal tokens {ratio(found['total_at_equal_tokens'])}",
        loc="left",
    )
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=len(_PARTS), borderaxespad=0.1, handlelength=1)
    return figure


@rc_context(_STYLE)
def run(title: str, where: str, content: Mapping[str, Any]) -> Figure:
    """Unlearn quality and utility against the seconds of training, and bars of peak memory."""
    found = {name: content[name] for name in ("published", OURS) if content[name] is not None}
    peaks = [part["peak_bytes"] for part in found.values()]
    widths = [3, 3] + ([2] if any(peaks) else [])
    figure = _figure(title, where, (9.5, 3.6))
    panels = figure.subplots(1, len(widths), width_ratios=widths)
    for axes, (measure, heading) in zip(panels, _MEASURES, strict=False):
        for name, part in found.items():
            times, values = ([point[key] for point in part["curve"]] for key in ("seconds", measure))
            front, colour = (3, _OURS_COLOUR) if name == OURS else (2, _PEER_COLOURS[0])
            axes.plot(
                times, values, "o-", markersize=4, linewidth=2, color=colour, zorder=front, label=name, clip_on=False
            )
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
def peers(groups: Mapping[str, Mapping[str, Mapping[str, float]]], machines: Sequence[str]) -> Figure:
    """Dots for how many times as long as pmc_fast each peer takes: under each bench its peers, a colour per machine."""
    colours = dict(zip(machines, _PEER_COLOURS[1:], strict=False))
    times = [value for found in groups.values() for by_machine in found.values() for value in by_machine.values()]
    lines = sum(map(len, groups.values())) + 1.4 * len(groups)
    figure = _figure("How many times as long as pmc_fast the others take", "", (9.5, 1 + 0.22 * lines))
    axes = figure.subplots()
    axes.set(xscale="log", xlim=(0.9 * min([0.6, *times]), 1.2 * max([2, *times])), ylim=(lines, 0.2))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(_ticks("{:g}x".format))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color=_OURS_COLOUR, linewidth=1.5)
    place, places = 0.0, {}
    for bench, found in groups.items():
        place += 1
        axes.annotate(
            bench,
            (0, place),
            (6, 0),
            ("axes fraction", "data"),
            "offset points",
            weight="bold",
            va="center",
            bbox=_PAPER,
        )
        for name, by_machine in found.items():
            place += 1
            places[place] = name
            for where, value in by_machine.items():
                axes.plot(value, place, "o", markersize=7, color=colours[where], alpha=0.85)
        place += 0.4
    axes.set_yticks(list(places), list(places.values()))
    axes.tick_params(axis="y", length=0)
    dots = [Line2D([], [], marker="o", linestyle="none", color=colours[where], label=where) for where in machines]
    figure.legend(handles=dots, loc="outside lower right", ncols=len(dots))
    return figure


@rc_context(_STYLE)
def profile(title: str, where: str, content: Mapping[str, Any]) -> Figure:
    """Bars of the time of each phase, and of the most that tensors held while it ran."""
    lines = content["phases"]
    names, total = [line["name"] for line in lines], content["seconds"]
    figure, panels = _bar_panels(title, where, names, [line["peak_bytes"] for line in lines], bars=0.3)
    panels[1].set_title("peak memory of tensors, beyond those before")
    axes = panels[0]
    device = [line["device_seconds"] for line in lines]
    on_device = any(seconds is not None for seconds in device)
    _linear_axis(
        axes, max(line["seconds"] for line in lines + [{"seconds": seconds or 0} for seconds in device]), clock
    )
    for place, line in enumerate(lines):
        colour = _PHASE_COLOURS.get(line["name"], _PEER_COLOUR)
        axes.barh(place, line["seconds"], height=0.62, color=colour, alpha=0.35 if on_device else 1)
        if on_device:
            axes.barh(place, device[place], height=0.3, color=colour)
        longest = max(line["seconds"], device[place] or 0)
        taken = line["seconds"] if not on_device else device[place]
        _label(axes, place, longest, f"{clock(taken)}  ({share(taken / total)})")
    heading = f"time, of {clock(total)} under the profiler"
    axes.set_title(heading + (": host (pale) and GPU (dark, in numbers)" if on_device else ""))
    return figure


@rc_context(_STYLE)
def limits(title: str, where: str, rows: Sequence[Mapping[str, Any]], peak: float, bandwidth: float) -> Figure:
    """The share of the machine's limit by size; beside it, where operations were counted, the roofline.

    A colour per contestant and a marker per size, in both.
    """
    contestants = list(dict.fromkeys(row["contestant"] for row in rows))
    sizes = list(dict.fromkeys(row["title"] for row in rows))
    peers = [name for name in contestants if _bar_colour(name) == _PEER_COLOUR]
    colours = {name: _bar_colour(name) for name in contestants}
    colours |= {name: _PEER_COLOURS[place % len(_PEER_COLOURS)] for place, name in enumerate(peers)}
    markers = {name: _MARKERS[place % len(_MARKERS)] for place, name in enumerate(sizes)}
    counted = all(row["flops"] for row in rows)
    figure = _figure(
        title, where, (12.5, 2.2 + max(2.2, 0.6 * len(sizes))) if counted else (10, 1.9 + 0.6 * len(sizes))
    )
    panels = figure.subplots(1, 1 + counted, squeeze=False, width_ratios=[1, 1][: 1 + counted])[0]

    def draw(axes: Axes, row: Mapping[str, Any], x: float, y: float) -> None:
        colour, ours = colours[row["contestant"]], row["contestant"] == OURS
        axes.plot(
            x, y, markers[row["title"]], color=colour, ms=9, markeredgecolor="white", zorder=3 + ours, clip_on=False
        )

    if counted:
        _roofline(panels[0], rows, peak, bandwidth, draw)
    axes = panels[-1]
    axes.set_title("share of the machine's limit")
    axes.set_xlim(0, max(1.05, *(1.05 * row["share_of_limit"] for row in rows)))
    axes.axvline(1, color=_INK, linewidth=1.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, place: f"{100 * value:.0f} %")
    axes.set_yticks(range(len(sizes)), [textwrap.fill(name, 34) for name in sizes])
    axes.set_ylim(len(sizes) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, pad=9)
    for row in rows:  # below one another, so that equal shares do not hide each other
        shift = 0.12 * (contestants.index(row["contestant"]) - (len(contestants) - 1) / 2)
        draw(axes, row, row["share_of_limit"], sizes.index(row["title"]) + shift)
    dots = [Line2D([], [], marker="s", linestyle="none", color=colours[name], label=name) for name in contestants]
    figure.legend(handles=dots, loc="outside right upper", labelspacing=0.8)
    return figure


def _roofline(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    peak: float,
    bandwidth: float,
    draw: Callable[[Axes, Mapping[str, Any], float, float], None],
) -> None:
    """Operations per second against operations per byte, under the limits."""
    points = [(row["flops"] / row["bytes"], row["flops"] / row["seconds"]["median"]) for row in rows]
    corner = peak / bandwidth
    left, right = _decades([corner, *(x for x, _ in points)])
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=_decades([peak, *(y for _, y in points)]))
    axes.plot([left, corner, right], [left * bandwidth, peak, peak], color=_INK, linewidth=1.5)
    for row, point in zip(rows, points, strict=True):
        draw(axes, row, *point)
    axes.set_title(f"roofline: {amount(peak)} operations/s, {size(bandwidth)}/s")
    axes.set(xlabel="operations per byte", ylabel="operations per second")
    for axis, wording in ((axes.xaxis, "{:g}".format), (axes.yaxis, amount)):
        axis.set_major_formatter(_ticks(wording))
        axis.set_minor_formatter(NullFormatter())


def _figure(title: str, where: str, inches: tuple[float, float]) -> Figure:
    """An empty picture with its title at the top and the machine at the bottom."""
    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(title, 100), x=0.01, ha="left", fontsize=11, weight="bold")
    figure.supxlabel(where, x=0.01, ha="left", fontsize=8, color=_FAINT)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def _bar_panels(
    title: str,
    where: str,
    names: Sequence[str],
    peaks: Sequence[int | None],
    labels: Sequence[str] | None = None,
    bars: float = 0.42,
) -> tuple[Figure, list[Axes]]:
    """A panel of bars for times and, where peaks are known, one with the bars of memory; a line per name, top down."""
    known = any(peak is not None for peak in peaks)
    figure = _figure(title, where, (10, 1.5 + bars * max(2, len(names))))
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
    """Ours, ours by the name of an implementation, another's."""
    if name == OURS:
        return _OURS_COLOUR
    return _SECOND_COLOUR if name.startswith(OURS + ",") else _PEER_COLOUR


def _time_axis(axes: Axes, spreads: Sequence[Mapping[str, float]]) -> bool:
    """Scale the axis to the times; whether that took a logarithmic one."""
    medians = [spread["median"] for spread in spreads]
    longest = max(max(spread["median"], spread["p80"]) for spread in spreads)
    if max(medians) <= LOG_FROM * min(medians):
        _linear_axis(axes, longest, clock)
        return False
    low = 10.0 ** math.floor(math.log10(min(spread["p20"] for spread in spreads) / 2))
    axes.set_xscale("log")
    axes.grid(True, axis="y")
    axes.set_xlim(low, low * (longest / low) ** (1 / 0.66))
    axes.xaxis.set_major_formatter(_ticks(clock))
    axes.xaxis.set_minor_formatter(NullFormatter())
    return True


def _linear_axis(axes: Axes, longest: float, wording: Callable[[float, float], str]) -> None:
    """From 0, with room for a label behind the longest bar, and in one unit."""
    axes.set_xlim(0, longest / 0.66)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(lambda value, place: wording(value, longest))


def _ticks(wording: Callable[[float], str]) -> Callable[[float, int | None], str]:
    return lambda value, place: wording(value)


def _error_bar(axes: Axes, place: int, median: float, ends: tuple[float, float]) -> None:
    reach = [[max(0.0, median - ends[0])], [max(0.0, ends[1] - median)]]
    axes.errorbar(median, place, xerr=reach, color=_INK, elinewidth=1.2, capsize=3)


def _label(axes: Axes, place: int, behind: float, text: str) -> None:
    axes.annotate(text, (behind, place), (8, 0), textcoords="offset points", va="center", bbox=_PAPER)


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Powers of ten that enclose the values and leave room at both ends."""
    return 10.0 ** math.floor(math.log10(min(values) / 1.5)), 10.0 ** math.ceil(math.log10(max(values) * 1.5))
