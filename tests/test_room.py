"""Answers that do not fit behind their questions are refused before any work."""

import pytest
from tiny import make_model, make_tokenizer

from pmc_fast.config import PMCConfig
from pmc_fast.data import QA
from pmc_fast.errors import UserError
from pmc_fast.prompts import Prompts
from pmc_fast.room import check_evaluation, check_sampling, check_training

PROMPTS = Prompts(make_tokenizer(), style="plain")  # a token for each byte
# The two long questions have as many tokens, and the second comes later in the alphabet.
ROWS = [QA("Who?", "He."), QA("Who was it then?", "Them."), QA("Why was it them?", "A long answer it is.")]
TOKENS = 129  # of a question and its answer: the model has 128 positions, and the last token needs none


@pytest.fixture(params=["gpt2", "llama"])
def model(request):
    """One with a table of positions, one that computes them."""
    return make_model(request.param)


def outcome(check, *arguments):
    """What is refused, or None."""
    try:
        return check(*arguments)
    except UserError as error:
        return str(error)


def test_max_length_is_that_of_the_longest_prompt(model):
    longest = len("Who was it then?")
    check_sampling(model, PROMPTS, ROWS, PMCConfig(max_length=longest + 1))
    check_sampling(model, PROMPTS, ROWS, PMCConfig(max_length=1, max_new_tokens=1))
    with pytest.raises(UserError, match=f"--max-length: got {longest}, .* 'Who was it then\\?'"):
        check_sampling(model, PROMPTS, ROWS, PMCConfig(max_length=longest))


def test_long_questions_are_cut_in_messages(model):
    for question, named in (("?" * 80, "?" * 80), ("?" * 81, "?" * 77 + "...")):
        message = outcome(check_sampling, model, PROMPTS, [QA(question, "He.")], PMCConfig(max_length=9))
        assert f"that ask {named!r}; " in message


def test_a_row_with_tokens_that_the_model_has_not_is_named(model):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zzz"])
    prompts, rows = Prompts(tokenizer, style="plain"), [*ROWS, QA("Who zzz?", "He.", "rows.jsonl:4")]
    refused = {
        "--forget": outcome(check_sampling, model, prompts, rows, PMCConfig()),
        "question": outcome(check_evaluation, model, prompts, rows, 1),
        "--retain": outcome(check_training, model, prompts, rows, "--retain"),
    }
    for what, message in refused.items():
        assert message.startswith(f"{what}: 'Who zzz?' (rows.jsonl:4): the tokenizer makes token 259 of it")


def test_answers_need_positions_where_there_is_a_table_of_them(model):
    longest, behind = len("Who was it then?"), len(" It.") + 1
    exact, over = (QA("?" * (TOKENS - behind + more), "It.") for more in (0, 1))
    fits = [
        outcome(check_sampling, model, PROMPTS, ROWS, PMCConfig(max_length=TOKENS - 1)),
        outcome(check_sampling, model, PROMPTS, ROWS, PMCConfig(max_new_tokens=TOKENS - longest - 1)),
        outcome(check_evaluation, model, PROMPTS, ROWS, TOKENS - longest),
        outcome(check_training, model, PROMPTS, [*ROWS, exact], "--retain"),
    ]
    refused = [
        outcome(check_sampling, model, PROMPTS, ROWS, PMCConfig(max_length=TOKENS)),
        outcome(check_sampling, model, PROMPTS, ROWS, PMCConfig(max_new_tokens=TOKENS - longest)),
        outcome(check_evaluation, model, PROMPTS, ROWS, TOKENS - longest + 1),
        outcome(check_evaluation, model, PROMPTS, ROWS, TOKENS - longest, " It"),
        outcome(check_training, model, PROMPTS, [*ROWS, over], "--retain"),
    ]
    assert fits == [None] * 4
    if model.config.model_type == "llama":
        assert refused == [None] * 5
        return
    options = ["--max-length", "--max-new-tokens", "--evaluation-tokens", "--evaluation-tokens", "--retain"]
    for option, message in zip(options, refused, strict=True):
        assert message.startswith(f"{option}: ") and "the model has 128 positions" in message
