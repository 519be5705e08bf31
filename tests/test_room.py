"""Answers that do not fit behind their questions are refused before any work."""

import pytest
from tiny import make_model, make_tokenizer

from pmc_fast.config import PMCConfig
from pmc_fast.data import QA
from pmc_fast.errors import UserError
from pmc_fast.prompts import Prompts
from pmc_fast.room import check_evaluation, check_sampling, check_training

PROMPTS = Prompts(make_tokenizer(), style="plain")  # a token for each byte
ROWS = [QA("Who?", "He."), QA("Who was it then?", "Them."), QA("And?", "A long answer it is.")]
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
    with pytest.raises(UserError) as caught:
        check_sampling(model, PROMPTS, [QA("Who? " * 99, "He.")], PMCConfig(max_length=9))
    assert len(str(caught.value)) < 250 and "Who? Who?" in str(caught.value)


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
