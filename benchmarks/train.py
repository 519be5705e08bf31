"""`python -m benchmarks train`: forward pass, loss and backward pass of a packed batch, by layers of pmc_fast and by the model's modules.

Only the layers differ: the batch, the head and its loss are the same. Without optimizer. Of families of models, the other way is
taken just once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import families, results, step
from benchmarks.bench import OURS, Wrong
from benchmarks.limits import PRODUCT, LimitInTurns, Limits, fastest_product, measure_limits
from benchmarks.measure import PeakMemory, Spread, Stopwatch, environment, interleave, times_as_long
from benchmarks.ops import Row, table
from pmc_fast import packed_layers
from pmc_fast.flops import FORMULAS

SCHEMA = "pmc_fast.benchmarks.train/1"
MODULES, LAYERS = "pmc_fast, by modules", "pmc_fast, by its layers"


class Case:
    """A task's questions with their answers, and rows to keep, as one packed batch."""

    def __init__(self, task: step.Task, family: str | None = None) -> None:
        from pmc_fast.models import LanguageModel
        from pmc_fast.packing import pack

        self.task, self.lm, self.brief = task, LanguageModel(task.model), family is not None
        rows = [*task.forget, *task.retain]
        prompts = [task.prompts.prompt_ids(row.question) for row in rows]
        self._packed = pack(prompts, [task.prompts.answer_ids(row.answer) for row in rows], task.device)
        labels = len(self._packed.target)
        self._weight = torch.full((labels,), 1 / labels, device=task.device)
        size = f"{len(rows)} sequences, {self._packed.input_ids.shape[1]} tokens, {labels} labels"
        self.title = ", ".join(filter(None, (family, size)))

    def contestants(self) -> dict[str, Callable[[], Tensor]]:
        """Passes by pmc_fast as it is on this device, and the way that it does not go there by itself."""
        other = {MODULES: {}} if self.task.device.type in packed_layers.KERNELS else {LAYERS: {"cuda": "triton"}}
        ways = {OURS: packed_layers.KERNELS, **other}
        return {name: partial(self._pass, kernels) for name, kernels in ways.items()}

    def _pass(self, kernels: Mapping[str, str]) -> Tensor:
        """Leaves gradients in the model; the loss."""
        held, packed_layers.KERNELS = packed_layers.KERNELS, kernels
        try:
            hidden = self._packed.hidden(self.lm)
        finally:
            packed_layers.KERNELS = held
        loss = self.lm.head.collapse_loss(hidden, self._packed.target, self._weight, ignore_index=None).loss
        loss.backward()
        return loss.detach()

    def clear(self) -> None:
        """Let go of the gradients."""
        self.task.model.zero_grad(set_to_none=True)

    def gradients(self) -> list[Tensor | None]:
        """Those in the model, which lets go of them."""
        found = [parameter.grad for parameter in self.task.model.parameters()]
        self.clear()
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `step`, whose model and questions are taken."""
    step.add_arguments(parser)
    families.add_argument(parser)


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Check and measure, print a table each and write the result."""
    where, limits = environment(device, args.seed), measure_limits(device, [getattr(torch, args.dtype)])
    rows: list[Row] = []
    for family, task in families.tasks(args, device):
        task.model.train()
        rows += (new := measure(Case(task, family), args.repeats, limits))
        print(table(new))
        if args.json:
            content = {"environment": where, "config": step.options(args, task), "limits": asdict(limits)}
            content |= {"rows": [asdict(row) for row in rows], "command": args.command_line}
            results.write(args.json, SCHEMA, content)


def measure(case: Case, repeats: int, limits: Limits) -> list[Row]:
    """A row for each contestant; one that does not come to the loss and gradients of the first has no time.

    The modules are no contestant where ours are they.
    """
    dtype, device = next(case.task.model.parameters()).dtype, case.task.device
    contestants, rows, first, once = case.contestants(), {}, None, {}
    weights = sum(parameter.nbytes for parameter in case.task.model.parameters())
    for name, work in contestants.items():
        if name == MODULES and case.lm.packed_by == "modules":
            continue
        work()  # so that what is allocated once is there
        case.clear()
        with FlopCounterMode(
            display=False, custom_mapping=FORMULAS
        ) as counter:  # memory is measured without its hooks on modules
            work()
        case.clear()
        with PeakMemory(device) as peak, Stopwatch(device) as watch:
            loss = work()
        found = float(loss), case.gradients()
        first = found if first is None else first
        row = Row("training", case.title, str(dtype).removeprefix("torch."), name, flops=counter.get_total_flops())
        row = replace(row, bytes=3 * weights)  # read forward and backward, and their gradients written
        evidence = f"layers by {case.lm.packed_by}"
        try:
            if name == LAYERS and case.lm.packed_by == "modules":
                raise Wrong("its layers do not take this model")
            evidence += agreement(found, first, dtype) if name != OURS else ""
            rows[name] = replace(row, right=True, evidence=evidence, peak_bytes=peak.bytes)
        except Wrong as error:
            rows[name] = replace(row, right=False, evidence=f"{evidence}: {error}")
        if case.brief and name != OURS and rows[name].right:
            once[name] = [watch.seconds]
    del first, found

    def timed(work: Callable[[], Tensor]) -> None:
        work()
        case.clear()

    right = {name: partial(timed, contestants[name]) for name, row in rows.items() if row.right and name not in once}
    right[PRODUCT] = fastest_product(device, dtype)
    times = interleave(right, repeats, device=device, warmups=int(not case.brief))
    limit = LimitInTurns(limits, device, rows[OURS].dtype, times.pop(PRODUCT))
    for name, seconds in (times | once).items():
        spread, ratio = Spread.of(seconds), times_as_long(seconds, times[OURS])
        share = limit.share(rows[name].flops, rows[name].bytes, seconds)
        rows[name] = replace(rows[name], seconds=spread, repeats=len(seconds), ratio=ratio, share_of_limit=share)
    return list(rows.values())


def agreement(
    got: tuple[float, list[Tensor | None]], want: tuple[float, list[Tensor | None]], dtype: torch.dtype
) -> str:
    """How near a loss and its gradients are to others, in words; raises Wrong where that is not near enough."""
    loss, gradient = abs(got[0] - want[0]) / abs(want[0]), step.distance(got[1], want[1])
    said = f"loss off by {loss:.1e}, gradients by {gradient:.1e}"
    if not (loss <= step.LOSS_TOLERANCE[dtype] and gradient <= step.GRADIENT_TOLERANCE[dtype]):
        raise Wrong(said)
    return f", {said}"
