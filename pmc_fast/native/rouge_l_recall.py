"""ROUGE-L recall over word numbers: each distinct word is stemmed once, the subsequences are counted in C++."""

import threading
from collections.abc import Callable, Hashable, Sequence
from itertools import chain

import numpy as np

from pmc_fast.native import library

_SHORTEST_STEMMED = 4

# After lower-casing, every byte that is not part of a word becomes a space. Characters outside ASCII arrive as "?".
_KEPT = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789")
_TO_WORDS = bytes(byte if byte in _KEPT else ord(" ") for byte in range(256))

# A vocabulary lives until it holds about this many bytes; then the next call starts a new one. Text of a fixed language
# stays far below it, and a model that makes words up pays for stemming its common words once more, now and then.
_MOST_BYTES = 64 << 20
_BYTES_PER_WORD = 250  # of both dictionaries, besides the word's own characters


class _Vocabulary(dict):
    """word -> number, equal for words that `stem` makes equal; a word not seen before is stemmed and numbered."""

    def __init__(self, stem: Callable[[Hashable], Hashable]):
        super().__init__()
        self.bytes = 0
        self._stem = stem
        self._numbers: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    def __missing__(self, word: bytes | str) -> int:
        stem = self._stem(word)
        with self._lock:
            number = self[word] = self._numbers.setdefault(stem, len(self._numbers))
            self.bytes += len(word) + _BYTES_PER_WORD
        return number


_vocabularies: dict[bool, _Vocabulary] = {}  # by use_stemmer


def _unstemmed(word: Hashable) -> Hashable:
    return word


def _stemmed() -> Callable[[bytes], str]:
    from nltk.stem.porter import PorterStemmer  # takes about a second: it loads all of nltk

    porter = PorterStemmer().stem

    def stem(word: bytes) -> str:
        text = word.decode("ascii")
        return porter(text) if len(text) >= _SHORTEST_STEMMED else text

    return stem


def _vocabulary(use_stemmer: bool) -> _Vocabulary:
    vocabulary = _vocabularies.get(use_stemmer)
    if vocabulary is None:
        vocabulary = _Vocabulary(_stemmed() if use_stemmer else _unstemmed)
        vocabulary = _vocabularies.setdefault(use_stemmer, vocabulary)
    return vocabulary


def _words(text: str) -> list[bytes]:
    return text.lower().encode("ascii", "replace").translate(_TO_WORDS).split()


def _numbered(
    texts: Sequence[str], split: Callable[[str], Sequence[bytes | str]], vocabulary: _Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """The texts' word numbers end to end, and where each text begins (one entry more than texts)."""
    order: dict[str, int] = {}  # texts repeat: a question's samples share one reference
    which = np.fromiter((order.setdefault(text, len(order)) for text in texts), np.int64, len(texts))
    words = [split(text) for text in order]
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    numbers = np.fromiter(map(vocabulary.__getitem__, chain.from_iterable(words)), np.int32, lengths.sum())

    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(lengths[which], out=offsets[1:])
    if len(order) < len(texts):
        begins = np.cumsum(lengths) - lengths
        numbers = numbers[np.arange(offsets[-1]) + np.repeat(begins[which] - offsets[:-1], lengths[which])]
    return numbers, offsets


def rouge_l_recall(
    candidates: Sequence[str],
    references: Sequence[str],
    use_stemmer: bool,
    tokenizer: Callable[[str], Sequence[str]] | None,
) -> np.ndarray:
    lcs_lengths = library().rouge_l_lcs
    # One vocabulary from start to end: numbers of two of them do not compare.
    vocabulary = _Vocabulary(_unstemmed) if tokenizer else _vocabulary(use_stemmer)
    candidate_ids, candidate_offsets = _numbered(candidates, tokenizer or _words, vocabulary)
    reference_ids, reference_offsets = _numbered(references, tokenizer or _words, vocabulary)
    if not tokenizer and vocabulary.bytes > _MOST_BYTES:
        _vocabularies.pop(use_stemmer, None)

    lcs = np.empty(len(references), np.int64)
    lcs_lengths(
        candidate_ids.ctypes.data,
        candidate_offsets.ctypes.data,
        reference_ids.ctypes.data,
        reference_offsets.ctypes.data,
        len(references),
        lcs.ctypes.data,
    )
    return lcs / np.maximum(np.diff(reference_offsets), 1)
