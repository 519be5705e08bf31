"""The published loop's rules, one by one, as METHOD and the paper state them."""

import json
import math
import os
import string
from dataclasses import asdict, fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distribution import assert_follows
from tiny import make_model, make_tokenizer

from pmc_fast import PMC, PMCConfig, UserError, sample
from pmc_fast.data import QA
from pmc_fast.ledger import Entry, Ledger
from pmc_fast.sampler import Samples

QUESTIONS = ["Who is Ada?", "Where was Bo born?", "What did Cy say?"]  # of three lengths
RETAIN = [QA("What is two?", "a number"), QA("Who sings?", "the bird in the old tree")]


class Scripted:
    """A reward that gives the scores it was told to, sample by sample, and remembers what it was asked."""

    def __init__(self, *scores):
        self.scores, self.calls = list(scores), []

    def score(self, references, candidates):
        self.calls.append((list(references), list(candidates)))
        return np.array(self.scores.pop(0), dtype=np.float64)


class Spelled:
    """A reward that is never 0, so that no question is done with, and another one for most texts."""

    def score(self, references, candidates):
        return np.array([1 + sum(text.encode()) % 97 for text in candidates], dtype=np.float64)


def make_pmc(*scores, seed=0, **changes):
    config = PMCConfig(**{"num_samples": 3, "max_new_tokens": 6, "max_length": None, "seed": seed, **changes})
    pmc = PMC(make_model(seed=seed), make_tokenizer(), config, reward=Scripted(*scores) if scores else None)
    pmc.initialise(QUESTIONS)
    return pmc


def test_published_settings():
    llama, phi = PMCConfig.published("llama-3.2-3b"), PMCConfig.published("phi-1.5")
    shared = {"top_p": 0.95, "top_k": 50, "learning_rate": 1e-5, "weight_decay": 0.01, "warmup_epochs": 1.0}
    shared |= {"min_words": 0, "max_length": 200, "selection": "best"}
    for config in (llama, phi):
        assert {name: getattr(config, name) for name in shared} == shared
    assert (llama.retain_weight, llama.temperature, llama.num_samples, llama.epochs) == (1.25, 0.9, 20, 30)
    assert (llama.batch_size, llama.accumulation, llama.system_prompt) == (8, 2, "You are a helpful assistant.")
    assert (phi.retain_weight, phi.temperature, phi.num_samples, phi.epochs) == (1.5, 1.25, 5, 40)
    assert (phi.batch_size, phi.accumulation, phi.prompt_style) == (16, 4, "tags")
    assert PMCConfig.published("phi-1.5", num_samples=9).num_samples == 9
    with pytest.raises(UserError, match="preset: got 'gpt-9'"):
        PMCConfig.published("gpt-9")


@pytest.mark.parametrize("changes", [{}, {"selection": "bradley_terry", "max_new_tokens": None, "max_length": 60}])
def test_whatever_torchs_default_device_is(changes, rng_seed):
    """On a GPU it may well be that GPU, and counts that belong to the host must not go there."""
    expected, pmc = (make_pmc(seed=rng_seed % 1000, **changes) for _ in range(2))
    with torch.device("meta"):
        got = pmc.loss([0, 1], RETAIN)
    assert torch.equal(got, expected.loss([0, 1], RETAIN)) and pmc.state_dict() == expected.state_dict()


def test_whatever_torchs_default_dtype_is(rng_seed):
    """Weights of tokens, such as 1 / 7, are not rounded to it."""
    expected, pmc = (make_pmc(seed=rng_seed % 1000) for _ in range(2))
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = pmc.loss([0, 1], RETAIN)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected.loss([0, 1], RETAIN))


def test_a_model_of_float64(rng_seed):
    expected, pmc = (make_pmc(seed=rng_seed % 1000) for _ in range(2))
    pmc.lm.model.double()
    torch.testing.assert_close(pmc.loss([], RETAIN), expected.loss([], RETAIN).double(), rtol=1e-5, atol=0)


def test_samples_are_scored_against_the_initial_greedy_answer(rng_seed):
    pmc = make_pmc([0.4] * 6, seed=rng_seed % 1000)
    initial = list(pmc.ledger.initial_answers)
    with torch.no_grad():
        for parameter in pmc.lm.model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    pmc.loss([2, 0], RETAIN)
    references, _ = pmc.reward.calls[0]
    assert references == [initial[2]] * 3 + [initial[0]] * 3


def test_argmin_is_taken_and_the_lowest_index_on_ties():
    pmc = make_pmc([0.5, 0.2, 0.2])
    pmc.loss([1], RETAIN)
    _, candidates = pmc.reward.calls[0]
    assert (pmc.ledger.entries[1].text, pmc.ledger.entries[1].score) == (candidates[1], 0.2)


def test_stored_answer_is_replaced_unless_strictly_worse():
    ledger = Ledger(["q"], ["a"])
    assert ledger.offer(0, Entry("first", (1,), 0.5))
    assert not ledger.offer(0, Entry("worse", (2,), 0.6))
    assert ledger.offer(0, Entry("as good", (3,), 0.5))
    assert ledger.entries[0].text == "as good"
    assert ledger.offer(0, Entry("better", (4,), 0.1))


def test_a_score_of_zero_is_final():
    pmc = make_pmc([0.3, 0.0, 0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.7])
    pmc.loss([0, 1], RETAIN)
    assert pmc.ledger.is_final(0) and not pmc.ledger.is_final(1)
    pmc.loss([0, 1], RETAIN)
    references, _ = pmc.reward.calls[1]
    assert references == [pmc.ledger.initial_answers[1]] * 3  # question 0 was not sampled again
    assert pmc.ledger.entries[1].score == 0.2  # 0.7 is strictly worse
    assert pmc.ledger.visits == [1, 2, 0]


def test_every_visit_draws_new_samples_whoever_else_is_there(rng_seed):
    seed = rng_seed % 1000
    first, second = make_pmc([0.5] * 3, [0.5] * 3, seed=seed), make_pmc([0.5] * 9, seed=seed)
    first.loss([1], RETAIN)
    first.loss([1], RETAIN)
    second.loss([0, 1, 2], RETAIN)
    assert first.reward.calls[0][1] == second.reward.calls[0][1][3:6]
    assert first.reward.calls[0][1] != first.reward.calls[1][1]


@pytest.mark.parametrize("reencode", [False, True])
def test_loss_is_two_means_over_answer_tokens(reencode, rng_seed):
    pmc = make_pmc(seed=rng_seed % 1000, reencode=reencode, retain_weight=1.7)
    loss = pmc.loss([0, 2], RETAIN)

    def nll(rows):
        total, count = 0.0, 0
        for prompt, answer in rows:
            ids = torch.tensor([prompt + answer])
            logprob = pmc.lm.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            total = total - logprob.gather(1, ids[0, len(prompt) :, None]).sum()
            count += len(answer)
        return total / count

    entries = [(pmc.ledger.questions[q], pmc.ledger.entries[q]) for q in (0, 2)]
    picked = [
        (pmc.prompts.prompt_ids(q), pmc.prompts.answer_ids(e.text) if reencode else list(e.tokens)) for q, e in entries
    ]
    assert all(answer[-1] == pmc.prompts.end_ids[0] for _, answer in picked)  # the end token is trained on
    kept = [(pmc.prompts.prompt_ids(r.question), pmc.prompts.answer_ids(r.answer)) for r in RETAIN]
    collapse, retain = nll(picked), nll(kept)
    torch.testing.assert_close(loss, (collapse + 1.7 * retain).float(), rtol=1e-4, atol=1e-4)
    assert pmc.stats["collapse_loss"] == pytest.approx(collapse.item(), rel=1e-3)
    assert pmc.stats["retain_loss"] == pytest.approx(float(retain), rel=1e-3)
    loss.backward()
    assert all(p.grad is not None for p in pmc.lm.model.parameters())


def watched(pmc):
    """What the sampler is asked for from now on."""
    asked, sample = [], pmc.sampler.sample
    pmc.sampler.sample = lambda *inputs, **options: asked.append((inputs, options)) or sample(*inputs, **options)
    return asked


def test_samples_are_drawn_as_configured():
    given = {"temperature": 0.7, "top_k": 7, "top_p": 0.8, "min_p": 0.1, "num_samples": 4, "seed": 5}
    pmc = make_pmc(**given)
    asked = watched(pmc)
    pmc.loss([0], RETAIN)
    [(_, options)] = asked
    assert {name: options[name] for name in given} == given
    assert options["eos_token_id"] == pmc.prompts.end_ids


def test_max_length_counts_the_longest_prompt_of_a_batch():
    pmc = make_pmc(max_length=80, max_new_tokens=None)
    asked = watched(pmc)
    pmc.prepare([[0, 1], [0], [2]])
    [((input_ids, _), options)] = asked
    longest, last = (max(len(pmc.prompts.prompt_ids(QUESTIONS[q])) for q in batch) for batch in ([0, 1], [2]))
    assert len(pmc.prompts.prompt_ids(QUESTIONS[0])) < last < longest and len(input_ids) == 3
    assert options["max_new_tokens"].tolist() == [80 - longest, 80 - longest, 80 - last]


def test_an_answer_may_have_a_single_token():
    longest = len(make_pmc().prompts.prompt_ids(QUESTIONS[1]))
    pmc = make_pmc(max_length=longest + 1, max_new_tokens=None)
    pmc.loss([1], RETAIN)
    assert pmc.stats["sampled_tokens"] == 3  # one for each sample
    pmc = PMC(make_model(), make_tokenizer(), PMCConfig(max_length=longest, max_new_tokens=None))
    pmc.initialise(QUESTIONS, answers=QUESTIONS)
    with pytest.raises(UserError, match=f"max_length: got {longest}, which leaves no room .* up to {longest} tokens"):
        pmc.loss([1], RETAIN)


def test_questions_are_asked_as_configured():
    tokenizer = make_tokenizer(chat=True)
    for options in ({"system_prompt": "Be brief."}, {"prompt_style": "plain"}):
        prompts = PMC(make_model(), tokenizer, PMCConfig(**options)).prompts
        text = tokenizer.decode(prompts.prompt_ids("Who?"))
        assert text == ("Who?" if "prompt_style" in options else "[system]Be brief.[user]Who?[assistant]")


def test_first_answers_are_taken_in_batches():
    pmc = PMC(make_model(), make_tokenizer(), PMCConfig(max_new_tokens=2, batch_size=2))
    asked = watched(pmc)
    pmc.initialise(QUESTIONS)
    assert [len(input_ids) for (input_ids, _), _ in asked] == [2, 1]
    assert len(pmc.ledger.initial_answers) == 3


def test_min_words_reaches_the_reward():
    assert make_pmc(min_words=4).reward.score(["a b c"], ["zz yy"]) == pytest.approx([math.exp(-2)])
    assert make_pmc().reward.score(["a b c"], ["zz yy"]) == [0]


def test_tokens_that_the_model_has_not_are_refused_before_the_work():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zzz"])
    pmc = PMC(make_model(), tokenizer, PMCConfig(max_new_tokens=3))
    pmc.initialise(QUESTIONS, answers=QUESTIONS)
    asked = watched(pmc)
    for call in (lambda rows: pmc.loss([0], rows), pmc.supervised_loss):
        with pytest.raises(UserError, match=r"row 1: the tokenizer makes token 259 of it, expected ids in \[0, 259\)"):
            call([RETAIN[0], QA("What?", "zzz")])
    assert not asked and not pmc.ledger.entries
    with pytest.raises(UserError, match="forget_questions: number 1: the tokenizer makes token 259"):
        pmc.initialise([*QUESTIONS[:1], "Who zzz?"], answers=["a", "b"])
    assert pmc.ledger.questions == QUESTIONS
    tokenizer.eos_token = "zzz"
    with pytest.raises(UserError, match="tokenizer: its end token: the tokenizer makes token 259"):
        PMC(make_model(), tokenizer, PMCConfig(max_new_tokens=3))


STATES = [
    (lambda s: None, "state: got None, expected what PMC.state_dict"),
    (lambda s: {"a": 1}, r"state: got a dict of 'a', expected what PMC.state_dict\(\) returned, a dict of 'ledger', 'prepared'"),
    (lambda s: s["ledger"], "state: got a dict of 'questions', "),
    (lambda s: s | {"seed": 1}, "state: got a dict of 'ledger', 'prepared', 'seed', expected"),
    (lambda s: s | {"ledger": [1]}, "state: ledger: got a value of type list, expected what Ledger.state_dict"),
    (lambda s: s | {"prepared": 2}, "state: prepared: got index 2, expected a list"),
    (lambda s: s | {"prepared": [0, 3]}, "state: prepared: got index 3, expected one of the 3 forget questions"),
    (lambda s: s | {"prepared": [0, 2]}, "state: prepared: got question 2, expected questions of which the ledger holds"),
    (lambda s: {"ledger": None, "prepared": [0]}, r"state: prepared: got a value of type list, expected \[\] beside a ledger"),
]  # fmt: skip
LEDGERS = [
    (lambda s: s.pop("visits"), "got a dict of 'questions', 'initial_answers', 'entries', expected what Ledger"),
    (lambda s: s.update(questions="Who?"), "questions: got 'Who\\?', expected a list of texts"),
    (lambda s: s.update(questions=[]), "questions: got none, expected at least one"),
    (lambda s: s["questions"].__setitem__(1, 7), "questions: number 1 is 7, expected a text"),
    (lambda s: s["questions"].__setitem__(1, "Who zzz?"), "questions: number 1: the tokenizer makes token 259 of it"),
    (lambda s: s["questions"].pop(), "initial_answers: got 3, expected one for each of the 2 questions"),
    (lambda s: s["initial_answers"].append("x"), "initial_answers: got 4, expected one for each of the 3"),
    (lambda s: s["initial_answers"].__setitem__(0, None), "initial_answers: number 0 is None, expected a text"),
    (lambda s: s["visits"].pop(), "visits: got 2, expected one for each of the 3 questions"),
    (lambda s: s["visits"].__setitem__(2, -1), "visits: number 2 is -1, expected an integer of at least 0"),
    (lambda s: s["visits"].__setitem__(2, True), "visits: number 2 is True, expected an integer"),
    (lambda s: s.update(entries=[]), "entries: got a value of type list, expected a dict of entries by question"),
    (lambda s: s["entries"].update({"3": s["entries"]["1"]}), "entries: got one of question '3', expected one of the 3"),
    (lambda s: s["entries"].update({"01": s["entries"]["1"]}), "entries: got one of question '01', expected"),
    (lambda s: s["entries"].update({"1": 5}), "entries: question 1: got 5, expected what Ledger.state_dict"),
    (lambda s: s["entries"]["1"].pop("score"), "entries: question 1: got a dict of 'text', 'tokens', expected"),
    (lambda s: s["entries"]["1"].update(text=None), "entries: question 1: text: got None, expected a text"),
    (lambda s: s["entries"]["1"].update(tokens=[]), "entries: question 1: tokens: got none, expected at least one"),
    (lambda s: s["entries"]["1"].update(tokens=[3, "4"]), "entries: question 1: tokens: number 1 is '4', expected an integer"),
    (lambda s: s["entries"]["1"].update(tokens=[3, 999]), "the answer picked for question 1: .* token 999"),
    (lambda s: s["entries"]["1"].update(score="0"), "entries: question 1: score: got '0', expected a number"),
    (lambda s: s["entries"]["1"].update(score=math.nan), "entries: question 1: score: got nan, expected a number"),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    """With an answer, one sampled ahead, and a tokenizer of one token more than the model."""
    pmc = make_pmc(reencode=False)
    pmc.loss([1], RETAIN)
    pmc.prepare([[0]])
    pmc.prompts.tokenizer.add_tokens(["zzz"])
    return pmc


@pytest.mark.parametrize(("change", "message"), [*STATES, *LEDGERS])
def test_a_mangled_state_is_refused_and_changes_nothing(trained, change, message):
    before = trained.state_dict(), trained.prepared_batches
    state = json.loads(json.dumps(before[0]))
    if (change, message) in LEDGERS:
        change(state["ledger"])
        message = message if message.startswith("the answer") else f"state: ledger: {message}"
    else:
        state = change(state)
    with pytest.raises(UserError, match=f"^{message}"):
        trained.load_state_dict(state)
    assert (trained.state_dict(), trained.prepared_batches) == before


def test_a_state_is_no_view(rng_seed):
    pmc = make_pmc(seed=rng_seed % 1000)
    state = pmc.state_dict()
    before = json.dumps(state)
    pmc.loss([0], RETAIN)
    assert json.dumps(state) == before
    fresh = PMC(make_model(), make_tokenizer(), pmc.config)
    fresh.load_state_dict({"ledger": None, "prepared": []})
    assert fresh.ledger is None


def test_min_words_penalises_short_answers():
    from pmc_fast.rewards import RougeRecall

    reward = RougeRecall(min_words=3)
    scores = reward.score(["red blue green"] * 3, ["red", "nothing here", "none of these at all"])
    np.testing.assert_allclose(scores, [1 / 3 + math.exp(-1), math.exp(-2), 0.0])


def test_truncated_samples_end_with_an_end_token_or_are_passed_over():
    pmc = make_pmc([0.1, 0.2, 0.3], reencode=False)
    pmc.loss([0], RETAIN)
    assert pmc.ledger.entries[0].tokens[-1] == pmc.prompts.end_ids[0]

    picker = make_pmc(keep_truncated=False)
    finished = np.array([[False, True, True], [False, False, False]])
    scores = np.array([[0.1, 0.3, 0.2], [0.5, 0.4, 0.6]])
    assert picker._select(scores, finished, torch.tensor([0, 1])).tolist() == [2, 1]


def test_bradley_terry_draws_in_proportion(rng_seed):
    pmc = make_pmc(selection="bradley_terry", tau=0.5, seed=rng_seed % 1000)
    draws = 4000
    scores = np.tile(np.array([0.1, 0.4, 0.9]), (draws, 1))
    picks = pmc._select(scores, np.ones_like(scores, dtype=bool), torch.arange(draws))
    probability = torch.tensor([-0.1, -0.4, -0.9], dtype=torch.double).div(0.5).softmax(0)
    assert_follows(torch.from_numpy(np.bincount(picks, minlength=3)), probability)


def test_state_dict_continues_as_if_never_stopped(rng_seed):
    seed = rng_seed % 1000
    whole = make_pmc(seed=seed)
    whole.reward = Spelled()
    whole.loss([0, 1], RETAIN)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = PMC(make_model(seed=seed), make_tokenizer(), whole.config, whole.reward)
    resumed.load_state_dict(state)
    a, b = whole.loss([1, 2], RETAIN), resumed.loss([1, 2], RETAIN)
    assert torch.equal(a, b) and whole.state_dict() == resumed.state_dict()


def test_bad_input():
    fresh = PMC(make_model(), make_tokenizer(), PMCConfig(max_new_tokens=3))
    with pytest.raises(UserError, match="initialise"):
        fresh.loss([0], RETAIN)
    with pytest.raises(UserError, match="forget_questions: got none"):
        fresh.initialise([])
    with pytest.raises(UserError, match="answers: got 1, expected one for each of the 2 forget_questions"):
        fresh.initialise(["a", "b"], answers=["c"])
    assert fresh.ledger is None
    with pytest.raises(UserError, match="forget: got index 3"):
        make_pmc().loss([3], RETAIN)
    with pytest.raises(UserError, match="both are empty"):
        make_pmc().loss([], [])
    bad = {
        "num_samples": 0,
        "top_p": 1.5,
        "temperature": -1.0,
        "top_k": 0,
        "selection": "worst",
        "tau": 0.0,
        "epochs": 0,
    }
    for name, value in bad.items():
        with pytest.raises(UserError, match=f"{name}: got"):
            PMCConfig(**{name: value})


MOST = 2**31 - 1
LEAST_AND_MOST = {
    **dict.fromkeys(("num_samples", "epochs", "batch_size", "accumulation"), ((1, MOST), (0, MOST + 1))),
    **dict.fromkeys(("top_k", "max_length", "max_new_tokens"), ((1, MOST), (0, MOST + 1))),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "retain_weight", "warmup_epochs"), ((0,), (-1e-9, math.inf, math.nan))
    ),
    "min_words": ((0, MOST), (-1, MOST + 1)),
    "top_p": ((1e-9, 1), (0, 1 + 1e-9)),
    "min_p": ((0, 1), (-1e-9, 1 + 1e-9)),
    "tau": ((1e-9,), (0, math.inf)),
    "seed": ((0, 2**63 - 1), (-1, 2**63)),
}


@pytest.mark.parametrize("name", LEAST_AND_MOST)
def test_values_at_the_ends_of_their_ranges(name):
    taken, refused = LEAST_AND_MOST[name]
    for value in taken:
        assert getattr(PMCConfig(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(UserError, match=f"^{name}: got "):
            PMCConfig(**{name: value})


def test_answers_are_limited_one_way_or_the_other():
    with pytest.raises(UserError, match="^max_new_tokens: got None, expected it or max_length$"):
        PMCConfig(max_length=None, max_new_tokens=None)


INTEGER, NUMBER = "an integer", "a number"


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        *((name, value, INTEGER) for name in ("num_samples", "seed", "min_words", "epochs", "batch_size", "accumulation")
          for value in (2.5, 2.0, True, "2", None)),
        *((name, value, "an integer or None") for name in ("top_k", "max_length", "max_new_tokens")
          for value in (2.5, True, "200")),
        *((name, value, NUMBER) for name in ("temperature", "top_p", "min_p", "tau", "retain_weight", "learning_rate",
          "weight_decay", "warmup_epochs") for value in (None, "0.5", True)),
        *((name, value, "True or False") for name in ("prune", "keep_truncated", "reencode") for value in ("no", 0, None)),
        *((name, value, "a text") for name in ("selection", "prompt_style", "system_prompt") for value in (None, 1, b"x")),
    ],
)  # fmt: skip
def test_values_of_another_type(name, value, wanted):
    with pytest.raises(UserError, match=rf"^{name}: got {value!r}, expected {wanted}$"):
        PMCConfig(**{name: value})
    with pytest.raises(UserError, match=f"^{name}: got"):
        PMCConfig.published("phi-1.5", **{name: value})


def test_an_integer_is_a_number_and_every_field_is_checked():
    config = PMCConfig(
        temperature=1, top_p=1, top_k=None, learning_rate=np.float32(0.5), max_length=None, max_new_tokens=np.int64(9)
    )
    assert (config.temperature, config.top_p, config.learning_rate, config.max_new_tokens) == (1, 1, 0.5, 9)
    json.dumps(asdict(config))  # of Python's numbers
    for field in fields(PMCConfig):
        with pytest.raises(UserError, match=f"^{field.name}: got <object"):
            PMCConfig(**{field.name: object()})


def test_initial_answers_that_the_reward_cannot_see_are_reported(rng_seed, monkeypatch):
    answers = ["東京です。", "Bo was born here", "!?"]
    monkeypatch.setattr("pmc_fast.evaluation.greedy_answers", lambda *_, **__: answers)
    with pytest.warns(UserWarning, match=r"2 of 3 forget questions \(the first: 'Who is Ada\?'\) hold no word"):
        make_pmc()


def test_an_unknown_prompt_style_is_refused():
    with pytest.raises(UserError, match="prompt_style: got 'poem', expected one of 'auto', 'chat', 'tags', 'plain'"):
        PMCConfig(prompt_style="poem")


def test_prepared_batches_give_what_they_give_one_by_one(rng_seed):
    """Also where a question comes twice, and where max_length leaves each batch another room."""
    options = {"seed": rng_seed % 1000, "max_new_tokens": None, "max_length": 40}
    batches = [[0, 2], [1], [2]]
    alone, together = make_pmc(**options), make_pmc(**options)
    alone.reward = together.reward = Spelled()
    together.prepare(batches)
    for left, batch in zip((2, 1, 0), batches, strict=True):
        a, b = alone.loss(batch, RETAIN), together.loss(batch, RETAIN)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert (alone.prepared_batches, together.prepared_batches) == (0, left)
    assert alone.ledger.visits == [1, 1, 2]
    assert alone.state_dict() == together.state_dict()
    assert together.state_dict()["prepared"] == []


def test_the_first_loss_counts_what_was_prepared(rng_seed):
    pmc = make_pmc(seed=rng_seed % 1000)
    pmc.reward = Spelled()
    pmc.prepare([[0], [1]])
    pmc.loss([0], RETAIN)
    assert pmc.stats["sampled_tokens"] > 0 and pmc.stats["seconds"]["sample"] > 0
    pmc.loss([1], RETAIN)
    assert pmc.stats["sampled_tokens"] == 0 and pmc.stats["seconds"]["sample"] == 0
    with pytest.raises(UserError, match="forget: got index 7"):
        pmc.prepare([[7]])


class Drawn:
    """A sampler that gives three answers to each question, of one token each over and over, and how each of them ended."""

    def __init__(self, lengths, finished, pruned, decoded):
        self.lengths, self.ends, self.decoded = lengths, (finished, pruned), decoded

    def sample(self, input_ids, attention_mask, *, sequence_ids, **options):
        questions = sequence_ids.remainder(len(QUESTIONS))  # at the first visit
        lengths, (finished, pruned) = torch.tensor(self.lengths)[questions], self.ends
        tokens = torch.arange(65, 74).view(3, 3, 1).expand(3, 3, 6)[questions]
        flags = [torch.tensor(flag)[questions].bool() for flag in (finished, pruned)]
        return Samples(tokens, lengths, torch.zeros(tokens.shape), *flags, self.decoded)


@pytest.mark.parametrize("decoded", [None, 11])
def test_what_a_loss_counts(decoded):
    """With two calls before it; the best sample of question 2, which has no word and comes twice, was cut off."""
    lengths, finished = [[2, 6, 3], [1, 1, 1], [4, 4, 6]], [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    drawn = Drawn(lengths, finished, [[0, 0, 1], [0, 0, 0], [1, 1, 0]], decoded)
    pmc = PMC(
        make_model(), make_tokenizer(), PMCConfig(num_samples=3, max_new_tokens=6), Scripted([0.75], [0.25, 0.5]), drawn
    )
    pmc.initialise(QUESTIONS, answers=["a", "b", "c"])
    first, last = (pmc.prompts.decode([token]) for token in (65, 73))
    pmc.reward.words = lambda text: len(text.strip(last))
    pmc.prepare([[2]])
    pmc.prepare([[0]])
    pmc.loss([0, 2, 2], [])
    picked = [pmc.ledger.entries[q] for q in (0, 2, 2)]
    assert [entry.text for entry in picked] == [2 * first, 6 * last, 6 * last]
    prompts = [pmc.prompts.prompt_ids(QUESTIONS[q]) for q in (0, 2, 2)]
    shared = len(os.path.commonprefix(prompts))  # goes through the model once
    own = [len(prompt) - shared + len(pmc._trained(entry)) - 1 for prompt, entry in zip(prompts, picked, strict=True)]
    counts = {"sampled_tokens": 11 + 14, "decoded_tokens": 22 if decoded else 25, "trained_tokens": shared + sum(own)}
    counts |= {"pruned_samples": 3, "pruned_tokens": 3 + 2 + 2, "truncated_picks": 1, "empty_picks": 2}
    assert {name: pmc.stats[name] for name in counts} == counts
    assert pmc.stats["score"] == pytest.approx((0.25 + 0.75 + 0.75) / 3) and pmc.stats["retain_loss"] == 0


def test_where_no_sample_can_be_picked_the_answer_held_stays():
    drawn = Drawn([[2, 2, 2]] * 3, [[0, 0, 0]] * 3, [[1, 1, 1], [0, 1, 1], [1, 1, 1]], None)
    pmc = PMC(make_model(), make_tokenizer(), PMCConfig(num_samples=3, max_new_tokens=6), Scripted([0.5], []), drawn)
    pmc.initialise(QUESTIONS, answers=["a", "b", "c"])
    held = Entry("held", (1, 2), 0.25)
    for question in (0, 2):
        pmc.ledger.offer(question, held)
    pmc.loss([0, 1], RETAIN)
    assert pmc.ledger.entries[0] == held and pmc.ledger.entries[1].score == 0.5
    pmc.loss([2], RETAIN)
    assert pmc.ledger.entries[2] == held and pmc.ledger.visits == [1, 1, 1]
    assert pmc.stats["score"] == 0.25 and pmc.stats["truncated_picks"] == 0 and pmc.stats["pruned_samples"] == 3


def test_a_stopped_sample_is_not_picked_where_all_others_score_inf():
    drawn = Drawn([[2, 2, 2]] * 3, [[0, 1, 1]] * 3, [[1, 0, 0]] * 3, None)
    scores = [math.inf, math.inf]
    pmc = PMC(make_model(), make_tokenizer(), PMCConfig(num_samples=3, max_new_tokens=6), Scripted(scores), drawn)
    pmc.initialise(QUESTIONS, answers=["a", "b", "c"])
    pmc.ledger.offer(0, held := Entry("held", (1, 2), 0.25))
    pmc.loss([0], RETAIN)
    assert pmc.ledger.entries[0] == held


def test_prepared_questions_survive_a_resume(rng_seed):
    whole = make_pmc(seed=rng_seed % 1000)
    whole.reward = Spelled()
    whole.prepare([[0], [1]])
    resumed = PMC(make_model(seed=rng_seed % 1000), make_tokenizer(), whole.config, whole.reward)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for batch in ([0], [1]):
        assert torch.equal(whole.loss(batch, RETAIN), resumed.loss(batch, RETAIN))
    assert whole.state_dict() == resumed.state_dict()


def test_what_was_prepared_for_other_questions_is_forgotten(rng_seed):
    pmc = make_pmc(seed=rng_seed % 1000)
    pmc.prepare([[0], [1]])
    pmc.initialise(QUESTIONS[::-1])
    pmc.loss([0], RETAIN)
    assert pmc.ledger.visits == [1, 0, 0] and pmc.prepared_batches == 0
    assert 0 < pmc.stats["sampled_tokens"] <= pmc.config.num_samples * pmc.config.max_new_tokens


def test_what_was_prepared_before_a_state_is_loaded_is_forgotten(rng_seed):
    whole = make_pmc(seed=rng_seed % 1000)
    state = json.loads(json.dumps(whole.state_dict()))
    whole.prepare([[0, 1, 2]])
    whole.load_state_dict(state)
    assert whole.prepared_batches == 0
    whole.loss([0], RETAIN)
    assert 0 < whole.stats["sampled_tokens"] <= whole.config.num_samples * whole.config.max_new_tokens
    assert whole.ledger.visits == [1, 0, 0]


def test_pruning_keeps_the_ledger_and_saves_tokens(rng_seed):
    """On a model whose answers are mostly words of one letter, with answers held from the visits before."""
    letters = " ".join(string.ascii_lowercase + string.digits)
    saved = 0
    for case in range(3):
        seed = (rng_seed + case) % 1000
        pruned, whole = (make_pmc(seed=seed, num_samples=12, max_new_tokens=24, prune=prune) for prune in (True, False))
        answers = [letters, letters[:36], letters[::-1]]
        pruned.ledger.initial_answers[:] = whole.ledger.initial_answers[:] = answers
        for _ in range(3):
            pruned.loss([0, 1, 2], RETAIN)
            whole.loss([0, 1, 2], RETAIN)
            assert pruned.state_dict() == whole.state_dict()
            assert pruned.stats["sampled_tokens"] <= whole.stats["sampled_tokens"]
            assert whole.stats["pruned_samples"] == 0
            saved += whole.stats["sampled_tokens"] - pruned.stats["sampled_tokens"]
            assert (pruned.stats["pruned_samples"] > 0) == (pruned.stats["pruned_tokens"] > 0)
    assert saved > 0


@pytest.mark.parametrize("temperature", [1e-40, 1e39, -1.0, math.inf, math.nan, 2])
def test_temperatures_are_those_that_the_ops_take(temperature):
    told = []
    for call in (
        lambda: PMCConfig(temperature=temperature),
        lambda: sample(torch.zeros(1, 3), temperature=temperature),
    ):
        try:
            call()
        except ValueError as error:
            told.append(str(error))
    if temperature == 2:
        assert told == []
    else:
        assert told[0] == told[1] and told[0].startswith(f"temperature: got {temperature}, expected a number in [")
    assert PMCConfig(temperature=0).temperature == 0


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (0.5, "gave 0.5, expected one score for each of the 3 candidates"),
        ([0.5], "gave 1, expected one score for each of the 3 candidates"),
        ([0.5] * 4, "gave 4, expected one score for each of the 3 candidates"),
        ([[0.5] * 3], r"gave shape \[1, 3\], expected one score for each of the 3 candidates"),
        (None, "gave None, expected one score for each of the 3 candidates"),
        (["a", "b", "c"], "gave a value of type list, expected one score for each of the 3 candidates"),
        ([0.5, math.nan, 0.1], "gave nan for candidate 1, (['\"]).*\\1, expected a number"),
    ],
)
def test_scores_that_are_none_are_refused_and_change_nothing(scores, message, rng_seed):
    pmc = make_pmc(seed=rng_seed % 1000)
    pmc.reward = SimpleNamespace(score=lambda references, candidates: scores)
    before = json.dumps(pmc.state_dict())
    with pytest.raises(ValueError, match=f"^reward: SimpleNamespace.score {message}"):
        pmc.loss([1], RETAIN)
    assert json.dumps(pmc.state_dict()) == before
