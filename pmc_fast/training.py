"""The training loops: fine-tuning, and unlearning by PMC; both resume to the bit on a CPU."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pmc_fast import inputs
from pmc_fast.config import PMCConfig
from pmc_fast.data import QA
from pmc_fast.errors import NO_DISTRIBUTION, NO_SCORES, UserError, described
from pmc_fast.phases import phase
from pmc_fast.pmc import PMC
from pmc_fast.runs import Run, is_out_of_memory

# What the random draws are for; part of each draw's seed.
_ORDER, _RETAIN, _DROPOUT = range(3)


def finetune(
    pmc: PMC,
    rows: Sequence[QA],
    config: PMCConfig,
    *,
    run: Run | None = None,
    checkpoint_every: int | None = None,
    max_grad_norm: float | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Train the model on the rows' answers; the gradient of a step is the mean of its micro-batches'.

    Args, returns and raises as for `unlearn`. max_grad_norm: clips the gradient's norm, finite and above 0; None does not.
    """

    _check_kinds(pmc, config, run)
    rows = inputs.some("rows", inputs.rows("rows", rows, pmc.prompts.is_text))

    def loss(epoch: int, batch: int, indices: list[int]) -> Tensor:
        return pmc.supervised_loss([rows[index] for index in indices])

    loop = _Loop(pmc, config, len(rows), run, checkpoint_every, max_grad_norm, mean_gradient=True)
    return loop.train(loss, "fine-tuning" if progress else None)


def unlearn(
    pmc: PMC,
    retain: Sequence[QA],
    config: PMCConfig,
    *,
    run: Run | None = None,
    checkpoint_every: int | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Unlearn the questions that `pmc` was initialised with, keeping the retain rows.

    As published: AdamW, a linear warm-up and a linear decay to 0; the gradients of a step's micro-batches are summed,
    each of `config.batch_size` forget questions and as many random retain rows. Which rows a step sees depends on
    (seed, epoch) alone, so a run resumed from its checkpoint ends like one that was never stopped.

    Args:
        pmc: initialised; the model it holds is trained in place.
        retain: rows to keep, at least one.
        config: the training-loop fields and the seed.
        run: where metrics and checkpoints go, and where to continue from; None keeps nothing.
        checkpoint_every: optimizer steps between checkpoints; None is one epoch.
        progress: show a progress bar on stderr.

    Returns:
        Seconds by phase: sample, score, train (backward and optimizer included), checkpoint; those before a resume too.

    Raises:
        UserError: an argument is of another kind, there are no rows, or one has no text, nothing was initialised, or
            `checkpoint_every` is no integer of at least 1; the loss or the model's outputs are not finite.

    Source: arXiv 2507.04219, algorithm 1 and appendix (hyperparameters).
    """

    _check_kinds(pmc, config, run)
    if pmc.ledger is None:
        raise UserError("pmc: its ledger is empty; call pmc.initialise(forget_questions) first")
    retain = inputs.some("retain", inputs.rows("retain", retain, pmc.prompts.is_text))

    def loss(epoch: int, batch: int, indices: list[int]) -> Tensor:
        draw = _generator(config.seed, _RETAIN, epoch, batch)
        chosen = draw.choice(len(retain), config.batch_size, replace=len(retain) < config.batch_size)
        return pmc.loss(indices, [retain[row] for row in chosen])

    loop = _Loop(
        pmc, config, len(pmc.ledger.questions), run, checkpoint_every, None, mean_gradient=False, prepare=pmc.prepare
    )
    return loop.train(loss, "unlearning" if progress else None)


def _check_kinds(pmc: object, config: object, run: object) -> None:
    inputs.check_pmc(pmc)
    if not isinstance(config, PMCConfig):
        raise UserError(f"config: got {described(config)}, expected a PMCConfig, such as pmc.config")
    inputs.has_method("run", run, "save_checkpoint", "a Run: pmc_fast.runs.Run(folder, options), or None")


class _Loop:
    """Epochs of micro-batches, optimizer steps, metrics and checkpoints."""

    def __init__(
        self,
        pmc: PMC,
        config: PMCConfig,
        rows: int,
        run: Run | None,
        checkpoint_every: int | None,
        max_grad_norm: float | None,
        mean_gradient: bool,
        prepare: Callable[[list[list[int]]], None] | None = None,
    ) -> None:
        self.pmc, self.config, self.rows, self.run = pmc, config, rows, run
        self.model: nn.Module = pmc.lm.model
        self.max_grad_norm, self.mean_gradient, self.prepare = max_grad_norm, mean_gradient, prepare
        self.batches = math.ceil(rows / config.batch_size)
        self.steps_per_epoch = math.ceil(self.batches / config.accumulation)
        self.steps = config.epochs * self.steps_per_epoch
        self.warmup = round(config.warmup_epochs * self.steps_per_epoch)
        every = self.steps_per_epoch if checkpoint_every is None else checkpoint_every
        self.checkpoint_every = inputs.positive("checkpoint_every", every)
        if max_grad_norm is not None and not _is_positive(max_grad_norm):
            raise UserError(f"max_grad_norm: got {max_grad_norm!r}, expected a finite number above 0 or None")
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise UserError("model: no parameter requires a gradient, expected at least one to train")
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=self.parameters[0].device.type in ("cpu", "cuda"),
        )
        self.seconds: Counter[str] = Counter()
        self.step = 0

    def train(self, loss: Callable[[int, int, list[int]], Tensor], title: str | None) -> dict[str, float]:
        from tqdm import tqdm

        self._resume()
        training = [(module, module.training) for module in self.model.modules()]
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)  # what somebody's backward pass left is no part of the first step
        try:
            with tqdm(total=self.steps, initial=self.step, desc=title, unit="step", disable=title is None) as bar:
                while self.step < self.steps:
                    record = self._step(loss)
                    if self.run:
                        self.run.log(record)
                    if self.run and (self.step % self.checkpoint_every == 0 or self.step == self.steps):
                        self._save()
                    shown = ("loss",) if self.mean_gradient else ("score", "collapse_loss", "retain_loss")
                    bar.set_postfix({name: f"{record[name]:.3f}" for name in shown}, refresh=False)
                    bar.update()
        finally:
            for module, was_training in training:
                module.training = was_training
        return dict(self.seconds)

    def _step(self, loss: Callable[[int, int, list[int]], Tensor]) -> dict[str, Any]:
        config, step = self.config, self.step
        epoch, first = step // self.steps_per_epoch, step % self.steps_per_epoch * config.accumulation
        batches = range(first, min(first + config.accumulation, self.batches))
        size = config.batch_size
        order = _generator(config.seed, _ORDER, epoch).permutation(self.rows).tolist()
        rate = config.learning_rate * rate_factor(step, self.warmup, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        stats, seconds = [], Counter()
        indices = {batch: order[batch * size : (batch + 1) * size] for batch in batches}
        if self.prepare:
            with self._step_named():
                self.prepare(list(indices.values()))
        for batch in batches:
            with self._dropout_seed(step, batch):
                with self._step_named():
                    value = loss(epoch, batch, indices[batch])
                if not math.isfinite(value.item()):
                    raise UserError(f"step {step + 1}: the loss is {value.item()}; try a lower learning rate")
                start = time.perf_counter()
                with phase("backward"):
                    (value / len(batches) if self.mean_gradient else value).backward()
            seconds.update(self.pmc.stats["seconds"])
            seconds["train"] += time.perf_counter() - start
            stats.append({**self.pmc.stats, "loss": value.item()})
        start = time.perf_counter()
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        with phase("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        seconds["train"] += time.perf_counter() - start
        self.seconds.update(seconds)
        self.step += 1
        record = {"step": self.step, "epoch": epoch + 1, "learning_rate": rate, **merge_stats(stats)}
        return {**record, "seconds": dict(seconds)}

    @contextmanager
    def _step_named(self) -> Iterator[None]:
        """What the ops raise at logits that are no numbers becomes the user's error, with the step."""
        try:
            yield
        except UserError:
            raise
        except ValueError as error:
            trained = self.step and any(what in str(error) for what in (NO_DISTRIBUTION, NO_SCORES))
            advice = "; try a lower learning rate" if trained else ""
            raise UserError(f"step {self.step + 1}: {error}{advice}") from error

    @contextmanager
    def _dropout_seed(self, step: int, batch: int) -> Iterator[None]:
        """The same dropout masks for a step whether or not the run was resumed; leaves torch's random state alone."""
        devices = [self.parameters[0].device] if self.parameters[0].device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(_generator(self.config.seed, _DROPOUT, step, batch).integers(2**63)))
            yield

    def _resume(self) -> None:
        state = self.run.load_checkpoint() if self.run else None
        if state is None:
            return
        try:
            step, seconds = state["step"], Counter({name: float(spent) for name, spent in state["seconds"].items()})
            if not 0 <= step <= self.steps or _shapes(state["model"]) != _shapes(self.model.state_dict()):
                raise ValueError
            ledger = json.loads(state["pmc"])
            self.pmc.read_state(ledger)
            self.optimizer.load_state_dict(state["optimizer"])
        except UserError as error:
            raise self.run.damaged("checkpoint.pt", str(error)) from error
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise self.run.damaged("checkpoint.pt", "it is none of this model and method") from error
        self.model.load_state_dict(state["model"])
        self.pmc.load_state_dict(ledger)
        self.step, self.seconds = step, seconds

    def _save(self) -> None:
        start = time.perf_counter()
        self.run.save_checkpoint(
            {
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "pmc": json.dumps(self.pmc.state_dict()),
                "seconds": dict(self.seconds),
            }
        )
        self.seconds["checkpoint"] += time.perf_counter() - start


def _is_positive(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < value < math.inf


def _generator(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def rate_factor(step: int, warmup: int, steps: int) -> float:
    """The learning rate's: up to 1 over the warm-up, then down to 0; never 0 at a step that is taken."""
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / (steps - warmup)


def merge_stats(stats: list[dict[str, Any]]) -> dict[str, Any]:
    """One record for the micro-batches of a step: counts are added, the rest averaged."""
    merged = {}
    for name, first in stats[0].items():
        if isinstance(first, dict):
            continue
        total = sum(one[name] for one in stats)
        merged[name] = total if isinstance(first, int) else total / len(stats)
    return merged
