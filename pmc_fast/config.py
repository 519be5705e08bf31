"""The hyperparameters of a PMC run, and the published settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral, Real
from types import NoneType
from typing import get_args, get_type_hints

from pmc_fast.errors import NORMAL, UserError, is_normal
from pmc_fast.prompts import STYLES

MOST = 2**31 - 1  # of whatever is counted


@dataclass(frozen=True)
class PMCConfig:
    """Hyperparameters of PMC; the defaults are those published for Llama-3.2-3B-Instruct (METHOD: arXiv 2507.04219).

    Sampling: num_samples answers per question (n), temperature, top_k (None is off), top_p, min_p; at most
    max_new_tokens tokens, or max_length with the padded prompt.
    Selection: "best" takes the lowest score, "bradley_terry" draws with probability softmax(-score / tau). min_words
    makes answers of fewer words score worse. keep_truncated=False never picks a sample that was cut off, unless all were.
    prune: stop sampling an answer once it cannot be picked any more; the picks stay the same (for rewards with a
    lower bound and selection "best"; has no effect with others).
    Loss: retain_weight is lambda. reencode trains on the decoded and re-encoded answer, as published; False trains on
    the sampled tokens themselves.
    Training loop (used by `pmc_fast.training`, not by `PMC`): epochs, batch_size, accumulation, learning_rate,
    weight_decay, warmup_epochs. The answers before training are asked for in batches of batch_size, too.

    Raises:
        UserError: a value is of another type or out of range.
    """

    num_samples: int = 20
    temperature: float = 0.9
    top_k: int | None = 50
    top_p: float = 0.95
    min_p: float = 0.0
    max_length: int | None = 200
    max_new_tokens: int | None = None
    retain_weight: float = 1.25
    min_words: int = 0
    selection: str = "best"
    tau: float = 0.1
    keep_truncated: bool = True
    prune: bool = True
    reencode: bool = True
    seed: int = 0
    prompt_style: str = "auto"
    system_prompt: str = "You are a helpful assistant."
    epochs: int = 30
    batch_size: int = 8
    accumulation: int = 2
    learning_rate: float = 1e-5
    weight_decay: float = 0.01
    warmup_epochs: float = 1.0

    @classmethod
    def published(cls, name: str, **changes) -> PMCConfig:
        """The published hyperparameters for "llama-3.2-3b" or "phi-1.5", with changes by keyword."""
        if not isinstance(name, str) or name not in PUBLISHED:
            raise UserError(f"preset: got {name!r}, expected one of {', '.join(map(repr, PUBLISHED))}")
        return replace(cls(**PUBLISHED[name]), **changes)

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, wanted: str) -> None:
            if not holds:
                raise UserError(f"{name}: got {getattr(self, name)!r}, expected {wanted}")

        for name, annotation in get_type_hints(PMCConfig).items():
            types = get_args(annotation) or (annotation,)
            object.__setattr__(self, name, _plain(getattr(self, name)))
            wanted = " or ".join(_TYPES[one] for one in types)
            require(name, _is_one_of(getattr(self, name), types), wanted)
        for name in ("num_samples", "epochs", "batch_size", "accumulation"):
            require(name, 1 <= getattr(self, name) <= MOST, f"an integer in [1, {MOST}]")
        require("min_words", 0 <= self.min_words <= MOST, f"an integer in [0, {MOST}]")
        for name in ("top_k", "max_length", "max_new_tokens"):
            value = getattr(self, name)
            require(name, value is None or 1 <= value <= MOST, f"None or an integer in [1, {MOST}]")
        taken = self.temperature == 0 or is_normal(self.temperature)
        require("temperature", taken, f"{NORMAL}, or 0 for greedy")
        for name in ("learning_rate", "weight_decay", "retain_weight", "warmup_epochs"):
            value = getattr(self, name)
            require(name, math.isfinite(value) and value >= 0, "a finite number of at least 0")
        require("top_p", 0 < self.top_p <= 1, "a number in (0, 1]")
        require("min_p", 0 <= self.min_p <= 1, "a number in [0, 1]")
        require("tau", 0 < self.tau < math.inf, "a finite number above 0")
        require("seed", 0 <= self.seed < 2**63, "an integer in [0, 2^63)")
        require("selection", self.selection in ("best", "bradley_terry"), "'best' or 'bradley_terry'")
        require("prompt_style", self.prompt_style in STYLES, f"one of {', '.join(map(repr, STYLES))}")
        require("max_new_tokens", self.max_new_tokens is not None or self.max_length is not None, "it or max_length")


def _plain(value: object) -> object:
    """NumPy's numbers as Python's, which JSON knows, too."""
    if isinstance(value, Integral) and not isinstance(value, int):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, int | float) else value


_TYPES = {int: "an integer", float: "a number", bool: "True or False", str: "a text", NoneType: "None"}


def _is_one_of(value: object, types: tuple[type, ...]) -> bool:
    """An integer is a number, too; True and False are neither."""
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, (*types, int) if float in types else types)


PUBLISHED = {
    "llama-3.2-3b": {},
    "phi-1.5": {
        "retain_weight": 1.5,
        "temperature": 1.25,
        "num_samples": 5,
        "epochs": 40,
        "batch_size": 16,
        "accumulation": 4,
        "prompt_style": "tags",
    },
}
