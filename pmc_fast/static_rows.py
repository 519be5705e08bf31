"""The rows of a sampling call on a GPU, in fixed memory: what a step reads of them, and what it writes down."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pmc_fast import gpu
from pmc_fast.prefill import Prefill

if TYPE_CHECKING:
    from pmc_fast.pruning import Pruner

# Positions that are to be kept are allocated in multiples of this, so that calls of about the same lengths share graphs.
MULTIPLE = 32
STEPS_AHEAD = 2  # of what the host knows: it never waits for the step under way


@dataclass(frozen=True)
class Sizes:
    """What the fixed memory of a call is made for: `prompts` of up to `width` tokens, and `rows` of up to `steps` more."""

    rows: int
    prompts: int
    width: int
    steps: int

    def rounded(self) -> Sizes:
        """Those of calls that can share their memory with this one."""
        return replace(self, width=rounded(self.width), steps=rounded(self.steps))


def rounded(positions: int) -> int:
    return -(-positions // MULTIPLE) * MULTIPLE


class StaticRows:
    """The answers of a call, each in a row until it ends; all counts lie on the device.

    Attributes:
        sequence: int64 [rows], the noise that a row draws.
        prefix_row: int64 [rows], its prompt; first: the first position it sees.
        token: int64 [rows], its last token; position: its place, for the rotary embedding; step: how many it has drawn.
        running: bool [rows], whether it has not ended.
        pruned: bool [answers], which answers were stopped.
    """

    def __init__(self, sizes: Sizes, ends: Tensor) -> None:
        self._sizes, self._ends = sizes, ends
        rows, device = sizes.rows, ends.device

        def counts(dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(rows, dtype=dtype, device=device)

        # By row, and moved with it:
        self.sequence, self.prefix_row, self.first, self.token = (counts() for _ in range(4))
        self.position, self.step, self.running = counts(), counts(), counts(torch.bool)
        self._slot = counts()
        # By answer:
        self._limit, self._length, self._finished, self.pruned = (
            counts(),
            counts(),
            counts(torch.bool),
            counts(torch.bool),
        )
        self._tokens = counts()[:, None].repeat(1, sizes.steps)
        self._logprobs = torch.zeros(rows, sizes.steps, device=device)
        self._alive = torch.zeros((), dtype=torch.int64, device=device)

    def begin(self, filled: Prefill, sequence: Tensor, limit: Tensor) -> None:
        """Everything as it is before the first draw. Prompts end where the prefix ends."""
        copies = self._sizes.rows // self._sizes.prompts
        pad = self._sizes.width - filled.cache.get_seq_length()
        torch.arange(self._sizes.rows, out=self._slot)
        self.sequence.copy_(sequence)
        self._limit.copy_(limit)
        prompt = torch.arange(self._sizes.prompts, device=self._slot.device)
        self.prefix_row.copy_(prompt.repeat_interleave(copies))
        self.first.copy_((filled.padding + pad).repeat_interleave(copies))
        self.position.copy_(filled.position.repeat_interleave(copies))
        self.step.zero_()
        self.running.fill_(True)
        self._length.zero_()
        self._finished.zero_()
        self.pruned.zero_()
        self._tokens.copy_(self._ends[0].expand_as(self._tokens))
        self._logprobs.zero_()

    def record(self, token: Tensor, logprob: Tensor) -> None:
        """Write down what the first rows drew."""
        rows = len(token)
        self.token[:rows].copy_(token)
        gpu.kernels("append_token").append_token(
            token,
            logprob,
            self._slot[:rows],
            self._ends,
            self._limit,
            running=self.running[:rows],
            length=self._length,
            finished=self._finished,
            tokens=self._tokens,
            logprobs=self._logprobs,
            position=self.position[:rows],
            step=self.step[:rows],
        )
        self._alive.copy_(self.running[:rows].sum())

    def prune(self, prune: Pruner, rows: int, step: int) -> None:
        """Stop the answers that cannot be picked any more."""
        slot, running = self._slot[:rows], self.running[:rows]
        still = slot[running]
        lengths = self._length.index_copy(0, still, self._limit[still])
        stopped = prune(still, self._tokens[:, :step], lengths)
        if stopped is not None:
            self.pruned[still[stopped.to(slot.device)]] = True
            running &= ~self.pruned[slot]
        self._alive.copy_(running.sum())

    def compact(self, rows: int) -> tuple[Tensor, Tensor]:
        """Bring those of the first rows that run to the front; returns which rows moved and where to."""
        source, destination, running = _retired(~self.running[:rows])
        by_row = (self._slot, self.sequence, self.prefix_row, self.first, self.token, self.position, self.running)
        for values in by_row:
            values[destination] = values[source]
        self.running[running:] = False
        return source, destination

    def count(self) -> Counts:
        return Counts(self._alive)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """tokens [rows, T], lengths, logprobs [rows, T], finished, pruned."""
        longest = int(self._length.max())
        results = (self._tokens[:, :longest], self._length, self._logprobs[:, :longest], self._finished, self.pruned)
        return tuple(result.clone() for result in results)


def _retired(finished: Tensor) -> tuple[Tensor, Tensor, int]:
    """Which unfinished rows to copy onto which finished ones so that the unfinished come first, and how many they are.

    Moves as few rows as possible: those at the end fill the holes before it.
    """
    rows = int((~finished).sum())
    holes = finished[:rows].nonzero()[:, 0]
    movers = (~finished[rows:]).nonzero()[:, 0] + rows
    return movers, holes, rows


class Counts:
    """Reads how many rows run without waiting for the step under way: the number lags by up to STEPS_AHEAD steps."""

    def __init__(self, alive: Tensor) -> None:
        self._alive = alive
        self._noted: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._latest: int | None = None

    def forget(self) -> None:
        """The next number is to be exact."""
        self._noted.clear()
        self._latest = None

    def note(self) -> None:
        """After a step: its number is to be read later."""
        if self._alive.device.type == "cpu":
            self._latest = int(self._alive)
            return
        copy = torch.empty((), dtype=torch.int64, pin_memory=True)
        copy.copy_(self._alive, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._noted.append((copy, event))

    def latest(self) -> int:
        """Rows that ran STEPS_AHEAD steps ago, or now if nobody looked yet."""
        if self._latest is None:
            self._latest = int(self._alive)
        if len(self._noted) > STEPS_AHEAD:
            copy, event = self._noted.popleft()
            event.synchronize()
            self._latest = int(copy)
        return self._latest
