"""What a training loop may give PMC, and what it is told about anything else; a refused call changes nothing."""

import json
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_pmc import QUESTIONS, RETAIN, make_pmc
from tiny import make_model, make_tokenizer
from torch.utils.data import DataLoader

from pmc_fast import PMC, Ledger, PMCConfig, Prompts, RougeRecall, Sampler, UserError, sample
from pmc_fast.data import QA, read_jsonl, write_jsonl
from pmc_fast.models import LanguageModel
from pmc_fast.packing import pad_left

IDS = {"input_ids": torch.tensor([[1, 2]]), "max_new_tokens": 2, "eos_token_id": 257}

INDICES = {
    "tensor": lambda: torch.tensor([2, 0]),
    "int32 tensor": lambda: torch.tensor([2, 0], dtype=torch.int32),
    "list of tensors": lambda: list(torch.tensor([2, 0])),
    "numpy": lambda: np.array([2, 0]),
    "numpy integers": lambda: [np.int64(2), np.int32(0)],
    "range": lambda: range(2, -1, -2),
    "iterator": lambda: iter([2, 0]),
    "batch of a DataLoader": lambda: next(iter(DataLoader([2, 0], batch_size=2))),
}


@pytest.fixture(scope="module")
def pmc():
    """For calls that are refused: they change nothing, so it serves them all."""
    return make_pmc()


@pytest.mark.parametrize("kind", INDICES)
def test_indices_of_any_kind_are_the_same_indices(kind, rng_seed):
    seed = rng_seed % 1000
    plain, other = make_pmc(seed=seed), make_pmc(seed=seed)
    for _ in range(2):
        assert torch.equal(plain.loss([2, 0], RETAIN), other.loss(INDICES[kind](), RETAIN))
    for one, batch in ((plain, [2, 0]), (other, INDICES[kind]())):
        one.prepare(iter([batch, [1]]))
    assert torch.equal(plain.loss([2, 0], RETAIN), other.loss(INDICES[kind](), RETAIN))
    state = json.loads(json.dumps(other.state_dict()))
    assert state == json.loads(json.dumps(plain.state_dict())) and set(state["ledger"]["entries"]) == {"0", "1", "2"}
    other.load_state_dict(state)
    assert json.loads(json.dumps(other.state_dict())) == state


@pytest.mark.parametrize(
    "wrong",
    [[1.0], torch.tensor([0.0]), [True], torch.tensor([True]), [torch.tensor(True)], np.array([True]), ["1"], QUESTIONS,
     "What?", [None], [[0]], torch.tensor([[0]]), [-1], torch.tensor([3]), 0, torch.tensor(0), None, {0: 1}],
    ids=repr,
)  # fmt: skip
def test_other_indices_are_refused(pmc, wrong):
    before = json.dumps(pmc.state_dict())
    for call in (lambda: pmc.loss(wrong, RETAIN), lambda: pmc.prepare([[0], wrong])):
        with pytest.raises(UserError, match=r"^forget: got index .*one of the 3 forget questions"):
            call()
    assert json.dumps(pmc.state_dict()) == before and pmc.prepared_batches == 0


def test_batches_that_are_none(pmc):
    for wrong in (3, "ab", None, {0: [1]}):
        with pytest.raises(UserError, match="^batches: got .*expected a list of micro-batches"):
            pmc.prepare(wrong)
    with pytest.raises(UserError, match="^forget: got index 1, expected a list or a tensor of them"):
        pmc.prepare([0, 1][1:])


Row = namedtuple("Row", ["question", "answer"])


@pytest.mark.parametrize(
    "make",
    [
        lambda row: {"question": row.question, "answer": row.answer, "more": 1},
        lambda row: Row(row.question, row.answer),
        lambda row: SimpleNamespace(question=row.question, answer=row.answer),
    ],
)
def test_rows_have_attributes_or_keys(make, rng_seed):
    one, other = make_pmc(seed=rng_seed % 1000), make_pmc(seed=rng_seed % 1000)
    assert torch.equal(one.loss([1], RETAIN), other.loss([1], map(make, RETAIN)))  # an iterator, too
    assert torch.equal(one.supervised_loss(RETAIN), other.supervised_loss(map(make, RETAIN)))


NO_ROWS = {
    "nothing": (None, "got None, expected a list of rows"),
    "text": ("What?", "got 'What\\?', expected a list of rows"),
    "one row": (RETAIN[0], "got a value of type QA, expected a list of rows"),
    "columns": ({"question": ["a"], "answer": ["b"]}, "got a value of type dict, expected a list of rows"),
    "tuples": ([RETAIN[0], ("a", "b")], "row 1 is of type tuple, expected question and answer"),
    "texts": (["a"], "row 0 is of type str, expected question and answer"),
    "no answer": ([{"question": "a"}], "row 0 is of type dict, expected question and answer"),
    "empty answer": ([QA("a", " ")], "row 0: its answer is ' ', expected a text that is not blank"),
    "half a character": (
        [QA("a", "b\ud83d")],
        r"row 0: its answer is 'b\\ud83d', expected UTF-8 text, without half of a",
    ),
    "no text": ([QA(None, "b")], "row 0: its question is None, expected a text"),
    "bytes": ([{"question": "a", "answer": b"b"}], "row 0: its answer is a value of type bytes, expected a text"),
}


@pytest.mark.parametrize("case", NO_ROWS)
def test_other_rows_are_refused_before_anything_is_sampled(pmc, case, monkeypatch):
    wrong, message = NO_ROWS[case]
    before = json.dumps(pmc.state_dict())
    monkeypatch.setattr(pmc.sampler, "sample", lambda *_, **__: pytest.fail("it sampled"))
    with pytest.raises(UserError, match=f"^retain: {message}"):
        pmc.loss([0], wrong)
    with pytest.raises(UserError, match=f"^rows: {message}"):
        pmc.supervised_loss(wrong)
    assert json.dumps(pmc.state_dict()) == before


def test_a_step_without_rows_is_refused(pmc):
    with pytest.raises(UserError, match="^rows: got none"):
        pmc.supervised_loss([])
    pmc.prepared_batches = 1
    with pytest.raises(UserError, match="both are empty"):
        pmc.loss(torch.tensor([], dtype=torch.int64), iter([]))
    assert pmc.prepared_batches == 1
    pmc.prepared_batches = 0


def test_a_call_that_fails_while_sampling_prepares_nothing(rng_seed, monkeypatch):
    pmc, whole = make_pmc(seed=rng_seed % 1000), make_pmc(seed=rng_seed % 1000)

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(pmc.sampler, "sample", fails)
        for call in (lambda: pmc.prepare([[0], [1]]), lambda: pmc.loss([2], RETAIN)):
            with pytest.raises(RuntimeError, match="out of memory"):
                call()
    assert pmc.state_dict() == whole.state_dict() and pmc.prepared_batches == 0
    assert torch.equal(pmc.loss([0], RETAIN), whole.loss([0], RETAIN))


NO_TEXTS = {
    "text": ("What?", "got 'What\\?', expected a list of texts"),
    "rows": ([QA("a", "b")], "number 0 is a value of type QA, expected a text"),
    "mapping": ({"question": ["a"]}, "got a value of type dict, expected a list of texts"),
    "number": (3, "got 3, expected a list of texts"),
    "half a character": (["a\udc4b"], r"number 0 is 'a\\udc4b', expected UTF-8 text, without half of a surrogate pair"),
    "blank": (["a", "\n"], r"number 1 is '\\n', expected a text that is not blank"),
}


@pytest.mark.parametrize("case", NO_TEXTS)
def test_texts_are_lists_of_texts(pmc, case):
    wrong, message = NO_TEXTS[case]
    before = pmc.ledger
    with pytest.raises(UserError, match=f"^forget_questions: {message}"):
        pmc.initialise(wrong)
    with pytest.raises(UserError, match=f"^questions: {message}"):
        pmc.greedy_answers(wrong)
    if case in ("text", "mapping", "number"):
        with pytest.raises(UserError, match=f"^answers: {message}"):
            pmc.initialise(["a", "b", "c", "d", "e"], answers=wrong)
        with pytest.raises(UserError, match=f"^questions: {message}"):
            Ledger(wrong, ["a"])
        with pytest.raises(UserError, match=f"^initial_answers: {message}"):
            Ledger(["a"], wrong)
    assert pmc.ledger is before
    with pytest.raises(UserError, match="^answers: number 0 is None, expected a text"):
        pmc.initialise(["a"], answers=[None])


def test_a_noted_answer_may_be_empty_and_questions_come_from_an_iterator(pmc):
    fresh = PMC(pmc.lm.model, pmc.prompts, pmc.config)
    with pytest.warns(UserWarning, match="1 of 2 forget questions"):
        fresh.initialise(iter(["a", "b"]), answers=iter(["", "one"]))
    assert fresh.ledger.questions == ["a", "b"] and fresh.ledger.initial_answers == ["", "one"]


def test_a_reward_takes_lists():
    for call in (RougeRecall().score, RougeRecall().lower_bound):
        with pytest.raises(TypeError, match="(candidates|beginnings): got .*, expected a list of"):
            call(["a", "b"], "ab")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": None}, "tokenizer: got None, expected a transformers tokenizer"),
        ({"tokenizer": "some/model"}, "tokenizer: got 'some/model', expected a transformers tokenizer"),
        (
            {"tokenizer": torch.nn.Linear(2, 2)},
            "tokenizer: got a value of type Linear, expected a transformers tokenizer",
        ),
        ({"model": None}, "model: got None, expected a transformers causal language model"),
        ({"config": "llama-3.2-3b"}, "config: got 'llama-3.2-3b', expected a PMCConfig, such as PMCConfig.published"),
        ({"config": {"num_samples": 3}}, "config: got a value of type dict, expected a PMCConfig"),
        ({"config": PMCConfig}, "config: got a value of type type, expected a PMCConfig"),
        ({"reward": "rouge"}, "reward: got 'rouge', expected an object with a score method"),
        ({"sampler": 3}, "sampler: got 3, expected an object with Sampler's sample method"),
    ],
)
def test_wrong_objects_at_the_front_door(arguments, message):
    given = {"model": make_model(), "tokenizer": make_tokenizer(), **arguments}
    with pytest.raises(UserError, match=f"^{message}"):
        PMC(**given)


def test_prompts_want_a_tokenizer():
    with pytest.raises(UserError, match="^tokenizer: got a value of type LlamaForCausalLM"):
        Prompts(make_model())


@pytest.mark.parametrize(
    ("value", "worded"),
    [(None, "None"), (True, "True"), ([0], "a value of type list"), ({}, "a value of type dict")],
    ids=repr,
)
def test_ops_files_and_objects_word_what_they_got_alike(value, worded, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "a?", "answer": value}))
    for error, call in (
        (TypeError, lambda: sample(torch.zeros(1, 3), top_p=value)),
        (TypeError, lambda: sample(value)),
        (UserError, lambda: Prompts(value)),
        (UserError, lambda: read_jsonl(path)),
    ):
        with pytest.raises(error, match=rf"(got|is) {worded}, (expected|want)"):
            call()


class Static:
    @staticmethod
    def score(references, candidates):
        return [0.5] * len(candidates)


class OfTheClass:
    @classmethod
    def score(cls, references, candidates):
        return [0.5] * len(candidates)


@pytest.mark.parametrize("reward", [Static, Static(), OfTheClass, OfTheClass()])
def test_a_reward_whose_method_needs_no_object(reward):
    pmc = PMC(
        make_model(), make_tokenizer(), PMCConfig(num_samples=2, max_new_tokens=3, max_length=None), reward=reward
    )
    pmc.initialise(["a?"])
    pmc.loss([0], [])
    assert pmc.stats["score"] == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pmc: PMC(pmc.lm.model, make_tokenizer(), reward=RougeRecall), "reward: got the class RougeRecall, expected an object"),
        (lambda pmc: PMC(pmc.lm.model, make_tokenizer(), sampler=Sampler), "sampler: got the class Sampler, expected an object"),
        (lambda pmc: Ledger(["a?"], []), "initial_answers: got 0, expected one for each of the 1 questions"),
        (lambda pmc: pmc.prompts.prompt_ids(3), "question: got 3, expected a text"),
        (lambda pmc: pmc.prompts.prompt_ids("a?", prefill=None), "prefill: got None, expected a text"),
        (lambda pmc: pmc.prompts.answer_ids(["b"]), "answer: got a value of type list, expected a text"),
        (lambda pmc: PMCConfig.published(["phi-1.5"]), "preset: got \\['phi-1.5'\\], expected one of"),
        (lambda pmc: read_jsonl(None), "path: got None, expected the name of a file"),
        (lambda pmc: read_jsonl(["a"]), "path: got a value of type list, expected the name of a file"),
        (lambda pmc: write_jsonl(None, []), "path: got None, expected the name of a file"),
        (lambda pmc: write_jsonl("/", [QA("a?", "b")]), "/: cannot be written \\(Is a directory\\)"),
        (lambda pmc: pad_left([], 0), "sequences: got none, expected at least one"),
        (lambda pmc: pad_left(["ab"], 0), "sequences: row 0 is 'ab', expected a list of token ids"),
        (lambda pmc: pad_left([1, 2], 0), "sequences: row 0 is 1, expected a list of token ids"),
        (lambda pmc: pad_left([[1], [1, 2]], None), "pad_id: got None, expected a token id"),
        *(
            (lambda pmc, given=given: pmc.sampler.sample(**{**IDS, **given}), message)
            for given, message in (
                ({"cache_budget": "1GB"}, "cache_budget: got '1GB', expected an integer, of bytes, or None"),
                ({"prune": True}, "prune: got True, expected a pmc_fast.pruning.Pruner or None"),
                ({"eos_token_id": -2}, "eos_token_id: got -2, expected ids of at least 0, or -1 for answers that never"),
                ({"attention_mask": torch.ones(1, 2, device="meta")}, "attention_mask: got a tensor on meta, expected one on cpu"),
                ({"sequence_ids": torch.ones(1, device="meta")}, "sequence_ids: got a tensor on meta, expected one on cpu"),
            )
        ),
    ],
)  # fmt: skip
def test_plausible_mistakes_are_named(pmc, call, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call(pmc)


def test_rows_that_are_none_are_not_written(tmp_path):
    (tmp_path / "rows.jsonl").write_text("kept")
    with pytest.raises(UserError, match="^rows: row 1 is a value of type dict, expected a QA"):
        write_jsonl(tmp_path / "rows.jsonl", [QA("a?", "b"), {"question": "a?", "answer": "b"}])
    for wrong, message in (
        (QA("a?", "half of a pair: \ud800"), '"answer" is not UTF-8 text'),
        (QA(" \n", "b"), '"question" is empty'),
        (QA("a?", ""), '"answer" is empty'),
        (QA("a?", None), '"answer" is None, want a string'),
    ):
        with pytest.raises(UserError, match=f"^rows: row 1: {message}"):
            write_jsonl(tmp_path / "rows.jsonl", [QA("a?", "b"), wrong])
    with pytest.raises(UserError, match="^rows: got none, expected at least one"):
        write_jsonl(tmp_path / "rows.jsonl", [])
    assert (tmp_path / "rows.jsonl").read_text() == "kept"


def test_prompts_that_are_not_where_the_model_is(pmc, monkeypatch):
    monkeypatch.setattr(LanguageModel, "device", torch.device("cuda:1"))
    with pytest.raises(ValueError, match="^input_ids: got a tensor on cpu, expected one on cuda:1, where the model is"):
        pmc.sampler.sample(**IDS)
