"""Unlearn quality, utility and leakage, on answers known beforehand."""

import numpy as np
import pytest
import torch
from tiny import make_model, make_tokenizer

from pmc_fast import UserError, evaluation
from pmc_fast.data import QA
from pmc_fast.evaluation import evaluate, greedy_answers, leakage, sampled_answers
from pmc_fast.ops import rouge_l_recall
from pmc_fast.prompts import Prompts


@pytest.fixture
def lm(rng_seed):
    return make_model(seed=rng_seed)


@pytest.fixture
def prompts():
    return Prompts(make_tokenizer())


@pytest.fixture
def told(monkeypatch):
    """Greedy answers that are given instead of computed."""
    answers = {"f1": "one two three four", "f2": "nothing", "p1": "one two", "p2": "five", "r": "red", "w": "no"}
    monkeypatch.setattr(
        evaluation, "greedy_answers", lambda model, prompts, questions, **_: [answers[q] for q in questions]
    )


def test_the_formulas(lm, prompts, told):
    forget = [QA("f1", "one two three four"), QA("f2", "five six")]
    paraphrased = [QA("p1", "one two three four"), QA("p2", "five six")]
    got = evaluate(
        lm,
        prompts,
        forget=forget,
        paraphrased=paraphrased,
        retain=[QA("r", "red")],
        utility={"world": [QA("w", "yes")]},
    )
    assert got["forget_rouge_l"] == pytest.approx((1 + 0) / 2)
    assert got["paraphrased_rouge_l"] == pytest.approx((0.5 + 0.5) / 2)
    assert got["unlearn_quality"] == pytest.approx(100 * (2 - 0.5 - 0.5) / 2)
    assert got["utility"] == pytest.approx(100 * (1 + 0) / 2)
    assert got["utility_sets"] == {"world": 0.0}
    alone = evaluate(lm, prompts, forget=forget, retain=[QA("r", "red")])
    assert alone["unlearn_quality"] == pytest.approx(100 * (1 - 0.5)) and alone["utility"] == pytest.approx(100)
    assert "paraphrased_rouge_l" not in alone


def test_true_answers_that_rouge_cannot_see_are_warned_of(lm, prompts, told):
    sets = {"forget": [QA("f1", "東京"), QA("f2", "six")], "retain": [QA("r", "red")]}
    with pytest.warns(UserWarning) as warned:
        evaluate(lm, prompts, **sets, utility={"world": [QA("w", "!")]})
    first, second = (str(warning.message) for warning in warned)
    assert first.startswith("forget: the answers to 1 of 2 questions (the first: 'f1') hold no word")
    assert second.startswith("utility['world']: the answers to 1 of 1 questions (the first: 'w')")
    with pytest.warns(UserWarning, match="^forget: the answers to 1 of 2"):
        leakage(lm, prompts, sets["forget"], num_samples=1, max_new_tokens=1)


def test_questions_are_asked_as_told(lm, prompts, monkeypatch):
    asked, given = [], {"max_new_tokens": 3, "batch_size": 5, "progress": print}
    monkeypatch.setattr(evaluation, "greedy_answers", lambda *_, **options: asked.append(options) or ["x"] * len(_[2]))
    sets = {name: [QA(f"{name}?", "x")] for name in ("forget", "retain", "paraphrased")}
    evaluate(lm, prompts, **sets, utility={"world": sets["forget"]}, **given)
    assert asked == 4 * [given]


def test_a_length_limits_prompt_and_greedy_answer_together(lm, prompts):
    length = len(prompts.prompt_ids("Who?"))
    for tokens in (1, 9):
        answers = greedy_answers(lm, prompts, ["Who?"], max_length=length + tokens)
        assert answers == greedy_answers(lm, prompts, ["Who?"], max_new_tokens=tokens)
    with pytest.raises(ValueError, match="max_new_tokens, max_length"):
        greedy_answers(lm, prompts, ["Who?"], max_new_tokens=3, max_length=length + 3)


def test_batches_change_no_answer_and_keep_the_order(lm, prompts):
    questions = ["Why?", "Who wrote the long and winding question about nothing?", "Where?", "How many are there?"]
    done = []
    whole = greedy_answers(lm, prompts, questions, max_new_tokens=9)
    assert greedy_answers(lm, prompts, questions, max_new_tokens=9, batch_size=3, progress=done.append) == whole
    assert done == [3, 1]
    assert [greedy_answers(lm, prompts, [q], max_new_tokens=9)[0] for q in questions] == whole


def test_greedy_answers_are_those_of_generate(lm, prompts):
    ids = torch.tensor([prompts.prompt_ids("What is it?")])
    generated = lm.generate(
        ids, do_sample=False, max_new_tokens=12, eos_token_id=list(prompts.end_ids), pad_token_id=256
    )
    want = prompts.decode(generated[0, ids.shape[1] :].tolist())
    assert greedy_answers(lm, prompts, ["What is it?"], max_new_tokens=12) == [want]


@pytest.mark.parametrize("prefill", ["", "It is"])
def test_leakage_is_the_mean_of_the_worst(lm, prompts, prefill, rng_seed):
    forget = [QA("a?", "It is e and t."), QA("what about b?", "o a i")]
    options = {"num_samples": 6, "temperature": 0.7, "max_new_tokens": 20, "seed": rng_seed}
    answers = sampled_answers(lm, prompts, [row.question for row in forget], prefill=prefill, **options)
    assert [len(row) for row in answers] == [6, 6]
    worst = [max(rouge_l_recall(row, [qa.answer] * 6)) for row, qa in zip(answers, forget, strict=True)]
    assert leakage(lm, prompts, forget, prefill=prefill, batch_size=1, **options) == pytest.approx(np.mean(worst))


def test_a_prefill_is_part_of_the_question(lm, prompts):
    asked = prompts.prompt_ids("a?", prefill="It is")
    generated = lm.generate(
        torch.tensor([asked]), do_sample=False, max_new_tokens=8, eos_token_id=list(prompts.end_ids), pad_token_id=256
    )
    want = prompts.decode(generated[0, len(asked) :].tolist())
    got = sampled_answers(lm, prompts, ["a?"], prefill="It is", temperature=0.0, max_new_tokens=8)
    assert got == [[want]]


def test_what_is_no_set_of_rows_is_refused_before_any_question(lm, prompts, monkeypatch):
    monkeypatch.setattr(evaluation, "sampled_answers", lambda *_, **__: pytest.fail("it asked"))
    good = [QA("a?", "b")]
    sets = {"forget": good, "retain": good, "paraphrased": None, "utility": {"world": good}}
    cases = [("forget", {"forget": "W"}), ("retain", {"retain": "W"}), ("paraphrased", {"paraphrased": "W"})]
    cases.append((r"utility\['world'\]", {"utility": {"x": good, "world": "W"}}))
    for name, change in cases:
        for wrong, message in (
            ([], "got none, expected at least one"),
            ("a?", "got 'a\\?', expected a list of rows"),
            ([("a?", "b")], "row 0 is of type tuple, expected question and answer"),
            ([*good, QA("a?", "")], "row 1: its answer is '', expected a text that is not blank"),
        ):
            given = {k: v if v != "W" else wrong for k, v in change.items()}
            given = {
                k: {n: wrong if r == "W" else r for n, r in v.items()} if isinstance(v, dict) else v
                for k, v in given.items()
            }
            with pytest.raises(UserError, match=f"^{name}: {message}"):
                evaluate(lm, prompts, **{**sets, **given})
            if name == "forget":
                with pytest.raises(UserError, match=f"^forget: {message}"):
                    leakage(lm, prompts, wrong)
    with pytest.raises(UserError, match="^utility: got a value of type list, expected a dict of sets by name, or None"):
        evaluate(lm, prompts, **{**sets, "utility": [good]})


def test_rows_may_be_dicts(lm, prompts, told):
    row, options = QA("f1", "one two"), {"retain": [QA("r", "red")]}
    assert evaluate(lm, prompts, forget=iter([vars(row)]), **options) == evaluate(lm, prompts, forget=[row], **options)


def test_wrong_objects(lm, prompts):
    rows = [QA("a?", "b")]
    for call in (
        lambda wrong: evaluate(lm, wrong, forget=rows, retain=rows),
        lambda wrong: leakage(lm, wrong, rows),
        lambda wrong: greedy_answers(lm, wrong, ["a?"]),
        lambda wrong: sampled_answers(lm, wrong, ["a?"], max_new_tokens=2),
    ):
        with pytest.raises(UserError, match=r"^prompts: got a value of type \w+, expected a Prompts: pmc"):
            call(make_tokenizer())
    with pytest.raises(UserError, match="^questions: got 'What', expected a list of texts"):
        greedy_answers(lm, prompts, "What")
    with pytest.raises(UserError, match="^batch_size: got 0, expected an integer of at least 1"):
        greedy_answers(lm, prompts, ["a?"], batch_size=0)
    with pytest.raises(
        UserError, match="^sampler: got a value of type LlamaForCausalLM, expected an object with Sampler's sample"
    ):
        greedy_answers(lm, prompts, ["a?"], sampler=lm)
    assert greedy_answers(lm, prompts, []) == []


def test_every_question_has_its_own_limit(lm, prompts, rng_seed):
    questions = ["Who wrote the long and winding question?", "Why?", "Where is it?", "What now?"]
    limits, options = [2, 7, 4, 9], {"num_samples": 3, "seed": rng_seed}
    want = [sampled_answers(lm, prompts, questions, max_new_tokens=n, **options)[i] for i, n in enumerate(limits)]
    for given in (torch.tensor(limits), limits):
        for batch_size in (1, 3, 8):
            assert (
                sampled_answers(lm, prompts, questions, max_new_tokens=given, batch_size=batch_size, **options) == want
            )
    with pytest.raises(
        ValueError, match=r"^max_new_tokens: got torch.int64 of shape \[3\], expected an integer or int64 \[4\]"
    ):
        sampled_answers(lm, prompts, questions, max_new_tokens=limits[:3])
    with pytest.raises(TypeError, match="^max_new_tokens: got 'x', expected an integer"):
        sampled_answers(lm, prompts, questions, max_new_tokens="x")


@pytest.mark.parametrize("name", ["eos_token_id", "sequence_ids", "prune"])
def test_what_is_made_of_prompts_and_questions_is_not_taken(lm, prompts, name):
    with pytest.raises(UserError, match=f"^{name}: it is made of the prompts and the questions' numbers"):
        sampled_answers(lm, prompts, ["a?"], max_new_tokens=2, **{name: None})
