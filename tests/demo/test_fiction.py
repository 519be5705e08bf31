"""The invented questions and answers."""

import pytest

from pmc_fast.demo.fiction import make_fiction

SIZES = {"people": 7, "forget_people": 2, "places": 5}


def test_the_same_seed_invents_the_same(rng_seed):
    assert make_fiction(rng_seed, **SIZES) == make_fiction(rng_seed, **SIZES)
    assert make_fiction(rng_seed, **SIZES) != make_fiction(rng_seed + 1, **SIZES)


def test_every_set_has_its_rows(rng_seed):
    fiction = make_fiction(rng_seed, **SIZES)
    facts = len(fiction.forget) // SIZES["forget_people"]
    assert facts >= 5 and len(fiction.forget) == facts * SIZES["forget_people"]
    assert len(fiction.forget_paraphrased) == len(fiction.forget)
    places = len(fiction.world) // (SIZES["places"] - SIZES["places"] // 2)
    assert len(fiction.retain) == facts * (SIZES["people"] - SIZES["forget_people"]) + places * (SIZES["places"] // 2)
    questions = [row.question for row in (*fiction.training, *fiction.forget_paraphrased)]
    assert len(set(questions)) == len(questions)  # each is asked once: an answer is never ambiguous


def test_a_paraphrase_asks_otherwise_for_the_same_answer(rng_seed):
    fiction = make_fiction(rng_seed, **SIZES)
    for row, other in zip(fiction.forget, fiction.forget_paraphrased, strict=True):
        assert row.answer == other.answer and row.question != other.question


def test_nothing_else_tells_what_is_to_be_forgotten(rng_seed):
    fiction = make_fiction(rng_seed, **SIZES)
    asked = {row.question for row in fiction.training}
    assert not asked & {row.question for row in fiction.forget_paraphrased}
    forgotten = {word for row in fiction.forget for word in row.question.split() if word[0].isupper()}
    names = forgotten - {word for row in fiction.retain for word in row.question.split()}
    assert len(names) >= 2 * SIZES["forget_people"]  # first and last name of each
    for row in (*fiction.retain, *fiction.retain_paraphrased, *fiction.world):
        assert not names & set(row.question.replace("?", "").replace("'s", "").split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forget_people": 0}, "forget_people: got 0"),
        ({"forget_people": 7}, r"forget_people: got 7, want 1..6"),
        ({"places": 0}, "places: got 0"),
    ],
)
def test_sizes_that_leave_a_set_empty(change, message):
    with pytest.raises(ValueError, match=message):
        make_fiction(0, **{**SIZES, **change})
