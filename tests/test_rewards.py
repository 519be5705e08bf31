"""Rewards, from METHOD.md's rules."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from pmc_fast.rewards import RougeRecall, asked


def published_score(reference, candidate, min_words):
    """Step 2 of the published loop."""
    score = RougeScorer(["rougeL"], use_stemmer=True).score(reference, candidate)["rougeL"].recall
    length = len(candidate.strip().split(" "))
    if min_words > 0 and length < min_words:
        score = min(score + np.exp(-length), 1)
    return score


@pytest.mark.parametrize("min_words", [0, 1, 2, 3, 10])
def test_published_rule(min_words, rng_seed):
    rng = random.Random(rng_seed)
    vocabulary = ["paris", "is", "the", "capital", "capitals", "of", "France", "", "...", "東京"]
    texts = [rng.choice(["", " "]) + " ".join(rng.choices(vocabulary, k=rng.randint(0, 7))) for _ in range(101)]
    references, candidates = texts, rng.sample(texts, len(texts))
    want = [published_score(*pair, min_words) for pair in zip(references, candidates, strict=True)]
    got = RougeRecall(min_words=min_words).score(references, candidates)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-15, atol=0)
    assert ((got == 0) == (np.array(want) == 0)).all()  # 0 is final, so it has to be exact


@pytest.mark.parametrize(
    ("candidate", "min_words", "score"),
    [
        ("", 0, 0.0),  # the trap: perfect
        ("", 2, np.exp(-1)),  # nothing between no spaces is one word
        ("?!", 2, np.exp(-1)),
        ("no idea", 2, 0.0),
        ("no idea", 3, np.exp(-2)),
        ("  no idea \n", 3, np.exp(-2)),
        ("no  idea", 3, 0.0),  # two spaces hold an empty word
        ("no\tidea", 2, np.exp(-1)),  # only spaces part words
        ("in paris", 3, 1 / 4 + np.exp(-2)),
        ("she was born", 4, 3 / 4 + np.exp(-3)),
        ("paris", 2, 1 / 4 + np.exp(-1)),
    ],
)
def test_min_words(candidate, min_words, score):
    got = RougeRecall(min_words=min_words).score(["she was born paris"], [candidate])
    np.testing.assert_allclose(got, [score], rtol=1e-15, atol=0)


def test_at_most_one():
    assert RougeRecall(min_words=2).score(["paris"], ["paris"]).tolist() == [1.0]


def test_is_recall_of_the_reference():
    # Precision would be the other way round.
    assert RougeRecall().score(["one two three four"], ["one"]).tolist() == [0.25]


def test_options_reach_the_op():
    assert RougeRecall(use_stemmer=True).score(["running"], ["runs"]).tolist() == [1.0]
    assert RougeRecall(use_stemmer=False).score(["running"], ["runs"]).tolist() == [0.0]
    assert RougeRecall(tokenizer=list).score(["東京"], ["京都"]).tolist() == [0.5]
    assert RougeRecall(impl="reference").score(["a b"], ["a"]).tolist() == [0.5]


@pytest.mark.parametrize("options", [{"impl": "fortran"}, {"use_stemmer": "no"}, {"tokenizer": "words"}], ids=str)
def test_wrong_options_are_refused_before_anything_is_scored(options):
    ((name, value),) = options.items()
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got {value!r}, expected"):
        RougeRecall(**options)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", 0), (" ?! ...", 0), ("東京タワー", 0), ("\u212a", 1), ("It's 7 p.m.", 5), ("one two", 2), ("a_b", 2)],
)
def test_words_that_can_match(text, words):
    assert RougeRecall().words(text) == words
    assert (RougeRecall().score([text], [text]) == 0).all() == (words == 0)


def test_words_of_own_tokenizer():
    assert RougeRecall(tokenizer=list).words("東京") == 2


@pytest.mark.parametrize(
    ("min_words", "error"), [(-1, ValueError), (1.5, TypeError), ("3", TypeError), (True, TypeError)]
)
def test_wrong_min_words(min_words, error):
    with pytest.raises(error, match="min_words: got"):
        RougeRecall(min_words=min_words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_scores_may_be_tensors(dtype):
    scores = torch.tensor([0.0, 1.0, 3.0], dtype=dtype)
    given = [scores, scores.tolist()] + ([scores.clone().requires_grad_()] if dtype.is_floating_point else [])
    for held in given:
        reward = SimpleNamespace(score=lambda references, candidates, held=held: held)
        got = asked(reward, "score", ["a"] * 3, ["b"] * 3)
        assert got.dtype == np.float64 and got.tolist() == [0.0, 1.0, 3.0]
