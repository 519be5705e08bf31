"""What every draw is asked for and leaves, in runs of the arguments that kernels take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pmc_fast.gpu.checks import no_bad_row, report
from pmc_fast.kernels.philox import halves
from pmc_fast.kernels.variant import MODELS, absent, present

# The kinds of the arguments, for variants.
NOISE = {"seed_low": "i32", "seed_high": "i32", "sequence": "*i64", "position": "*i64"}
NOISE_OF_A_GRAPH = NOISE | dict.fromkeys(("seed_low", "seed_high"), "*i32")
DRAWS = {"out_token": "*i64"}
DRAWS |= dict.fromkeys(("out_logprob", "out_sampling_logprob", "out_kept_mass"), "*fp32")
DRAWS |= {"bad": "*i32", "first_row": "i32"}


class Sampling(NamedTuple):
    """The options of a draw, as `pmc_fast.sample` takes them, and its rows' coordinates; a seed may also be an int64 [1]."""

    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    seed: int | Tensor
    sequence: Tensor
    position: Tensor
    logits_row: Tensor | None = None  # int64, contiguous: whose logits each draw is from; None: its own

    def rows(self, rows: slice) -> Sampling:
        return self._replace(sequence=self.sequence[rows], position=self.position[rows])

    def cuts_rank(self, vocab: int) -> bool:
        return self.top_k is not None and self.top_k < vocab

    def truncates(self, vocab: int) -> bool:
        return self.temperature > 0 and (self.cuts_rank(vocab) or self.top_p < 1 or self.min_p > 0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def tempered(self) -> bool:
        return self.temperature not in (0, 1)

    @property
    def inverse_temperature(self) -> float:
        return 1.0 if self.greedy else 1 / self.temperature

    def noise(self) -> tuple[int, int, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]:
        return *halves(self.seed), self.sequence.contiguous(), self.position.contiguous()


class Draws(NamedTuple):
    """The outputs, and where a kernel says that a row is no distribution."""

    token: Tensor
    logprob: Tensor
    sampling_logprob: Tensor
    kept_mass: Tensor
    bad: Tensor
    first_row: int  # what the caller calls row 0

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Draws:
        token = torch.empty(rows, dtype=torch.int64, device=device)
        columns = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3))
        return cls(token, *columns, no_bad_row(rows, device), 0)

    def rows(self, rows: slice) -> Draws:
        return Draws(*(column[rows] for column in self[:4]), self.bad, self.first_row + rows.start)

    def checked(self, op: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        report(op, self.bad, len(self.token))
        return self[:4]


class LogitsVariant(NamedTuple):
    """Logits in memory as kernels read them, for variants of these kernels."""

    name: str
    vocab: int
    signature: dict[str, str]
    constants: dict[str, None]
    aligned: tuple[str, ...]
    logits_row: dict[str, str | None]  # an argument of kernels that draw
    noise: dict[str, str]  # and more of them


def logits_variants() -> Iterator[LogitsVariant]:
    """Those of the models that `pmc_fast` is measured on, and products with a head that are not logits yet."""
    plain = {"bias": None, "logit_scale": None, "softcap": None}
    for model in MODELS:
        for dtype in ("fp32", "bf16", "fp16"):
            yield _logits_variant(f"{model.name}, {dtype}", model.vocab, dtype, plain)
    head = {"bias": "*bf16", "logit_scale": "fp32", "softcap": "fp32"}
    yield _logits_variant("Gemma-3-12B's head with bias and scale, fp32 products", MODELS[-1].vocab, "fp32", head)


def _logits_variant(name: str, vocab: int, dtype: str, head: dict[str, str | None]) -> LogitsVariant:
    signature = {"logits": "*" + dtype, "stride": "i32", "vocab": "i32"} | present(head)
    aligned = ("logits", "stride", "vocab", *(("bias",) if head["bias"] else ()))
    decodes = dtype == "fp32"  # products with a head, in a graph
    logits_row = {"logits_row": "*i64" if decodes else None}
    noise = NOISE_OF_A_GRAPH if decodes else NOISE
    return LogitsVariant(name, vocab, signature, absent(head), aligned, logits_row, noise)
