"""ROUGE-L recall by the textbook dynamic program."""

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

_WORD = re.compile("[a-z0-9]+")
_SHORTEST_STEMMED = 4


@functools.cache
def _stem() -> Callable[[str], str]:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer().stem


def words(text: str, use_stemmer: bool) -> list[str]:
    """The words ROUGE compares: runs of a-z and 0-9 in the lower-cased text, the longer ones as Porter stems."""
    found = _WORD.findall(text.lower())
    if not use_stemmer:
        return found
    return [_stem()(word) if len(word) >= _SHORTEST_STEMMED else word for word in found]


def lcs_length(a: Sequence, b: Sequence) -> int:
    """Length of the longest common subsequence of two sequences."""
    row = [0] * (len(b) + 1)  # row[j]: of the part of a read so far and b[:j]
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def rouge_l_recall(
    candidates: Sequence[str],
    references: Sequence[str],
    use_stemmer: bool,
    tokenizer: Callable[[str], Sequence[str]] | None,
) -> np.ndarray:
    split = tokenizer or functools.partial(words, use_stemmer=use_stemmer)
    recall = np.zeros(len(references))
    for i, (candidate, reference) in enumerate(zip(candidates, references, strict=True)):
        wanted = split(reference)
        if wanted:
            recall[i] = lcs_length(wanted, split(candidate)) / len(wanted)
    return recall
