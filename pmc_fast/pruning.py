"""Exact pruning: which of the answers being sampled can no longer be picked, whatever they go on to say."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmc_fast.ops import _checks
from pmc_fast.prompts import Prompts
from pmc_fast.rewards import Reward, asked

_UNFINISHED = "\ufffd"  # stands for bytes that are no character, or not yet
_BYTE_TOKEN = re.compile("<0x.{1,2}>")


def has_lower_bound(reward: Reward) -> bool:
    """Whether the reward has a `lower_bound` that belongs to its `score`: a subclass that overrides `score` alone has none."""
    order = type(reward).__mro__
    score, bound = (
        next((i for i, kind in enumerate(order) if name in vars(kind)), len(order)) for name in ("score", "lower_bound")
    )
    return bound <= score < len(order)


class Pruner:
    """Says, while answers are sampled, which of them cannot be picked any more, so that sampling can stop them.

    Equivalent to sampling them all to their ends: with the dropped answers' scores set to infinity, taking each
    question's lowest score (the first on ties) and offering it to the ledger leaves the same ledger. An answer is
    dropped once the bound of its score is above that of a finished answer to its question or above the score held for
    it, or not below that of a finished answer with a lower index. Not for Bradley-Terry, where any answer may be picked.

    Where the tokenizer does not decode in a way known to leave the beginning of a text alone as the text grows, the
    bound is that of the empty beginning; for ROUGE recall, 0, so that an answer of score 0 still drops those behind it.

    Args:
        reward: has `lower_bound` (see `Reward`).
        prompts: decodes the answers; `prompts.end_ids` end them.
        references [B]: the texts that the answers to each question are scored against.
        held [B]: the score that the ledger holds for each question; infinity where it holds none.
        num_samples: n, answers per question.
        keep_truncated: False if an answer that was cut off can be picked only when no answer of its question ended.
        interval: steps from one look to the next.

    Attributes:
        interval: as given; a call is needed only where the number of tokens drawn is a multiple of it.

    Raises:
        TypeError: `reward` has no `lower_bound`, or an argument is not of the type above.
        ValueError: sizes that do not fit, an argument out of range, or a score or bound that is no number.

    Source: arXiv 2507.04219, algorithm 1 (whose pick this keeps); Land and Doig, "An automatic method of solving
    discrete programming problems", 1960 (branch and bound).
    """

    def __init__(
        self,
        reward: Reward,
        prompts: Prompts,
        references: Sequence[str],
        held: Sequence[float],
        num_samples: int,
        *,
        keep_truncated: bool = True,
        interval: int = 4,
    ) -> None:
        if not has_lower_bound(reward):
            raise TypeError(
                f"reward: {type(reward).__name__} has no lower_bound for its score, so no answer can be ruled out early"
            )
        for name, value in (("num_samples", num_samples), ("interval", interval)):
            _checks.number(name, value, "an integer", _checks.INTEGERS)
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if isinstance(references, str):
            raise TypeError("references: got a string, expected a list of strings")
        self._references = list(references)
        self._held = np.array(held, dtype=np.float64)
        if self._held.shape != (len(self._references),):
            raise ValueError(f"held: got shape {list(self._held.shape)}, expected [{len(self._references)}]")
        if np.isnan(self._held).any():
            raise ValueError("held: got nan, expected a score, or infinity for a question that has none")
        self._reward, self._prompts, self._keep_truncated, self.interval = reward, prompts, keep_truncated, interval
        shape = (len(self._references), num_samples)
        self._scores = np.full(shape, np.nan)  # of the answers that are done and can be picked whatever the others do
        self._bounds = np.repeat(self._asked("lower_bound", range(shape[0]), [""] * shape[0])[:, None], shape[1], 1)
        self._running = np.ones(shape, dtype=bool)
        self._beginnings = _Beginnings(prompts) if _keeps_beginnings(prompts) else None

    def part(self, begin: int, end: int) -> Pruner:
        """A fresh one for questions begin ... end - 1 alone, whose answers are then numbered from 0.

        Raises:
            ValueError: there are no such questions.
        """
        if not 0 <= begin <= end <= len(self._references):
            raise ValueError(f"begin, end: got {begin}, {end}, expected 0 <= begin <= end <= {len(self._references)}")
        return Pruner(
            self._reward,
            self._prompts,
            self._references[begin:end],
            self._held[begin:end],
            self._running.shape[1],
            keep_truncated=self._keep_truncated,
            interval=self.interval,
        )

    def __call__(self, running: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor | None:
        """Which of the running answers to stop now; to be called after every step (or every `interval` steps).

        Args:
            running: int64 [R], the answers neither done nor dropped; b * n + i is answer i to question b.
            tokens: int64 [B * n, T], the T tokens drawn so far; nothing is read past an answer's length. An answer
                that is done but whose last token is no end token was cut off.
            lengths: int64 [B * n], the end token included; not read for running answers, whose length is T.

        Returns:
            bool [R] on the CPU, True for the answers to stop; or None for none, as always between two looks.

        Raises:
            ValueError: shapes that do not fit, or a running answer that was done or dropped before.
        """
        questions, n = self._running.shape
        rows = questions * n
        if tokens.dim() != 2 or len(tokens) != rows or lengths.shape != (rows,) or running.dim() != 1:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in (running, tokens, lengths))
            raise ValueError(f"running, tokens, lengths: got shapes {shapes}, expected [R], [{rows}, T], [{rows}]")
        if tokens.shape[1] % self.interval or len(running) == 0:
            return None
        running, ids = running.cpu().numpy(), tokens.cpu().numpy()
        self._finish(running, ids, lengths)
        self._bound(running, ids)
        drop = self._hopeless() & self._running
        if not drop.any():
            return None
        self._running &= ~drop
        return torch.from_numpy(drop.ravel()[running])

    def _finish(self, running: np.ndarray, ids: np.ndarray, lengths: Tensor) -> None:
        """Score the answers that are done since the last look."""
        now = np.zeros(self._running.size, dtype=bool)
        now[running] = True
        before = self._running.ravel()
        if (now & ~before).any():
            raise ValueError(
                f"running: got answer {np.flatnonzero(now & ~before)[0]}, which was done or dropped before"
            )
        done = np.flatnonzero(before & ~now)
        self._running[...] = now.reshape(self._running.shape)
        if len(done):
            until = lengths.cpu().numpy()[done]
            texts = [self._prompts.decode(ids[row, :length].tolist()) for row, length in zip(done, until, strict=True)]
            scores = self._asked("score", done // self._running.shape[1], texts)
            sure = np.isin(ids[done, until - 1], self._prompts.end_ids) | self._keep_truncated
            self._scores.flat[done[sure]] = scores[sure]

    def _bound(self, running: np.ndarray, ids: np.ndarray) -> None:
        """Raise the bounds of the running answers to questions that have a score to compare with."""
        if self._beginnings is None:
            return
        compared = np.isfinite(self._held) | ~np.isnan(self._scores).all(1)
        question = running // self._running.shape[1]
        rows, question = running[compared[question]], question[compared[question]]
        if len(rows):
            texts = [self._beginnings.grow(row, ids[row]) for row in rows.tolist()]
            bounds = self._asked("lower_bound", question, texts)
            self._bounds.flat[rows] = np.maximum(self._bounds.flat[rows], bounds)

    def _hopeless(self) -> np.ndarray:
        """bool [B, n]: whether no end of the answer can be picked and stored; true or false where it is done."""
        best = np.fmin.accumulate(self._scores, axis=1)  # nan, to which nothing compares, before the first that ended
        above_held = self._bounds > self._held[:, None]
        if not self._keep_truncated:
            # An answer that might have ended keeps the cut-off ones from being picked, however bad it is. So it may go
            # only if another has ended, or if all that could be picked is above the score held.
            ended = ~np.isnan(self._scores)
            above_held &= (ended.any(1) | above_held.all(1))[:, None]
        return above_held | (self._bounds >= best) | (self._bounds > best[:, -1:])

    def _asked(self, name: str, questions: Sequence[int], texts: list[str]) -> np.ndarray:
        """What the reward's method of that name gives for texts that answer the questions."""
        return asked(self._reward, name, [self._references[q] for q in questions], texts)


class _Beginnings:
    """The text that each of the answers under way begins with, whatever tokens follow.

    A text is decoded from its last settled token on, not from its start: from there, with what that token decodes to
    alone cut off, comes what follows it, since its own leading space is left out of both.
    """

    def __init__(self, prompts: Prompts) -> None:
        self._tokenizer = prompts.tokenizer.backend_tokenizer
        self._settled: dict[int, str] = {}  # token -> its text alone, "" if it does not settle the ones before
        self._known: dict[int, tuple[str, int]] = {}  # answer -> the text up to a settled token, and its place

    def grow(self, row: int, ids: np.ndarray) -> str:
        """The beginning of answer `row` of tokens `ids` [T], which only grow from call to call."""
        known, anchor = self._known.get(row, ("", -1))
        begin = max(anchor, 0)
        new = ids[begin:].tolist()
        while new and not self._alone(new[-1]):
            new.pop()
        if not new:
            return ""
        text = self._decode(new)
        if anchor >= 0:
            text = known + text[len(self._alone(new[0])) :]
        if not text.endswith(_UNFINISHED):
            self._known[row] = text, begin + len(new) - 1
        return text.rstrip(_UNFINISHED).strip()

    def _alone(self, token: int) -> str:
        """The token's text; "" for one that is skipped or that may change with the next one, as bytes of a character do."""
        text = self._settled.get(token)
        if text is None:
            name = self._tokenizer.id_to_token(token) or ""
            text = self._settled[token] = "" if _BYTE_TOKEN.fullmatch(name) else self._decode([token])
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


# Decoders that map each token to a text by itself, save that the first may lose its leading space and that bytes wait for
# the rest of their character. Others may dedupe, tidy up or put an end to what the text before said.
_METHODS = {
    "decode": {
        "transformers.tokenization_utils_base.PreTrainedTokenizerBase.decode",
        "transformers.models.codegen.tokenization_codegen.CodeGenTokenizer.decode",  # Phi's: with no pattern, the same
    },
    "_decode": {"transformers.tokenization_utils_tokenizers.TokenizersBackend._decode"},
}
_REPLACEMENT = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}


def _keeps_beginnings(prompts: Any) -> bool:
    """Whether the text of an answer's first tokens is, but for an unfinished character, what its whole text begins with."""
    tokenizer = getattr(prompts, "tokenizer", None)
    if getattr(type(prompts), "decode", None) is not Prompts.decode:
        return False
    for name, known in _METHODS.items():
        method = getattr(tokenizer, name, None)
        if f"{getattr(method, '__module__', None)}.{getattr(method, '__qualname__', None)}" not in known:
            return False
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:  # tokens joined by spaces
        return True
    try:
        stages = _flat(json.loads(decoder.__getstate__()))
    except Exception:  # a decoder written in Python has no state to show
        return False
    whole = False  # whether a stage sees the text as one
    for stage in stages:
        kind = stage["type"]
        if kind in ("ByteFallback", "Metaspace"):
            if whole:
                return False
        elif kind in ("Fuse", "ByteLevel"):
            whole = True
        elif not (stage == _REPLACEMENT or (kind == "Strip" and stage["stop"] == 0)):
            return False
    return True


def _flat(stage: dict) -> list[dict]:
    if stage["type"] != "Sequence":
        return [stage]
    return [inner for part in stage["decoders"] for inner in _flat(part)]
