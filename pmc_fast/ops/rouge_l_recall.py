"""ROUGE-L recall of many pairs of texts: contract, checks, dispatch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from pmc_fast import backend
from pmc_fast.errors import described

Tokenizer = Callable[[str], Sequence[str]]


def rouge_l_recall(
    candidates: Sequence[str],
    references: Sequence[str],
    *,
    use_stemmer: bool = True,
    tokenizer: Tokenizer | None = None,
    impl: str | None = None,
) -> np.ndarray:
    """The share of each reference's words that its candidate says in the same order: the recall of ROUGE-L.

    To the last bit, with the `rouge_score` package,

        scorer = RougeScorer(["rougeL"], use_stemmer=use_stemmer)
        [scorer.score(reference, candidate)["rougeL"].recall for candidate, reference in zip(candidates, references)]

    that is, the length of the longest common subsequence of words over the number of words of the reference, or 0 if
    either has none. Words are the runs of a-z and 0-9 in the lower-cased text; `use_stemmer` compares those longer than
    three characters by their Porter stems. So text in another script has no words, and scores 0, without a `tokenizer`.

    The native implementation remembers the stem of every word the process has shown it, up to about 64 MiB of them.

    Args:
        candidates: N texts to score.
        references: N texts that they are scored against.
        use_stemmer: Without a `tokenizer`, whether to compare stems.
        tokenizer: Called with a text, returns the list of its words, which are then compared as they are.
        impl: "native" or "reference"; None is the fastest that runs here.

    Returns:
        float64 [N], each in [0, 1].

    Raises:
        ValueError: There are not as many candidates as references, or `impl` names no implementation.
        TypeError: An argument is not of the type above, or `tokenizer` returned something else than a list of strings.
        BackendUnavailable: The implementation named cannot run here.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3.1.
    """
    candidates = _texts("candidates", candidates)
    references = _texts("references", references)
    if len(candidates) != len(references):
        raise ValueError(f"candidates: got {len(candidates)} texts, expected {len(references)}, as many as references")
    check_options(use_stemmer, tokenizer, impl)
    implementation = backend.load("rouge_l_recall", backend.choose("rouge_l_recall", impl))
    return implementation(candidates, references, use_stemmer, tokenizer and _checked(tokenizer))


def check_options(use_stemmer: bool, tokenizer: Callable[[str], Sequence[str]] | None, impl: str | None) -> None:
    """Raise what `rouge_l_recall` raises at them, before there is anything to compare."""
    if not isinstance(use_stemmer, bool):
        raise TypeError(f"use_stemmer: got {use_stemmer!r}, expected True or False")
    if tokenizer is not None and not callable(tokenizer):
        raise TypeError(f"tokenizer: got {tokenizer!r}, expected None or a function from a string to a list of strings")
    backend.check(impl)


def _texts(name: str, values: Iterable[str]) -> list[str]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: got {described(values)}, expected a list of strings")
    texts = list(values)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}: got {described(text)} at position {i}, expected a string")
    return texts


def _checked(tokenizer: Tokenizer) -> Tokenizer:
    def split(text: str) -> Sequence[str]:
        words = tokenizer(text)
        if not isinstance(words, list | tuple):
            raise TypeError(f"tokenizer: returned {described(words)} for {text[:40]!r}, expected a list of strings")
        for word in words:
            if not isinstance(word, str):
                raise TypeError(
                    f"tokenizer: returned {described(word)} in its list for {text[:40]!r}, expected strings"
                )
        return words

    return split
