"""`python -m benchmarks parallel`: the ops with a head in parts over several gloo ranks, against the same ops on one of them."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import results
from benchmarks.bench import OURS, Wrong, relative_error
from benchmarks.head import HeadInputs, random_head
from benchmarks.measure import PeakMemory, Spread, environment, times_as_long
from benchmarks.ops import Row, table
from benchmarks.shapes import DECODE_ROWS, LABEL_ROWS, SMOLLM2_135M, Head
from pmc_fast.errors import UserError

SCHEMA = "pmc_fast.benchmarks.parallel/1"

_TOLERANCE = 1e-4  # of values and gradients, relative: float32 sums in another order


@dataclass(frozen=True)
class Case:
    """One op at one size: with gradients, if it is a loss."""

    op: str
    rows: int
    head: Head
    spread: float  # of the logits
    about: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def title(self) -> str:
        return f"{self.rows} x {self.head.hidden} x {self.head.vocab}, {self.about}"

    def run(self, ops: Any, inputs: HeadInputs, target: Tensor, **shards: Any) -> tuple[Tensor, ...]:
        """What `ops`, the module of the op, gives: a loss and the gradients of hidden and weight, or tokens."""
        op = getattr(ops, self.op)
        if self.op == "linear_sample":
            return (op(inputs.hidden, inputs.weight, seed=1, **self.options, **shards).token,)
        if self.op == "linear_logprob":
            value = op(inputs.hidden, inputs.weight, target, ignore_index=None, **shards).mean()
        else:
            weight = torch.full((self.rows,), 1 / self.rows)
            value = op(inputs.hidden, inputs.weight, target, weight, ignore_index=None, **shards).loss
        gradients = torch.autograd.grad(value, [inputs.hidden, inputs.weight])
        return value.detach(), *(gradient.detach() for gradient in gradients)


def cases(divide: int = 1) -> list[Case]:
    """The sizes of a PMC batch with the head of SmolLM2-135M, all divided by `divide`."""
    head = Head(SMOLLM2_135M.name, SMOLLM2_135M.vocab // divide, SMOLLM2_135M.hidden // divide)
    labels, rows = LABEL_ROWS // divide, DECODE_ROWS // divide
    truncated = {"temperature": 0.9, "top_k": 50, "top_p": 0.95}
    return [
        Case("linear_logprob", labels, head, 2.0, "forward + backward"),
        Case("collapse_loss", labels, head, 2.0, "forward + backward"),
        Case("linear_sample", rows, head, 4.0, "no truncation"),
        Case("linear_sample", rows, head, 4.0, "temperature 0.9, top-k 50, top-p 0.95", truncated),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `parallel` besides those of every benchmark, whose --threads are those of each rank."""
    parser.add_argument("--ranks", type=int, default=2, metavar="R", help="processes that share the head (default: 2)")
    parser.add_argument(
        "--divide", type=int, default=1, metavar="N", help="every size by this, to try the command out (default: 1)"
    )


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Check and measure every case over the ranks, print a table each, and write the result."""
    if device.type != "cpu":
        raise UserError(f"--device: got {device}, want cpu: the ranks are gloo's")
    if args.ranks < 2:
        raise UserError(f"--ranks: got {args.ranks}, want 2 or more")
    if not 1 <= args.divide <= DECODE_ROWS:
        raise UserError(f"--divide: got {args.divide}, want 1 to {DECODE_ROWS}")
    torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 1) // args.ranks))
    where = environment(device, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        options = (args.ranks, torch.get_num_threads(), args.seed, args.repeats, args.divide, folder)
        torch.multiprocessing.spawn(_rank, options, nprocs=args.ranks)
        result = json.loads((Path(folder) / "result.json").read_text())
    if "wrong" in result:
        raise Wrong(result["wrong"])
    rows = [Row(**{**row, "seconds": Spread(**row["seconds"])}) for row in result["rows"]]
    for first in range(0, len(rows), 2):
        print(table(rows[first : first + 2]))
    if args.json:
        config = {"ranks": args.ranks, "threads_per_rank": torch.get_num_threads(), "repeats": args.repeats}
        content = {"environment": where, "config": config, "rows": [asdict(row) for row in rows]}
        results.write(args.json, SCHEMA, {**content, "command": args.command_line})


def _rank(rank: int, ranks: int, threads: int, seed: int, repeats: int, divide: int, folder: str) -> None:
    """One of the processes; the first leaves the rows of all cases, or what is wrong, in the folder."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        content: dict[str, Any] = {"rows": []}
        try:
            for case in cases(divide):
                content["rows"] += [asdict(row) for row in _measure(case, rank, ranks, seed, repeats)]
        except Wrong as error:  # on all ranks
            content["wrong"] = str(error)
        if rank == 0:
            (Path(folder) / "result.json").write_text(json.dumps(content))
    finally:
        dist.destroy_process_group()
    os._exit(0)  # threads of gloo may abort while Python ends: docs/distributed.md


def _measure(case: Case, rank: int, ranks: int, seed: int, repeats: int) -> list[Row]:
    from pmc_fast import ops, parallel

    cpu = torch.device("cpu")
    whole = random_head(case.rows, case.head, torch.float32, seed, cpu, case.spread)
    target = torch.randint(case.head.vocab, (case.rows,), generator=torch.Generator().manual_seed(seed + 1))
    part = HeadInputs(whole.hidden.clone(), whole.weight.tensor_split(ranks)[rank].clone(), None)
    for tensor in (whole.hidden, whole.weight, part.hidden, part.weight):
        tensor.requires_grad_(case.op != "linear_sample")
    shards = parallel.VocabShards.of(part.weight, vocab=case.head.vocab)
    runs: dict[str, Callable[[], tuple[Tensor, ...] | None]] = {
        OURS: lambda: case.run(ops, whole, target) if rank == 0 else None,
        f"pmc_fast.parallel, {ranks} ranks": lambda: case.run(parallel, part, target, shards=shards),
    }
    evidence = _agreement(case, case.run(ops, whole, target), runs[list(runs)[1]](), shards)
    peaks = {}
    for name, call in runs.items():
        with PeakMemory(cpu) as peak:
            call()
        peaks[name] = None if peak.bytes is None else int(_most(peak.bytes if name != OURS or rank == 0 else 0))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name in list(runs) if turn % 2 else reversed(runs):
            dist.barrier()
            start = time.perf_counter()
            runs[name]()
            times[name].append(_most(time.perf_counter() - start))
    return [
        Row(
            case.op,
            case.title,
            "float32",
            name,
            True,
            evidence if name != OURS else "",
            Spread.of(seconds),
            repeats,
            times_as_long(seconds, times[OURS]),
            peaks[name],
        )
        for name, seconds in times.items()
    ]


def _agreement(case: Case, want: tuple[Tensor, ...], got: tuple[Tensor, ...], shards: Any) -> str:
    """How it was seen that both compute the same; raises Wrong on all ranks if on one of them they do not."""
    if case.op == "linear_sample":
        different = int(_most(int((want[0] != got[0]).sum())))
        if different:
            raise Wrong(f"{case.op} {case.title}: {different} of {case.rows} tokens differ")
        return "the same tokens"
    value, hidden, weight = want
    wanted = {"value": value, "d_hidden": hidden, "d_weight": weight[shards.begin : shards.end]}
    errors = {name: _most(relative_error(x, y)) for x, (name, y) in zip(got, wanted.items(), strict=True)}
    said = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    if not max(errors.values()) <= _TOLERANCE:
        raise Wrong(f"{case.op} {case.title}: {said}")
    return said


def _most(value: float) -> float:
    """The largest of all ranks' values."""
    most = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)
