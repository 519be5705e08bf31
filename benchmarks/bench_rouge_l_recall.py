"""Scoring a micro-batch of answers: pmc_fast against rouge_score, and rapidfuzz's LCS of stems that are cached."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from benchmarks.bench import Bench, Verdict, each_implementation
from benchmarks.shapes import DECODE_ROWS


class Pairs(NamedTuple):
    """Texts to score, and the texts each is scored against."""

    candidates: list[str]
    references: list[str]


def tofu_length_pairs(count: int, seed: int) -> Pairs:
    """Made-up sentences of as many words as TOFU's answers have, 26 give or take 9.

    Half of each candidate's words are from its reference.
    """
    rng = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    stems = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(500)]
    words = [stem + ending for stem in stems for ending in ("", "s", "ing", "ed", "ational", "ly")]
    frequencies = [1 / (rank + 1) for rank in range(len(words))]
    rng.shuffle(words)

    def sentence() -> list[str]:
        return rng.choices(words, frequencies, k=min(51, max(6, round(rng.gauss(26, 9)))))

    references = [sentence() for _ in range(count)]
    candidates = [
        [word if rng.random() < 0.5 else other for word, other in zip(reference, sentence(), strict=False)]
        for reference in references
    ]
    return Pairs(*([" ".join(text).capitalize() + "." for text in texts] for texts in (candidates, references)))


def with_rouge_score(pairs: Pairs) -> np.ndarray:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = (scorer.score(reference, candidate)["rougeL"].recall for candidate, reference in zip(*pairs, strict=True))
    return np.fromiter(scores, dtype=np.float64)


@cache
def stem(word: str) -> str:
    """As rouge_score stems it."""
    return porter_stemmer().stem(word) if len(word) > 3 else word


@cache
def porter_stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


def with_rapidfuzz(pairs: Pairs) -> np.ndarray:
    from rapidfuzz.distance import LCSseq
    from rouge_score.tokenize import tokenize

    def recall(candidate: str, reference: str) -> float:
        said, wanted = ([stem(word) for word in tokenize(text, None)] for text in (candidate, reference))
        return LCSseq.similarity(said, wanted) / len(wanted) if wanted else 0.0

    return np.array([recall(*pair) for pair in zip(*pairs, strict=True)])


class RougeLRecallBench(Bench):
    """`pairs` pairs; every word has been seen before, as most have after a run's first steps."""

    op = "rouge_l_recall"

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs
        self.title = f"{pairs} pairs of TOFU's length"

    def make_inputs(self, seed: int, device: object) -> Pairs:
        return tofu_length_pairs(self.pairs, seed)

    def contestants(self) -> Mapping[str, Callable[[Pairs], Any]]:
        from pmc_fast.ops.rouge_l_recall import rouge_l_recall

        return {
            **each_implementation(self.op, lambda pairs, impl=None: rouge_l_recall(*pairs, impl=impl)),
            "rouge_score": with_rouge_score,
            "rapidfuzz": with_rapidfuzz,
        }

    def oracle(self, inputs: Pairs) -> np.ndarray:
        return with_rouge_score(inputs)

    def judge(self, run, result: np.ndarray, inputs, oracle: np.ndarray, budget) -> Verdict:
        different = int((result != oracle).sum())
        return Verdict(different == 0, f"{different} of {len(oracle)} differ from rouge_score in any bit")


BENCHES = [RougeLRecallBench(DECODE_ROWS)]


def test_rouge_l_recall(benchmark, contest) -> None:
    contest(benchmark)
