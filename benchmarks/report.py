"""`python -m benchmarks report`: the tables and pictures of result files."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import results, tables
from benchmarks.results import load, machine, naming
from benchmarks.wording import amount, clock, failure, size
from pmc_fast.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_OUT = Path("benchmark-report")
REPORT = "report.md"


@dataclass(frozen=True)
class Section:
    """A part of the report: Markdown, and the pictures that go with it by file name."""

    text: str
    pictures: dict[str, Figure] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `report`."""
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        metavar="RESULTS.json",
        help="what --json wrote; JSON without a schema is skipped",
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"write {REPORT} and the pictures into this folder (default: the pictures alone, into {DEFAULT_OUT})",
    )
    target.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="instead write the most important numbers between this file's two comments, and pictures beside it\n"
        "(RESULTS.json by default: all in benchmarks/results)",
    )


def run(args: argparse.Namespace) -> None:
    """Print every table and write every picture, or rewrite the README, once all files are known to be sound.

    Files that name no schema are skipped, which is said. Raises UserError for a file that is missing, is of another schema
    than those known, or whose pictures have the names of another's.
    """
    from benchmarks import pictures, readme

    paths, foreign = _told_apart(args.results or (readme.committed() if args.readme else []))
    if not paths:
        raise UserError(f"RESULTS.json: got {'none that names a schema' if foreign else 'none'}, want one or more")
    if args.readme:
        print("\n".join(map(str, readme.write(args.readme, paths))))
        _say_skipped(foreign)
        return
    found = [(path, sections(path)) for path in paths]
    _check_names(found)
    out = args.out or DEFAULT_OUT
    parts = [section for _, sections in found for section in sections]
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
    _say_skipped(foreign)


def _told_apart(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The files that a benchmark wrote, sound or not, and the JSON objects without a schema, which something else did."""
    contents = {path: results.read(path) for path in paths}
    foreign = [path for path, content in contents.items() if isinstance(content, dict) and "schema" not in content]
    return [path for path in paths if path not in foreign], foreign


def _say_skipped(paths: Sequence[Path]) -> None:
    for path in paths:
        print(f"{path}: skipped, it names no schema, so no benchmark wrote it", file=sys.stderr)


def sections(path: Path) -> list[Section]:
    """The parts of one result file; raises UserError, naming the file, if it is none."""
    content = load(path)
    with naming(path, content):
        return _SECTIONS[content["schema"]](path.stem, content)


def _check_names(found: Sequence[tuple[Path, Sequence[Section]]]) -> None:
    writers: dict[str, Path] = {}
    for path, sections in found:
        for name in (name for section in sections for name in section.pictures):
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
        text = _section_text(f"{stem}: {name}", where, tables.ops(rows), content)
        figure = pictures.bench(name, where, rows)
        parts.append(Section(text, {f"{stem}-{_slug(name)}.png": figure} if figure else {}))
    return parts + _limit_sections(stem, content)


def _limit_sections(stem: str, content: Mapping[str, Any]) -> list[Section]:
    """One section per op and dtype whose share of the machine's limits is known."""
    from benchmarks import pictures

    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in content["rows"]:
        if failure(row) is None and row.get("share_of_limit"):
            groups.setdefault((row["op"], row["dtype"]), []).append(row)
    parts = []
    for (op, dtype), rows in groups.items():
        bandwidth, peak = content["limits"]["bytes_per_s"], content["limits"]["flops_per_s"][dtype]
        name, where = f"{op} against the machine's limits, {dtype}", machine(content["environment"], dtype)
        limits = f"Limits: {amount(peak)} operations per second in {dtype}, {size(bandwidth)} copied per second."
        figure = pictures.limits(name, where, rows, peak, bandwidth)
        text = _section_text(f"{stem}: {name}", where, limits, content)
        parts.append(Section(text, {f"{stem}-{_slug(f'{op} limits {dtype}')}.png": figure}))
    return parts


def _step_sections(stem: str, content: Mapping[str, Any]) -> list[Section]:
    from benchmarks import pictures

    name = f"one micro-batch, {_about(content['config'])}"
    return [_one_picture(stem, name, content, tables.step(content), pictures.step)]


def _run_sections(stem: str, content: Mapping[str, Any]) -> list[Section]:
    from benchmarks import pictures

    name = f"a whole run, {_about(content['config'])}"
    return [_one_picture(stem, name, content, tables.run(content), pictures.run)]


def _profile_sections(stem: str, content: Mapping[str, Any]) -> list[Section]:
    from benchmarks import pictures

    draw = pictures.profile if content["phases"] else None
    return [_one_picture(stem, f"profile of {content['title']}", content, tables.profile(content), draw)]


def _one_picture(
    stem: str,
    name: str,
    content: Mapping[str, Any],
    table: str,
    draw: Callable[[str, str, Mapping[str, Any]], Figure] | None,
) -> Section:
    """A section on the whole file, with a picture of the file's name."""
    where = machine(content["environment"], content["config"].get("dtype"))
    text = _section_text(f"{stem}: {name}", where, table, content)
    return Section(text, {f"{stem}.png": draw(name, where, content)} if draw else {})


def _compile_sections(stem: str, content: Mapping[str, Any]) -> list[Section]:
    versions = content["environment"]["versions"]
    where = ", ".join(f"{package} {versions[package]}" for package in ("triton", "torch") if package in versions)
    where = f"Compiled, not run, with {where}." if where else "Compiled, not run."
    parts = []
    for (op, capability), group in groupby(content["rows"], lambda row: (row["op"], row["capability"])):
        heading = f"{stem}: kernels of {op} for sm_{capability}"
        parts.append(Section(_section_text(heading, where, tables.compiled(list(group)), content)))
    return parts


def _gpu_sections(stem: str, content: Mapping[str, Any]) -> list[Section]:
    lines = [[part["name"], part["status"], clock(part["seconds"])] for part in content["parts"]]
    text = tables.table(["part", "what became of it", "time"], lines, words=2)
    where = f"{content['minutes']:g} minutes were given on {content['device']}."
    return [Section(_section_text(f"{stem}: everything on a GPU, unattended", where, text, content))]


def _models_sections(stem: str, content: Mapping[str, Any]) -> list[Section]:
    where = f"Tiny, of random weights, float32; transformers {content['environment']['versions']['transformers']}."
    return [Section(_section_text(f"{stem}: kinds of models", where, tables.models(content), content))]


_SECTIONS: dict[str, Callable[[str, Mapping[str, Any]], list[Section]]] = {
    "pmc_fast.benchmarks.ops/1": _ops_sections,
    "pmc_fast.benchmarks.parallel/1": _ops_sections,
    "pmc_fast.benchmarks.sampling/1": _ops_sections,
    "pmc_fast.benchmarks.train/1": _ops_sections,
    "pmc_fast.benchmarks.step/1": _step_sections,
    "pmc_fast.benchmarks.run/1": _run_sections,
    "pmc_fast.benchmarks.profile/1": _profile_sections,
    "pmc_fast.benchmarks.compile/1": _compile_sections,
    "pmc_fast.benchmarks.gpu/1": _gpu_sections,
    "pmc_fast.benchmarks.models/1": _models_sections,
}


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


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-")
