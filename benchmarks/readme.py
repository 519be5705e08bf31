"""The README's figures: what stands between two comments there, and pictures, made from result files alone."""

from __future__ import annotations

import json
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import tables
from benchmarks.results import load, machine, naming
from benchmarks.wording import OURS, amount, clock, failure, ratio, size
from pmc_fast.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN = "<!-- numbers, written by: python -m benchmarks report --readme README.md -->"
END = "<!-- end of numbers -->"
RESULTS = Path(__file__).resolve().parent / "results"
PRUNED = "pmc_fast_pruned"  # in the results of `step`
PICTURES = "docs/pictures"  # beside the README
OPS_PICTURE = "ops.png"

FEWEST = 3  # benches of a machine that the table of ops shows

# The benches shown: op, title, dtype.
SHOWN = (
    ("sample", "160 x 49152, temperature 0.9, top-p 0.95", "float32"),
    ("sample", "160 x 128256, temperature 0.9, top-p 0.95", "float32"),
    ("linear_sample", "160 x 576 x 49152, temperature 0.9, top-k 50, top-p 0.95", "float32"),
    ("linear_sample", "160 x 3072 x 128256, temperature 0.9, top-k 50, top-p 0.95", "float32"),
    ("collapse_loss", "2048 x 576 x 49152, forward + backward", "float32"),
    ("collapse_loss", "2048 x 576 x 49152, forward + backward", "bfloat16"),
    ("collapse_loss", "557 x 2048 x 128256, forward + backward", "float32"),
    ("collapse_loss", "557 x 2048 x 128256, forward + backward", "bfloat16"),
    ("linear_logprob", "557 x 576 x 49152, forward + backward", "float32"),
    ("linear_logprob", "557 x 2048 x 128256, forward + backward", "float32"),
    ("decode_attention", "160 x 9 heads (3 of keys) x 100 x 64", "float32"),
    ("decode_attention", "160 x 24 heads (8 of keys) x 100 x 128", "float32"),
    ("packed_attention", "16 x 40 to 90 tokens x 9 heads (3 of keys) x 64, 25 shared, forward + backward", "float32"),
    ("packed_attention", "16 x 40 to 90 tokens x 9 heads (3 of keys) x 64, 25 shared, forward + backward", "bfloat16"),
    ("rouge_l_recall", "160 pairs of TOFU's length", None),
)
# The peers shown: what is used otherwise and, whoever it is, the fastest.
USUAL = {
    "sample": ["transformers"],
    "linear_sample": ["linear + transformers"],
    "collapse_loss": ["torch eager", "linear_cross_entropy"],
    "linear_logprob": ["torch eager", "linear_cross_entropy"],
    "decode_attention": ["torch sdpa"],
    "packed_attention": ["torch sdpa"],
    "rouge_l_recall": ["rouge_score"],
}

_IN_BRACKETS = (
    "In brackets: how many times as much time or memory as pmc_fast the published loop takes. For micro-batches that is per token "
    "for sampling, per picked answer with pruning, and at equal tokens for the total, since the answers that they draw differ in "
    "length."
)

_ISA = {"avx512": "AVX-512", "avx2": "AVX2"}

Content = Mapping[str, Any]
Key = tuple[str, str, str | None]


class Entry(NamedTuple):
    """One contestant of a bench; `times` as long as pmc_fast."""

    seconds: float
    times: float | None
    repeats: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Ops:
    """The benches that are shown, of one file; contestants by name."""

    machine: str
    link: str
    started: str
    benches: dict[Key, dict[str, Entry]]


@dataclass(frozen=True)
class Duel:
    """A column of a table: the published loop against pmc_fast, by row; `about` is said above the table."""

    about: str
    heading: str
    cells: dict[str, str]
    picture: tuple[str, Callable[[], Figure]] | None = None


def committed() -> list[Path]:
    """The files in `benchmarks/results`, but for those that pmc-fast wrote."""
    return [path for path in sorted(RESULTS.glob("*.json")) if "schema" in json.loads(path.read_text("utf-8"))]


def write(readme: Path, paths: Sequence[Path]) -> list[Path]:
    """Rewrite what stands between the comments, and the pictures; returns the files that were written.

    Raises UserError, before anything is written, for a bad result or a README without the comments.
    """
    from benchmarks import pictures

    text, figures = updated(readme, paths)
    drawn = {readme.parent / PICTURES / name: draw() for name, draw in figures.items()}
    try:
        (readme.parent / PICTURES).mkdir(parents=True, exist_ok=True)
        for path, figure in drawn.items():
            pictures.save(figure, path)
        readme.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--readme: {error.filename} cannot be written: {error.strerror}") from error
    return [readme, *drawn]


def updated(readme: Path, paths: Sequence[Path]) -> tuple[str, dict[str, Callable[[], Figure]]]:
    """The whole README as `write` would leave it, and what draws its pictures, by file name."""
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--readme: {readme}: {error.strerror}") from error
    if text.count(BEGIN) != 1 or END not in text.partition(BEGIN)[2]:
        raise UserError(f"--readme: {readme}: want the line {BEGIN} once, and {END} below it")
    before, _, rest = text.partition(BEGIN)
    numbers, figures = made(paths, readme.parent)
    return before + BEGIN + "\n\n" + numbers + "\n\n" + END + rest.partition(END)[2], figures


def made(paths: Sequence[Path], folder: Path) -> tuple[str, dict[str, Callable[[], Figure]]]:
    """The numbers as Markdown with links from `folder`, and what draws the pictures, by file name."""
    contents = {path: load(path) for path in paths}
    ops, duels, machines = [], [], set()
    for schema, read in _READERS.items():
        for path, content in contents.items():
            if content["schema"] == schema:
                with naming(path, content):
                    part = read(path.stem, Path(os.path.relpath(path, folder)).as_posix(), content)
                    where = content["environment"]
                    machines.add(machine({**where, "device_name": _machine(where), "commit": None}, None))
                (ops if isinstance(part, Ops) else duels).append(part)
    blocks = [
        "Measured on",
        "\n".join(f"- {where}" for where in sorted(machines)),
        _filled(
            "Medians, unless marked as one turn. Times and bytes have three digits, 1 GB is 10^9 bytes; memory is the most held at "
            "once beyond what was held before."
        ),
    ]
    if duels:
        blocks.append(_filled(_IN_BRACKETS))
    for about in dict.fromkeys(duel.about for duel in duels):
        blocks += _duels(about, sorted((duel for duel in duels if duel.about == about), key=lambda duel: duel.heading))
    figures = dict(duel.picture for duel in duels if duel.picture)
    ops = [part for part in ops if part.benches]
    if benches := _merged(ops):
        blocks += _ops(ops, benches)
        figures[OPS_PICTURE] = partial(_draw_ops, benches)
    return "\n\n".join(blocks), figures


def _filled(text: str) -> str:
    """In lines as long as the README's, no link broken."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _machine(environment: Content) -> str:
    isa = environment.get("isa", {}).get("pmc_fast") if environment.get("device") == "cpu" else None
    return ", ".join(filter(None, (environment["device_name"], _ISA.get(isa, isa))))


def _read_step(stem: str, link: str, content: Content) -> Duel:
    config, turns = content["config"], len(content["turns"][OURS])
    about = (
        f"One micro-batch of PMC, {config['batch_size']} questions x {config['num_samples']} samples, a model of "
        f"{amount(config['parameters'])} parameters:"
    )
    found = content["ratio"]
    rows = {"sampling": _versus(content, "sample_s", clock, found["sample_per_token"])}
    if PRUNED in content:
        parts = {**content, OURS: content[PRUNED]}
        rows["sampling with pruning"] = _versus(parts, "sample_s", clock, found["sample_per_pick_pruned"])
    rows |= {
        "training": _versus(content, "train_s", clock, found["train"]),
        "total": _versus(content, "total_s", clock, found["total_at_equal_tokens"]),
        "peak extra memory": _versus(content, "peak_bytes", size, _times_less(content, "peak_bytes")),
    }
    heading = f"[{_machine(content['environment'])}, {config['dtype']}]({link})" + (", one turn" if turns == 1 else "")
    return Duel(about, heading, rows)


def _read_run(stem: str, link: str, content: Content) -> Duel:
    from benchmarks import pictures

    config = content["config"]
    about = (
        f"A whole run, {config['epochs']} epochs over {config['forget_rows']} questions in micro-batches of "
        f"{config['batch_size']} x {config['num_samples']} samples, a model of {amount(config['parameters'])} parameters; "
        f"qualities of at most {config['evaluation_rows']} rows of each set:"
    )
    rows = {"time": _versus(content, "seconds", clock, _times_less(content, "seconds"))}
    for measure, title in (("unlearn_quality", "unlearn quality"), ("utility", "utility")):
        for when in ("before", "after"):
            parts = {name: content[name] and content[name][when] for name in tables.CONTESTANTS}
            rows[f"{title} {when}"] = _versus(parts, measure, "{:.1f} %".format)
    rows["peak extra memory"] = _versus(content, "peak_bytes", size, _times_less(content, "peak_bytes"))
    where = _machine(content["environment"])
    picture = partial(pictures.run, about.removesuffix(":"), machine(content["environment"], config["dtype"]), content)
    return Duel(about, f"[{where}, {config['dtype']}]({link})", rows, (f"{stem}.png", picture))


def _read_ops(stem: str, link: str, content: Content) -> Ops:
    benches: dict[Key, dict[str, Entry]] = {}
    for row in content["rows"]:
        key = row["op"], row["title"], row["dtype"]
        if key in SHOWN and failure(row) is None:
            entry = Entry(row["seconds"]["median"], row["ratio"], row["repeats"], row["peak_bytes"])
            benches.setdefault(key, {})[row["contestant"]] = entry
    environment = content["environment"]
    return Ops(_machine(environment), f"[{stem}]({link})", environment["started"], benches)


# In the order of the README.
_READERS: dict[str, Callable[[str, str, Content], Ops | Duel]] = {
    "pmc_fast.benchmarks.step/1": _read_step,
    "pmc_fast.benchmarks.run/1": _read_run,
    "pmc_fast.benchmarks.ops/1": _read_ops,
}


def _versus(content: Content, key: str, wording: Callable[[Any], str], times: float | None = None) -> str:
    theirs, ours = (tables.or_dash(_of(content, name, key), wording) for name in tables.CONTESTANTS)
    return f"{theirs} vs **{ours}**" + ("" if times is None else f" ({ratio(times)}x)")


def _times_less(content: Content, key: str) -> float | None:
    theirs, ours = (_of(content, name, key) for name in tables.CONTESTANTS)
    return theirs / ours if theirs and ours else None


def _of(content: Content, name: str, key: str) -> Any:
    """A contestant's number; None where it is not known or the contestant has not begun."""
    return None if content[name] is None else content[name][key]


def _duels(about: str, duels: Sequence[Duel]) -> list[str]:
    rows = max((duel.cells for duel in duels), key=len)  # older results may lack some
    lines = [[row, *(duel.cells.get(row, "-") for duel in duels)] for row in rows]
    header = [f"published vs {OURS}", *(duel.heading for duel in duels)]
    pictures = [f"![{duel.picture[0]}]({PICTURES}/{duel.picture[0]})" for duel in duels if duel.picture]
    return [_filled(about), tables.table(header, lines), *pictures]


def _merged(ops: Sequence[Ops]) -> dict[Key, dict[str, dict[str, Entry]]]:
    """The benches in the order in which they are shown, each by machine; the latest result of a bench is taken.

    A machine with fewer than FEWEST benches gets no column, unless none has more.
    """
    benches: dict[Key, dict[str, dict[str, Entry]]] = {key: {} for key in SHOWN}
    for part in sorted(ops, key=lambda part: part.started):
        for key, contestants in part.benches.items():
            benches[key][part.machine] = contestants
    counts = Counter(where for by_machine in benches.values() for where in by_machine)
    least = min(FEWEST, max(counts.values(), default=0))
    shown = {
        key: {w: found for w, found in by_machine.items() if counts[w] >= least} for key, by_machine in benches.items()
    }
    return {key: by_machine for key, by_machine in shown.items() if by_machine}


def _ops(ops: Sequence[Ops], benches: Mapping[Key, Mapping[str, Mapping[str, Entry]]]) -> list[str]:
    machines = _machines(benches)
    lines = []
    for (op, title, dtype), by_machine in benches.items():
        names = [OURS, *_peers(op, by_machine)]
        line = [f"`{op}`", _size(title, dtype), "<br>".join([f"**{OURS}**", *names[1:]])]
        for where in machines:
            entries = [by_machine.get(where, {}).get(name) for name in names]
            line.append("<br>".join(_time(name, entry) for name, entry in zip(names, entries, strict=True)))
            line.append("<br>".join(tables.or_dash(entry and entry.peak_bytes, size) for entry in entries))
        lines.append(line)
    header = ["op", "size", "", *(cell for where in machines for cell in (where, "memory"))]
    about = (
        "The ops at the sizes of a PMC batch, the losses with their backward pass: pmc_fast's time, then how many times as long "
        "the usual alternative takes, and the fastest of all others. All contestants are in the results: "
        f"{', '.join(part.link for part in ops)}."
    )
    picture = f"![the ops against their peers]({PICTURES}/{OPS_PICTURE})"
    return [_filled(about), tables.table(header, lines, words=3), picture]


def _size(title: str, dtype: str | None) -> str:
    """Without what the table says once for all."""
    return ", ".join(filter(None, (title.removesuffix(", forward + backward"), dtype)))


def _machines(benches: Mapping[Key, Mapping[str, Any]]) -> list[str]:
    return sorted({where for by_machine in benches.values() for where in by_machine})


def _peers(op: str, by_machine: Mapping[str, Mapping[str, Entry]]) -> list[str]:
    others = [
        {name: entry for name, entry in found.items() if not name.startswith(OURS)} for found in by_machine.values()
    ]
    usual = [name for name in USUAL[op] if any(name in found for found in others)]
    return list(dict.fromkeys(usual + [min(found, key=lambda name: found[name].seconds) for found in others if found]))


def _time(name: str, entry: Entry | None) -> str:
    if entry is None:
        return "-"
    shown = clock(entry.seconds) if name == OURS else tables.or_dash(entry.times, lambda times: f"{ratio(times)}x")
    return shown + (", one turn" if entry.repeats == 1 else "")


def _draw_ops(benches: Mapping[Key, Mapping[str, Mapping[str, Entry]]]) -> Figure:
    """The first bench of each op and dtype."""
    from benchmarks import pictures

    groups: dict[tuple[str, str | None], tuple[str, dict[str, dict[str, float]]]] = {}
    for (op, title, dtype), by_machine in benches.items():
        times = {
            name: {
                where: found[name].times for where, found in by_machine.items() if name in found and found[name].times
            }
            for name in _peers(op, by_machine)
        }
        groups.setdefault((op, dtype), (f"{op}  {_size(title, dtype)}", times))
    return pictures.peers(dict(groups.values()), _machines(benches))
