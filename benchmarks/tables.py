"""The Markdown tables of `python -m benchmarks report`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.wording import OURS, amount, clock, failure, ratio, share, size

CONTESTANTS = ("published", OURS)
OPERATORS_SHOWN = 15

Content = Mapping[str, Any]

# what only some results of ops know: key, heading, wording
_OPTIONAL = (
    ("forward", "forward", lambda spread: clock(spread["median"])),
    ("flops", "operations", amount),
    ("bytes", "bytes moved", size),
    ("share_of_limit", "share of limit", share),
)


def ops(rows: Sequence[Content]) -> str:
    """One bench, and a list of those who were wrong or did not run."""
    timed = [row for row in rows if failure(row) is None]
    extra = [entry for entry in _OPTIONAL if any(row.get(entry[0]) for row in timed)]
    lines = []
    for row in timed:
        seconds = row["seconds"]
        spread = _ends((seconds["p20"], seconds["p80"]), row["repeats"], clock)
        line = [_emphasised(row["contestant"]), clock(seconds["median"]), spread]
        line += [or_dash(row["ratio"], ratio), or_dash(row["peak_bytes"], size)]
        lines.append(line + [or_dash(row.get(key), wording) for key, _, wording in extra])
    header = ["contestant", "median", "20-80 %", "times ours", "extra memory", *(heading for _, heading, _ in extra)]
    failed = [
        f"- {_emphasised(row['contestant'])} {failure(row)}: {_line(row['evidence'])}" for row in rows if failure(row)
    ]
    blocks = [table(header, lines)] if timed else []
    return "\n\n".join([*blocks, "\n".join(failed)] if failed else blocks)


def models(content: Content) -> str:
    """Kinds of models by what samples from them and trains them; then what is not done, and why."""
    rows = [row for row in content["rows"] if row["built"] == "right"]
    kinds: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        kinds.setdefault((row["decoder"] or "-", row["layers"] or "-"), []).append(row["model"])
    lines = [[*by, " ".join(f"`{name}`" for name in kinds[by])] for by in sorted(kinds)]
    why = [
        f"- `{row['model']}` is not {what}: {row[what]}"
        for row in rows
        for what in ("sampled", "trained")
        if row[what] != "right"
    ]
    others = [row["model"] for row in content["rows"] if row["built"] != "right"]
    blocks = [table(["sampled by", "trained by", "models"], lines, words=3), "\n".join(why)]
    blocks.append("Not built at these sizes: " + " ".join(f"`{name}`" for name in others) if others else "")
    return "\n\n".join(filter(None, blocks))


def step(content: Content) -> str:
    """Both contestants' micro-batch, then the ratios between them."""
    repeats = len(content["turns"][OURS])
    lines = []
    for key, title, wording in (
        ("sample_s", "sample", clock),
        ("score_s", "decode, score", clock),
        ("train_s", "train", clock),
        ("total_s", "total", clock),
        ("sampled_tokens", "sampled tokens", "{:.0f}".format),
        ("decoded_tokens", "decoded tokens", "{:.0f}".format),  # absent from results of before it was counted
        ("peak_bytes", "peak extra memory", size),
    ):
        line = [title]
        for contestant in CONTESTANTS:
            value, spread = content[contestant].get(key), content["spread"][contestant].get(key)
            line += [or_dash(value, wording), "-" if spread is None else _ends(spread, repeats, wording)]
        lines.append(line)
    ratios = []
    for key, title in (
        ("sample_per_token", "sampling, per token"),
        ("train", "training"),
        ("total_at_equal_tokens", "total, at equal tokens"),
    ):
        spread = content["spread"]["ratio"][key]
        ratios.append([title, ratio(content["ratio"][key]), _ends(spread, repeats, ratio)])
    both = table([f"median of {repeats}", "published", "20-80 %", _emphasised(OURS), "20-80 %"], lines)
    return both + "\n\n" + table(["published / pmc_fast", "ratio", "20-80 %"], ratios)


def run(content: Content) -> str:
    """Both contestants' run, of which one may not have begun, and the ratios between them."""
    begun = [name for name in CONTESTANTS if content[name] is not None]
    ratios = content["ratio"] or {}
    lines = []
    for title, value, key in (
        ("time", lambda found: clock(found["seconds"]), "seconds"),
        ("unlearn quality, before", lambda found: f"{found['before']['unlearn_quality']:.2f} %", None),
        ("unlearn quality, after", lambda found: f"{found['after']['unlearn_quality']:.2f} %", None),
        ("utility, before", lambda found: f"{found['before']['utility']:.2f} %", None),
        ("utility, after", lambda found: f"{found['after']['utility']:.2f} %", None),
        ("unlearn quality, mean over time", lambda found: f"{found['area']:.2f} %", "area"),
        ("peak extra memory", lambda found: or_dash(found["peak_bytes"], size), None),
    ):
        times = "" if key is None else or_dash(ratios.get(key), lambda value: ratio(value) + "x")
        lines.append([title, *(value(content[name]) for name in begun), times])
    unfinished = "" if content["ratio"] else "\n\nThe run was not finished, so there are no ratios."
    return table(["", *map(_emphasised, begun), "ratio"], lines) + unfinished


def profile(content: Content) -> str:
    """The phases, the operators that took longest, and on a GPU its kernels."""
    total, parts = content["seconds"], [f"{clock(content['seconds'])} under the profiler."]
    for header, key, shown in (
        ("phase", "phases", None),
        ("operator, its own time", "operators", OPERATORS_SHOWN),
        ("GPU kernel", "kernels", OPERATORS_SHOWN),
    ):
        if lines := content[key][:shown]:
            parts.append(_profiled(header, lines, total))
    return "\n\n".join(parts)


def _profiled(header: str, lines: Sequence[Content], total: float) -> str:
    columns = [
        ("seconds", "seconds", clock),
        ("seconds", "share", lambda seconds: share(seconds / total)),
        ("device_seconds", "GPU", clock),
        ("device_seconds", "GPU share", lambda seconds: share(seconds / total)),
        ("calls", "calls", str),
        ("allocated_bytes", "allocated", size),
        ("peak_bytes", "peak", size),
    ]
    columns = [column for column in columns if any(line[column[0]] for line in lines)]
    cells = [[line["name"], *(or_dash(line[key] or None, wording) for key, _, wording in columns)] for line in lines]
    return table([header, *(heading for _, heading, _ in columns)], cells)


def compiled(rows: Sequence[Content]) -> str:
    """The kernels of one file for one kind of GPU, and a list of the limits that they break."""
    lines = []
    for row in rows:
        if not row["registers"]:
            lines.append([row["kernel"], *["-"] * 6])
            continue
        products = ", ".join(f"{count} {kind}" for kind, count in row["matrix_instructions"].items())
        loads = ", ".join(f"{n} x {w}{'' if w == 'TMA' else ' B'}" for w, n in row["global_loads"].items())
        lines.append(
            [
                row["kernel"],
                str(row["registers"]),
                f"{row['spill_store_bytes']} / {row['spill_load_bytes']}",
                size(row["static_shared_bytes"] + row["dynamic_shared_bytes"]),
                f"{row['num_warps']} / {row['num_stages']}",
                products or "-",
                loads or "-",
            ]
        )
    header = ["kernel", "registers", "bytes spilled, read back", "shared memory", "warps / stages"]
    broken = [f"- {row['kernel']}: {_line(violation)}" for row in rows for violation in row["violations"]]
    tables = table([*header, "matrix products", "global loads"], lines)
    return tables + ("\n\nOver the limit:\n\n" + "\n".join(broken) if broken else "")


def table(header: Sequence[str], lines: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; the first `words` columns hold words, the others numbers."""
    ruler = [":--"] * words + ["--:"] * (len(header) - words)
    cells = [[_line(cell).replace("|", "\\|") for cell in line] for line in (header, ruler, *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _ends(ends: Sequence[float], repeats: int, wording: Callable[[float], str]) -> str:
    return "one run" if repeats == 1 else f"{wording(ends[0])} - {wording(ends[1])}"


def or_dash(value: Any, wording: Callable[[Any], str]) -> str:
    """The value in words, or that there is none."""
    return "-" if value is None else wording(value)


def _emphasised(contestant: str) -> str:
    return f"**{contestant}**" if contestant == OURS else contestant


def _line(text: str) -> str:
    """The text without line breaks, which would end a table's row or a list's item."""
    return " ".join(text.split())
