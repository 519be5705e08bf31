"""`python -m benchmarks report`: the tables and pictures of result files."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.wording import amount, clock, failure, size
from pmc_fast.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPS_SCHEMA = "pmc_fast.benchmarks.ops/1"
STEP_SCHEMA = "pmc_fast.benchmarks.step/1"
RUN_SCHEMA = "pmc_fast.benchmarks.run/1"
OURS = "pmc_fast"
CONTESTANTS = ("published", OURS)
DEFAULT_OUT = Path("benchmark-report")
REPORT = "report.md"

# what only some results know: key, heading, wording
_OPTIONAL = (
    ("flops", "operations", amount),
    ("bytes", "bytes moved", size),
    ("share_of_limit", "share of limit", lambda share: f"{100 * share:.0f} %"),
)


@dataclass(frozen=True)
class Section:
    """A part of the report: Markdown, and the pictures that go with it by file name."""

    text: str
    pictures: dict[str, Figure] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `report`."""
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json", help="what --json wrote")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"write {REPORT} and the pictures into this folder (default: the pictures alone, into {DEFAULT_OUT})",
    )


def run(args: argparse.Namespace) -> None:
    """Print every table and write every picture, once all files are known to be sound.

    Raises UserError for a file that is missing, is no result, or whose pictures have the names of another's.
    """
    from benchmarks import pictures

    found = {path: sections(path) for path in args.results}
    _check_names(args.results, found)
    out = args.out or DEFAULT_OUT
    parts = [section for path in found for section in found[path]]
    drawn = {name: figure for section in parts for name, figure in section.pictures.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            pictures.save(figure, out / name)
        if args.out:
            (out / REPORT).write_text("\n".join(map(_with_pictures, parts)), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror}") from error
    print("\n".join(section.text for section in parts))
    print(f"{len(drawn)} pictures in {out}", file=sys.stderr)


def sections(path: Path) -> list[Section]:
    """The parts of one result file; raises UserError, naming the file, if it is none."""
    content = load(path)
    try:
        return _SECTIONS[content["schema"]](path.stem, content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not what {content['schema']} should hold ({reason})") from error


def load(path: Path) -> dict[str, Any]:
    """The content of a result file of a known schema; raises UserError, naming the file, if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(schema, str) or schema not in _SECTIONS:
        raise UserError(f"{path}: schema: got {schema!r}, want one of {', '.join(_SECTIONS)}")
    return content


def _check_names(paths: Sequence[Path], found: Mapping[Path, list[Section]]) -> None:
    writers: dict[str, Path] = {}
    for path in paths:
        for name in (name for section in found[path] for name in section.pictures):
            if name in writers:
                raise UserError(f"{path}: {name} would be written twice, first for {writers[name]}; rename one of them")
            writers[name] = path


def _with_pictures(section: Section) -> str:
    return section.text + "".join(f"\n![{name.removesuffix('.png')}]({name})\n" for name in section.pictures)


def _ops_sections(stem: str, content: Mapping[str, Any]) -> list[Section]:
    from benchmarks import pictures

    if not content["rows"]:
        raise ValueError("rows: got none")
    parts = []
    for (op, title, dtype), group in groupby(content["rows"], lambda row: (row["op"], row["title"], row["dtype"])):
        rows = list(group)
        where = machine(content["environment"], dtype)
        name = ", ".join(filter(None, (f"{op} {title}", dtype)))
        text = _section_text(f"{stem}: {name}", where, ops_table(rows), content)
        figure = pictures.bench(name, where, rows)
        parts.append(Section(text, {f"{stem}-{_slug(name)}.png": figure} if figure else {}))
    return parts + _roofline_sections(stem, content)


def ops_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table of one bench, and a list of those who were wrong or did not run."""
    timed = [row for row in rows if failure(row) is None]
    extra = [entry for entry in _OPTIONAL if any(row.get(entry[0]) is not None for row in timed)]
    lines = []
    for row in timed:
        seconds = row["seconds"]
        line = [_emphasised(row["contestant"]), clock(seconds["median"]), _between(seconds, row["repeats"])]
        line += [_or_dash(row["ratio"], "{:.2f}".format), _or_dash(row["peak_bytes"], size)]
        lines.append(line + [_or_dash(row.get(key), wording) for key, _, wording in extra])
    header = ["contestant", "median", "20-80 %", "times ours", "extra memory", *(heading for _, heading, _ in extra)]
    failed = [
        f"- {_emphasised(row['contestant'])} {failure(row)}: {_line(row['evidence'])}" for row in rows if failure(row)
    ]
    blocks = [_table(header, lines)] if timed else []
    return "\n\n".join([*blocks, "\n".join(failed)] if failed else blocks)


def _roofline_sections(stem: str, content: Mapping[str, Any]) -> list[Section]:
    """One section per op and dtype of which operations and bytes are known."""
    from benchmarks import pictures

    groups: dict[tuple[str, str | None], list[Mapping[str, Any]]] = {}
    for row in content["rows"]:
        if failure(row) is None and row.get("flops") and row.get("bytes"):
            groups.setdefault((row["op"], row["dtype"]), []).append(row)
    limits = content.get("limits") or {}
    bandwidth = limits.get("bytes_per_s")
    parts = []
    for (op, dtype), rows in groups.items():
        peak = (limits.get("flops_per_s") or {}).get(dtype)
        known = [f"{amount(peak)} operations per second in {dtype}"] if peak else []
        known += [f"{size(bandwidth)} per second"] if bandwidth else []
        name, where = ", ".join(filter(None, (f"{op} roofline", dtype))), machine(content["environment"], dtype)
        text = _section_text(f"{stem}: {name}", where, f"Limits: {', '.join(known) or 'not known'}.", content)
        figure = pictures.roofline(name, where, rows, peak, bandwidth)
        parts.append(Section(text, {f"{stem}-{_slug(name)}.png": figure}))
    return parts


def _step_sections(stem: str, content: Mapping[str, Any]) -> list[Section]:
    from benchmarks import pictures

    where = machine(content["environment"], content["config"].get("dtype"))
    name = f"one micro-batch, {_about(content['config'])}"
    text = _section_text(f"{stem}: {name}", where, step_table(content), content)
    return [Section(text, {f"{stem}.png": pictures.step(name, where, content)})]


def step_table(content: Mapping[str, Any]) -> str:
    """The Markdown tables of one micro-batch: both contestants, then the ratios between them."""
    repeats = len(content["turns"][OURS])
    lines = []
    for key, title, wording in (
        ("sample_s", "sample", clock),
        ("score_s", "decode, score", clock),
        ("train_s", "train", clock),
        ("total_s", "total", clock),
        ("sampled_tokens", "sampled tokens", "{:.0f}".format),
        ("peak_bytes", "peak extra memory", size),
    ):
        line = [title]
        for contestant in CONTESTANTS:
            value, spread = content[contestant][key], content["spread"][contestant][key]
            line += [_or_dash(value, wording), "-" if spread is None else _ends(spread, repeats, wording)]
        lines.append(line)
    ratios = []
    for key, title in (
        ("sample_per_token", "sampling, per token"),
        ("train", "training"),
        ("total_at_equal_tokens", "total, at equal tokens"),
    ):
        ratio, spread = content["ratio"][key], content["spread"]["ratio"][key]
        ratios.append([title, f"{ratio:.2f}", _ends(spread, repeats, "{:.2f}".format)])
    both = _table([f"median of {repeats}", "published", "20-80 %", _emphasised(OURS), "20-80 %"], lines)
    return both + "\n\n" + _table(["published / pmc_fast", "ratio", "20-80 %"], ratios)


def _run_sections(stem: str, content: Mapping[str, Any]) -> list[Section]:
    from benchmarks import pictures

    where = machine(content["environment"], content["config"].get("dtype"))
    name = f"a whole run, {_about(content['config'])}"
    text = _section_text(f"{stem}: {name}", where, run_table(content), content)
    return [Section(text, {f"{stem}.png": pictures.run(name, where, content)})]


def run_table(content: Mapping[str, Any]) -> str:
    """The Markdown table of a run: both contestants, of which one may not have begun, and the ratios between them."""
    begun = [name for name in CONTESTANTS if content[name] is not None]
    ratio = content["ratio"] or {}
    lines = []
    for title, value, key in (
        ("time", lambda found: clock(found["seconds"]), "seconds"),
        ("unlearn quality, before", lambda found: f"{found['before']['unlearn_quality']:.2f} %", None),
        ("unlearn quality, after", lambda found: f"{found['after']['unlearn_quality']:.2f} %", None),
        ("utility, before", lambda found: f"{found['before']['utility']:.2f} %", None),
        ("utility, after", lambda found: f"{found['after']['utility']:.2f} %", None),
        ("unlearn quality, mean over time", lambda found: f"{found['area']:.2f} %", "area"),
        ("peak extra memory", lambda found: _or_dash(found["peak_bytes"], size), None),
    ):
        times = "" if key is None else _or_dash(ratio.get(key), "{:.2f}x".format)
        lines.append([title, *(value(content[name]) for name in begun), times])
    unfinished = "" if content["ratio"] else "\n\nThe run was not finished, so there are no ratios."
    return _table(["", *map(_emphasised, begun), "ratio"], lines) + unfinished


_SECTIONS: dict[str, Callable[[str, Mapping[str, Any]], list[Section]]] = {
    OPS_SCHEMA: _ops_sections,
    STEP_SCHEMA: _step_sections,
    RUN_SCHEMA: _run_sections,
}


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


def _about(config: Mapping[str, Any]) -> str:
    model, parameters = config.get("model"), config.get("parameters")
    parts = [
        str(model) if model else "a model",
        parameters and f"{amount(parameters)} parameters",
        f"{config['batch_size']} questions x {config['num_samples']} samples",
    ]
    return ", ".join(part for part in parts if part)


def _section_text(heading: str, where: str, body: str, content: Mapping[str, Any]) -> str:
    remake = f"\nRemake it with `{content['command']}`.\n" if content.get("command") else ""
    return f"### {heading}\n\n{where}\n\n{body}\n{remake}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruler = [":--", *["--:"] * (len(header) - 1)]
    cells = [[_line(cell).replace("|", "\\|") for cell in line] for line in (header, ruler, *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _between(seconds: Mapping[str, float], repeats: int) -> str:
    return _ends((seconds["p20"], seconds["p80"]), repeats, clock)


def _ends(ends: Sequence[float], repeats: int, wording: Callable[[float], str]) -> str:
    return "one run" if repeats == 1 else f"{wording(ends[0])} - {wording(ends[1])}"


def _or_dash(value: Any, wording: Callable[[Any], str]) -> str:
    return "-" if value is None else wording(value)


def _emphasised(contestant: str) -> str:
    return f"**{contestant}**" if contestant == OURS else contestant


def _line(text: str) -> str:
    """The text without line breaks, which would end a table's row or a list's item."""
    return " ".join(text.split())


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-")
