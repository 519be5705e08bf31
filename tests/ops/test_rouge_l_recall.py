"""rouge_l_recall against rouge_score, to the last bit."""

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from pmc_fast import backend
from pmc_fast.native import library
from pmc_fast.native import rouge_l_recall as native
from pmc_fast.ops.rouge_l_recall import rouge_l_recall
from pmc_fast.reference.rouge_l_recall import lcs_length

IMPLEMENTATIONS = ("reference", "native")
each_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_stemming = pytest.mark.parametrize("use_stemmer", [True, False])
thorough = settings(deadline=None, max_examples=150)


def rouge_score(candidates, references, use_stemmer=True, tokenizer=None):
    scorer = RougeScorer(["rougeL"], use_stemmer=use_stemmer, tokenizer=tokenizer)
    pairs = zip(candidates, references, strict=True)
    return np.array([scorer.score(reference, candidate)["rougeL"].recall for candidate, reference in pairs], float)


def assert_same_bits(got, want):
    assert got.dtype == np.float64
    assert got.shape == want.shape
    np.testing.assert_array_equal(got.view(np.int64), want.view(np.int64))


# Endings that the stemmer's rules take off, so that unlike words share a stem.
ENDINGS = ("", "s", "es", "ed", "ing", "ly", "ies", "ied", "ational", "ization", "fulness", "ably", "y", "ement")
words = st.one_of(
    st.builds(
        str.__add__, st.sampled_from(["a", "cat", "sk", "hop", "gener", "relat", "enjo"]), st.sampled_from(ENDINGS)
    ),
    st.text("abeilnsty0", min_size=1, max_size=8),
)
sentences = st.builds(str.join, st.sampled_from([" ", "  ", ", ", "\n", "_", "-"]), st.lists(words, max_size=40))
# Everything Python can hold, and more often than chance what lower-cases into or out of ASCII.
characters = st.one_of(st.characters(exclude_categories=()), st.sampled_from("aAkK\u212aİıſẞΣς ２²\x1c\u00a0\u2028'"))
unicode_texts = st.text(characters, max_size=60)


@each_implementation
@pytest.mark.parametrize(
    ("candidate", "reference", "use_stemmer", "recall"),
    [
        # Lin 2004, section 3.1: two candidates with the same words, told apart by their order.
        ("police kill the gunman", "police killed the gunman", False, 3 / 4),
        ("the gunman kill police", "police killed the gunman", False, 2 / 4),
        ("police kill the gunman", "police killed the gunman", True, 1.0),
        # Cormen et al., Introduction to Algorithms: BCBA is a longest common subsequence of ABCBDAB and BDCABA.
        ("a b c b d a b", "b d c a b a", False, 4 / 6),
        ("b d c a b a", "a b c b d a b", False, 4 / 7),
        ("one", "one two three", False, 1 / 3),
        ("one two three", "one", False, 1.0),
        ("x x x", "x", False, 1.0),
        ("x", "x x x", False, 1 / 3),
        ("never the same", "another wholly different answer", False, 0.0),
        ("", "", True, 0.0),
        ("", "a", True, 0.0),
        ("a", "", True, 0.0),
        (" .,!?\n\t-_ ", "a", True, 0.0),
        ("東京タワー", "東京タワー", True, 0.0),
        ("THE Cat!", "the-cat", True, 1.0),
        ("snake_case", "snake case", True, 1.0),
        ("it's", "it s", True, 1.0),
        ("café", "caf", True, 1.0),
        ("273 \u212a", "273 k", True, 1.0),  # the Kelvin sign lower-cases to k
        ("İzmir", "i zmir", True, 1.0),  # to i and a combining dot
        ("２", "2", True, 0.0),  # a digit, but not one of ASCII
        ("skies", "sky", True, 1.0),
        ("skies", "sky", False, 0.0),
        ("was", "wa", True, 0.0),  # three letters are not stemmed
        ("generations generate general", "generally generic generation", True, 1.0),  # gener, each of them
    ],
)
def test_known_values(impl, candidate, reference, use_stemmer, recall):
    got = rouge_l_recall([candidate], [reference], use_stemmer=use_stemmer, impl=impl)
    assert got.tolist() == [recall]


@each_stemming
@thorough
@given(pairs=st.lists(st.tuples(sentences, sentences), max_size=6))
def test_word_strings(use_stemmer, pairs):
    candidates, references = [c for c, _ in pairs], [r for _, r in pairs]
    want = rouge_score(candidates, references, use_stemmer)
    for impl in IMPLEMENTATIONS:
        assert_same_bits(rouge_l_recall(candidates, references, use_stemmer=use_stemmer, impl=impl), want)


@thorough
@given(pairs=st.lists(st.tuples(unicode_texts, unicode_texts), max_size=4))
def test_unicode(pairs):
    # Unrelated texts rarely share a word, so each is scored against its own lower and upper case as well.
    texts = [text for pair in pairs for text in pair]
    candidates = [c for c, _ in pairs] + texts + texts
    references = [r for _, r in pairs] + [t.lower() for t in texts] + [t.upper() for t in texts]
    want = rouge_score(candidates, references)
    for impl in IMPLEMENTATIONS:
        assert_same_bits(rouge_l_recall(candidates, references, impl=impl), want)


def test_lengths_around_the_words_of_the_bit_parallel_algorithm(rng_seed):
    # 64 tokens fill one machine word. Few distinct ones make carries that run through many bits; long stretches that
    # the other text lacks or has elsewhere make carries that run through whole words.
    rng = random.Random(rng_seed)

    def stretch():
        size = rng.choice([1, 63, 64, 65, 127, 128, 129, 193])
        return rng.choices(rng.choice(["a", "ab", "cde", "f", "only", "abcdefghijklmnopqrstuvwxyz"]), k=size)

    def text():
        return " ".join(word for _ in range(rng.randint(1, 4)) for word in stretch())

    candidates, references = [text() for _ in range(60)], [text() for _ in range(60)]
    want = rouge_l_recall(candidates, references, impl="reference")
    assert_same_bits(rouge_l_recall(candidates, references, impl="native"), want)


def test_a_carry_through_a_whole_word():
    # Of a and b, far apart in one text and in the other order in the other, one is common: 1 of 130, not 2.
    texts = ["a" + " x" * 128 + " b", "b a" + " y" * 128]
    assert rouge_l_recall(texts, texts[::-1], impl="native").tolist() == [1 / 130, 1 / 130]


def test_long_texts(rng_seed):
    rng = random.Random(rng_seed)
    candidate, reference = (" ".join(rng.choices("abcdefghij", k=size)) for size in (1511, 907))
    want = rouge_score([candidate], [reference])
    for impl in IMPLEMENTATIONS:
        assert_same_bits(rouge_l_recall([candidate], [reference], impl=impl), want)


def test_very_long_texts(rng_seed):
    # Distinct words, a random part of them kept in order among words the reference lacks: the recall is that part.
    rng = random.Random(rng_seed)
    reference = [f"w{i}" for i in range(60_013)]
    kept = [word for word in reference if rng.random() < 0.4]
    candidate = [part for word in kept for part in ["other"] * rng.randint(0, 2) + [word]]
    recall = rouge_l_recall([" ".join(candidate)], [" ".join(reference)], impl="native")
    assert recall.tolist() == [len(kept) / len(reference)]


def test_any_token_id(rng_seed):
    # The C++ by itself: ids at the ends of int32, offsets that do not begin at 0, outputs that hold rubbish.
    rng = np.random.default_rng(rng_seed)
    alphabet = np.array([-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 1] + list(range(0, 2**31, 2**24)), np.int32)
    pairs, skipped = 37, 5
    offsets = [np.cumsum(np.concatenate([[skipped], rng.integers(0, 150, pairs)])) for _ in range(2)]
    ids = [rng.choice(alphabet[: rng.integers(1, len(alphabet))], size=offset[-1]) for offset in offsets]
    lcs = np.full(pairs, -7, np.int64)
    addresses = [array.ctypes.data for pair in zip(ids, offsets, strict=True) for array in pair]
    library().rouge_l_lcs(*addresses, pairs, lcs.ctypes.data)
    texts = [[i[a:b].tolist() for a, b in zip(o, o[1:], strict=False)] for i, o in zip(ids, offsets, strict=True)]
    assert lcs.tolist() == [lcs_length(candidate, reference) for candidate, reference in zip(*texts, strict=True)]


@each_implementation
def test_texts_that_repeat(impl, rng_seed):
    # As PMC calls it: the samples of a question share a reference, some samples are the same, some are empty.
    rng = random.Random(rng_seed)
    some = ["", "?"] + [" ".join(rng.choices(["red", "green", "blues", "blue"], k=rng.randint(1, 9))) for _ in range(7)]
    candidates, references = rng.choices(some, k=83), sorted(rng.choices(some, k=83))
    assert_same_bits(rouge_l_recall(candidates, references, impl=impl), rouge_score(candidates, references))


@each_implementation
def test_no_pairs(impl):
    assert_same_bits(rouge_l_recall([], [], impl=impl), np.zeros(0))


@each_implementation
def test_other_sequences_of_strings(impl):
    want = np.array([1.0, 0.5])
    assert_same_bits(rouge_l_recall(("a", "a c"), np.array(["a", "a b"]), impl=impl), want)


class Characters(Tokenizer):
    def tokenize(self, text):
        return list(text)


@each_implementation
@each_stemming
def test_own_tokenizer(impl, use_stemmer):
    candidates = ["東京の塔", "running", "Running", ""]
    references = ["東京タワー", "runs", "runs", "runs"]
    got = rouge_l_recall(candidates, references, use_stemmer=use_stemmer, tokenizer=list, impl=impl)
    assert got.tolist() == [2 / 5, 3 / 4, 2 / 4, 0.0]  # neither lower-cased nor stemmed
    assert_same_bits(got, rouge_score(candidates, references, use_stemmer, Characters()))


def test_fastest_by_default(monkeypatch):
    asked = []
    monkeypatch.setattr(backend, "load", lambda op, impl: asked.append((op, impl)) or native.rouge_l_recall)
    rouge_l_recall(["a"], ["a"])
    assert asked == [("rouge_l_recall", "native")]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a"], ["a", "b"]), ValueError, "candidates: got 1 texts, expected 2"),
        (("a", ["a"]), TypeError, "candidates: got 'a', expected a list of strings"),
        ((["a"], b"a"), TypeError, "references: got a value of type bytes, expected a list of strings"),
        ((None, ["a"]), TypeError, "candidates: got None, expected a list of strings"),
        ((["a", None], ["a", "a"]), TypeError, "candidates: got None at position 1, expected a string"),
        ((["a"], [b"a"]), TypeError, "references: got a value of type bytes at position 0, expected a string"),
    ],
)
@each_implementation
def test_texts_that_are_none(impl, arguments, error, message):
    with pytest.raises(error, match=message):
        rouge_l_recall(*arguments, impl=impl)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_stemmer": 1}, TypeError, "use_stemmer: got 1, expected True or False"),
        ({"tokenizer": "words"}, TypeError, "tokenizer: got 'words', expected None or a function"),
        ({"tokenizer": str.lower}, TypeError, "tokenizer: returned 'a' for 'a', expected a list"),
        ({"tokenizer": lambda text: [1]}, TypeError, "tokenizer: returned 1 in its list for 'a'"),
        ({"impl": "fortran"}, ValueError, "impl: got 'fortran'"),
        ({"impl": "triton"}, backend.BackendUnavailable, "no triton implementation"),
    ],
)
def test_options_that_are_wrong(options, error, message):
    with pytest.raises(error, match=message):
        rouge_l_recall(["a"], ["a"], **options)


def test_vocabulary_starts_afresh_when_full(monkeypatch, rng_seed):
    rng = random.Random(rng_seed)
    monkeypatch.setattr(native, "_vocabularies", {})
    monkeypatch.setattr(native, "_MOST_BYTES", 20 * native._BYTES_PER_WORD)
    afresh = 0
    for _ in range(30):
        candidates, references = ([" ".join(rng.choices(ENDINGS[3:], k=8) + [f"n{rng.random()}"])] for _ in range(2))
        assert_same_bits(rouge_l_recall(candidates, references, impl="native"), rouge_score(candidates, references))
        afresh += not native._vocabularies
    assert 0 < afresh < 30


def test_threads_share_the_vocabulary(monkeypatch, rng_seed):
    rng = random.Random(rng_seed)
    monkeypatch.setattr(native, "_vocabularies", {})
    texts = [" ".join(rng.choices([f"word{i}{e}" for i in range(300) for e in ENDINGS], k=60)) for _ in range(64)]
    batches = [(rng.sample(texts, 32), rng.sample(texts, 32)) for _ in range(16)]
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda batch: rouge_l_recall(*batch, impl="native"), batches))
    finally:
        sys.setswitchinterval(switch_interval)
    for scores, batch in zip(got, batches, strict=True):
        assert_same_bits(scores, rouge_l_recall(*batch, impl="reference"))


def test_import_is_light():
    # nltk takes about a second to import; nothing needs it before the first word is stemmed.
    program = "import sys, pmc_fast.rewards; sys.exit('nltk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
