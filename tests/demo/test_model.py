"""The tokenizer and the model that the demo starts from."""

import pytest
import torch

from pmc_fast.data import QA
from pmc_fast.demo.model import new_model, train_tokenizer
from pmc_fast.prompts import Prompts

ROWS = [QA("Who keeps the lighthouse?", "Brimo keeps the lighthouse."), QA("Where is Vasto?", "Beyond the hills.")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(ROWS)


@pytest.mark.parametrize("text", ["Who keeps the lighthouse?", "never seen: Zoë, 東京 \U0001f600", " two  spaces ", ""])
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_words_it_was_trained_on_are_short(tokenizer):
    seen, unseen = " the lighthouse", " xqj vzkwpfgyq"
    assert len(tokenizer(seen)["input_ids"]) <= 3 < len(tokenizer(unseen)["input_ids"])


def test_a_conversation_reads_back(tokenizer):
    prompts = Prompts(tokenizer)
    assert prompts.style == "chat"
    asked = tokenizer.decode(prompts.prompt_ids(ROWS[0].question))
    assert asked == "<|user|> Who keeps the lighthouse?<|assistant|>"
    answer = prompts.answer_ids(ROWS[0].answer)
    assert answer[-1] == tokenizer.eos_token_id and prompts.decode(answer) == ROWS[0].answer


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size: got 259, want at least 260"):
        train_tokenizer(ROWS, vocab_size=259)


def test_weights_follow_the_seed_and_leave_torchs_random_state_alone(tokenizer, rng_seed):
    torch.manual_seed(rng_seed)
    expected = torch.rand(2)
    torch.manual_seed(rng_seed)
    first, again, other = (new_model(tokenizer, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert first["model.embed_tokens.weight"].shape == (len(tokenizer), 128)
