"""Rewards: how much of what is to be forgotten a candidate answer still says."""

import reprlib
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pmc_fast.errors import described
from pmc_fast.ops import _checks
from pmc_fast.ops.rouge_l_recall import check_options, rouge_l_recall
from pmc_fast.reference.rouge_l_recall import words

_WORD = string.ascii_lowercase + string.digits


class Reward(Protocol):
    """Scores candidate answers; PMC trains on each question's lowest.

    What is an array here may as well be a list of numbers or a tensor, of any dtype and device.

    A reward may also have `words(text) -> int`: how much of a text it can see at all. PMC reports the answers it picked
    that have none, because their perfect score says nothing.

    And it may have `lower_bound(references, beginnings) -> float64 [N]`, which lets PMC stop sampling an answer that can
    no longer be picked: for every text that starts with beginnings[i], itself included, the score against references[i]
    is at least the i-th value. Neither that nor the score of a pair may then be nan or depend on the other pairs.
    """

    def score(self, references: Sequence[str], candidates: Sequence[str]) -> np.ndarray:
        """One score for each pair, float64 [N]: lower is better, and exactly 0 is final.

        references [N]: the answers of the model before unlearning. candidates [N]: the answers to score.
        """
        ...


def asked(reward: Reward, name: str, references: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """What the reward's method of that name, score or lower_bound, gives for each pair, float64 [N].

    Raises:
        ValueError: it gave another number of scores, or one that is no number.
    """
    given = getattr(reward, name)(references, texts)
    who = f"reward: {type(reward).__name__}.{name}"
    try:
        host = given.detach().double().cpu() if hasattr(given, "detach") else given  # torch's
        values = np.asarray(host, dtype=np.float64)
    except (TypeError, ValueError):  # such as texts, or lists of several lengths
        values = None
    if values is None or values.shape != (len(texts),):
        listed = values is not None and values.ndim > 0
        got = described(given) if not listed else len(values) if values.ndim == 1 else f"shape {list(values.shape)}"
        raise ValueError(f"{who} gave {got}, expected one score for each of the {len(texts)} candidates")
    if len(missing := np.flatnonzero(np.isnan(values))):
        text = reprlib.repr(texts[missing[0]])
        raise ValueError(f"{who} gave nan for candidate {missing[0]}, {text}, expected a number")
    return values


@dataclass(frozen=True)
class RougeRecall:
    """ROUGE-L recall of the candidate against the reference, in [0, 1], with a penalty for very short candidates.

    Without `min_words` or a fitting `tokenizer`, a candidate with no word in a-z and 0-9 (empty, punctuation only,
    Japanese) scores 0, the best there is, and so does every candidate if the reference has none: see `words`.

    Args:
        min_words: A candidate of fewer space-separated words scores exp(-words) more, at most 1 in all. 0: no penalty.
        use_stemmer, tokenizer, impl: As for `rouge_l_recall`.

    Raises:
        ValueError: `min_words` is negative, or `impl` names no implementation.
        TypeError: `min_words` is not an integer, `use_stemmer` no bool, or `tokenizer` no function.

    Source: the reward of the published loop, https://arxiv.org/abs/2507.04219.
    """

    min_words: int = 0
    use_stemmer: bool = True
    tokenizer: Callable[[str], Sequence[str]] | None = None
    impl: str | None = None

    def __post_init__(self) -> None:
        _checks.number("min_words", self.min_words, "an integer", _checks.INTEGERS)
        if self.min_words < 0:
            raise ValueError(f"min_words: got {self.min_words}, expected 0 (no penalty) or more")
        check_options(self.use_stemmer, self.tokenizer, self.impl)

    def score(self, references: Sequence[str], candidates: Sequence[str]) -> np.ndarray:
        recall = rouge_l_recall(
            candidates, references, use_stemmer=self.use_stemmer, tokenizer=self.tokenizer, impl=self.impl
        )
        if self.min_words == 0:
            return recall
        # The published count: single spaces part words, so the empty answer has one and a double space adds one.
        counts = np.array([len(candidate.strip().split(" ")) for candidate in candidates], dtype=np.int64)
        penalised = np.minimum(recall + np.exp(-counts), 1.0)
        return np.where(counts < self.min_words, penalised, recall)

    def lower_bound(self, references: Sequence[str], beginnings: Sequence[str]) -> np.ndarray:
        """What a candidate with the given beginning scores at least: the recall of the words that are complete in it.

        Equivalent to `score(references, beginnings)` without the penalty and without a word at the very end of the
        beginning, which might go on. The recall of more words is never lower, and the penalty only adds to it. With a
        `tokenizer` of one's own, of which it is not known when a word is complete, it is 0.

        Args:
            references: N texts.
            beginnings: N texts, the beginnings of candidates.

        Returns:
            float64 [N], each in [0, 1].

        Raises:
            ValueError, TypeError: As `rouge_l_recall`, whose candidates are the beginnings.

        Source: the reward of https://arxiv.org/abs/2507.04219; an LCS never gets shorter as a text grows.
        """
        if isinstance(beginnings, str):
            raise TypeError(f"beginnings: got the text {beginnings[:40]!r}, expected a list of texts")
        own = self.tokenizer is not None  # it is not asked: it may well split "" into words that longer texts lack
        complete = [text.lower().rstrip(_WORD) * (not own) if isinstance(text, str) else text for text in beginnings]
        return rouge_l_recall(complete, references, use_stemmer=self.use_stemmer, impl=self.impl)

    def words(self, text: str) -> int:
        """How many words of the text can match: a candidate or reference with 0 scores 0 whatever it says."""
        return len(self.tokenizer(text) if self.tokenizer else words(text, use_stemmer=False))
