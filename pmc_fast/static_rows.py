"""The answers of a sampling call on a GPU and the rows of their texts, in fixed memory: what a step reads and writes down."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
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
    """What the fixed memory of a call is made for: `prompts` of up to `width` tokens, and `rows` of up to `steps` more.

    There is a row for each answer, since in the end each may say something else.
    """

    rows: int
    prompts: int
    width: int
    steps: int

    def rounded(self) -> Sizes:
        """Those of calls that can share their memory with this one."""
        return replace(self, width=rounded(self.width), steps=rounded(self.steps))


def known_positions(of: StaticRows, rows: int) -> Tensor:
    """Of the first rows; 0 for those without a text, which count on, perhaps beyond what the model has learned."""
    return of.position[:rows] * (torch.arange(rows, device=of.position.device) < of.texts)


def rounded(positions: int) -> int:
    return -(-positions // MULTIPLE) * MULTIPLE


class StaticRows:
    """The answers of a call, and a row for each text that some of them have in common so far; all counts lie on the device.

    As in `pmc_fast.running_rows`, but answers stay where they are: those that are done draw on, unseen, from the first row.
    Texts lie in the first rows. What lies beyond has no meaning, and is never drawn from.

    Args:
        own: [layers, 2, rows, kv_heads, steps, head_dim], the rows' own keys and values, which texts take along.

    Attributes:
        sequence: int64 [answers], the noise that an answer draws.
        row: int64 [answers], the row whose text an answer says so far.
        running: bool [answers], whether it has not ended; pruned: whether it was stopped.
        token: int64 [rows], a row's last token; position: its place, for the rotary embedding.
        prefix_row: int64 [rows], its prompt; first: the first position it sees.
        step: int64 [answers or rows], how many tokens have been drawn.
        texts: int64 [1], how many rows have a text; seed: int64 [1], that of the noise.
    """

    def __init__(self, sizes: Sizes, ends: Tensor, own: Tensor) -> None:
        self._sizes, self._ends, self._own = sizes, ends, own
        rows, device = sizes.rows, ends.device

        def counts(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        # By answer:
        self.sequence, self.row, self._limit, self._length = counts(4, rows)
        self.running, self._finished, self.pruned = counts(3, rows, dtype=torch.bool)
        self._tokens = counts(rows, sizes.steps)
        self._logprobs = counts(rows, sizes.steps, dtype=torch.float32)
        # By row:
        self.token = counts(rows)
        self._inherited = counts(3, rows)
        self.prefix_row, self.first, self.position = self._inherited
        # By either:
        self.step = counts(rows)
        self._source, self._destination = counts(2, rows)
        self._counts = counts(3)  # texts, running answers, rows that are to be copied
        self.texts = self._counts[:1]
        self._decoded, self.seed = counts(1), counts(1)

    def begin(self, filled: Prefill, sequence: Tensor, limit: Tensor, seed: int) -> None:
        """Everything as it is before the first draw: a row for each prompt. Prompts end where the prefix ends."""
        prompts = self._sizes.prompts
        prompt = torch.arange(prompts, device=self.row.device)
        self.sequence.copy_(sequence)
        self._limit.copy_(limit)
        self.seed.fill_(seed)
        self.row.copy_(prompt.repeat_interleave(self._sizes.rows // prompts))
        self.running.fill_(True)
        by_answer = self._length, self._finished, self.pruned, self._logprobs
        for zero in (*by_answer, self._inherited, self.step, self._counts, self._decoded):
            zero.zero_()
        self._tokens.copy_(self._ends[0].expand_as(self._tokens))
        self.prefix_row[:prompts] = prompt
        first = filled.padding + (self._sizes.width - filled.cache.get_seq_length())
        self.first.fill_(first[0])  # rows without a text have prompt 0, and must not have it read what stands before it
        self.first[:prompts] = first
        self.position[:prompts] = filled.position

    def record(self, token: Tensor, logprob: Tensor) -> None:
        """Write down what the answers drew, and give each text that goes on a row."""
        self._decoded += self.texts
        gpu.kernels("append_token").append_token(
            token,
            logprob,
            self._ends,
            self._limit,
            running=self.running,
            length=self._length,
            finished=self._finished,
            tokens=self._tokens,
            logprobs=self._logprobs,
            position=self.position,
            step=self.step,
        )
        self._regroup(token)

    def _regroup(self, token: Tensor) -> None:
        """token: int64 [answers], the last of each."""
        gpu.kernels("regroup").regroup(
            token,
            self.running,
            row=self.row,
            row_token=self.token,
            inherited=self._inherited,
            source=self._source,
            destination=self._destination,
            counts=self._counts,
        )
        copy_rows = gpu.kernels("copy_rows").copy_rows
        copy_rows(self._own, self._source, self._destination, self._counts[2:], self.step[:1])

    def prune(self, prune: Pruner, step: int) -> None:
        """Stop the answers that cannot be picked any more."""
        still = self.running.nonzero()[:, 0]
        stopped = prune(still, self._tokens[:, :step], self._length)
        if stopped is not None:
            gone = still[stopped.to(still.device)]
            self.pruned[gone], self.running[gone] = True, False
            self._regroup(self.token[self.row])

    def counts(self, rows_for: Callable[[int], int]) -> Counts:
        """rows_for: how many rows the step has that is to hold so many texts; with more texts no fewer."""
        return Counts(self._counts[:2], rows_for)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
        """tokens [answers, T], lengths, logprobs [answers, T], finished, pruned; how many tokens were decoded."""
        longest = int(self._length.max())
        results = (self._tokens[:, :longest], self._length, self._logprobs[:, :longest], self._finished, self.pruned)
        return *(result.clone() for result in results), int(self._decoded)


class Counts:
    """Reads how many texts and running answers there are, waiting for the step under way only if that may save it rows.

    There are never more texts than running answers, and of these never more than before. Once a step has as many rows as a text
    for each of them would take, the numbers lag by up to STEPS_AHEAD steps.
    """

    def __init__(self, counts: Tensor, rows_for: Callable[[int], int]) -> None:
        self._counts, self._rows_for = counts, rows_for
        self._noted: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._latest: list[int] | None = None

    def forget(self) -> None:
        """The next numbers are to be exact."""
        self._noted.clear()
        self._latest = None

    def note(self) -> None:
        """After a step: its numbers are to be read later."""
        on_gpu, event = self._counts.is_cuda, None
        copy = torch.empty(2, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        copy.copy_(self._counts, non_blocking=on_gpu)
        if on_gpu:
            event = torch.cuda.Event()
            event.record()
        self._noted.append((copy, event))

    def latest(self) -> tuple[int, int]:
        """Texts, of which there may be more now if rows_for both numbers is the same, and the answers that ran when there were so
        many."""
        if self._latest is None:
            self._latest = self._counts.tolist()
        while self._noted and (len(self._noted) > STEPS_AHEAD or self._may_save_rows(*self._latest)):
            copy, event = self._noted.popleft()
            if event is not None:
                event.synchronize()
            self._latest = copy.tolist()
        return self._latest[0], self._latest[1]

    def _may_save_rows(self, texts: int, running: int) -> bool:
        return self._rows_for(texts) < self._rows_for(running)
