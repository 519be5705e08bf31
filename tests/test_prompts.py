"""Prompts are what the tokenizer's own template, or the tagged text as a whole, gives."""

import copy
import json
import pickle
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pmc_fast.errors import UserError
from pmc_fast.prompts import Prompts

SYSTEM = "You are a helpful assistant."

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3: starts with the start token, trims, ends turns with a token that is not the end of the text.
TRIMMING = (
    "<s>{% for m in messages %}<|header|>{{ m.role }}\n\n{{ m.content | trim }}<|turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant\n\n{% endif %}"
)
# As Gemma: refuses a system role and calls the assistant by another name.
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<s>{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# As Mistral: no generation prompt; a space before the answer; the end token ends the turn.
INSTRUCT = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
# As Qwen 3: an empty thought before the answer, in the generation prompt only if thinking is off.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As DeepSeek R1 would, were it told: opens a thought that finished conversations leave out, unless thinking is off.
OPENING = CHATML.removesuffix("{% endif %}") + "{% if enable_thinking | default(true) %}<think>\n{% endif %}{% endif %}"
# Knows no generation prompt, and ends an answer with nothing.
BARE = "{% for m in messages %}<|header|>{{ m.role }}\n{{ m.content }}{% endfor %}"

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|turn|>"]
TEXTS = [
    "Where was Vaitai Giamair born? The birthplace of Vaitai Giamair is the town called Jiowoth.",
    "Question: What does Siwi do? Answer: Siwi works as a baker.",
    "user assistant system model You are a helpful assistant.",
]


def byte_level(vocab: int = 400) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece(legacy: bool) -> Tokenizer:
    """As Llama 2 (legacy: a space is put before every text) or as its newer form (only before a text's first word)."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    learned.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *model["vocab"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    if not legacy:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TOKENIZERS = {
    "byte level": byte_level,
    "one token per byte": lambda: byte_level(256),
    "metaspace": lambda: sentencepiece(legacy=False),
    "legacy": lambda: sentencepiece(legacy=True),
}


def wrap(tokenizer: Tokenizer, template: str | None = None, eos: str | None = "</s>", **options):
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, chat_template=template, **options
    )


def sentence(seed: int) -> str:
    rng = random.Random(seed)
    words = ["Siwi", "born", "a", "1984", "naïve", "I'm", "Jiowoth,", "--", "東京", "x" * 17, "The", "🦦"]
    return " ".join(rng.choices(words, k=rng.randint(1, 13)))


@pytest.fixture
def rows(rng_seed):
    return [(sentence(rng_seed + 2 * i) + "?", sentence(rng_seed + 2 * i + 1) + ".") for i in range(23)]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("style", ["tags", "plain"])
def test_tagged_prompt_then_answer_is_the_text_tokenised_whole(rows, kind, style):
    tokenizer = wrap(TOKENIZERS[kind]())
    prompts = Prompts(tokenizer, style)
    for question, answer in rows:
        whole = f"Question: {question}\nAnswer: {answer}" if style == "tags" else f"{question} {answer}"
        ids = prompts.prompt_ids(question) + prompts.answer_ids(answer)
        assert ids == [*tokenizer(whole)["input_ids"], tokenizer.eos_token_id]
        assert prompts.decode(prompts.answer_ids(answer)) == answer


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", [CHATML, TRIMMING, INSTRUCT, THINKING, OPENING, BARE])
def test_chat_prompt_then_answer_is_what_the_template_gives(rows, kind, template):
    tokenizer = wrap(TOKENIZERS[kind](), template)
    prompts = Prompts(tokenizer)
    assert prompts.style == "chat"
    for question, answer in rows:
        asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        told = [*asked, {"role": "assistant", "content": answer}]
        options = {"return_dict": False, "enable_thinking": False}
        prompt = prompts.prompt_ids(question)
        whole = tokenizer.apply_chat_template(told, **options)
        if template == BARE:
            whole = [*whole, tokenizer.eos_token_id]
        else:
            assert prompt == tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options)
        ids = prompt + prompts.answer_ids(answer)
        assert ids == whole[: len(ids)]
        assert tokenizer.decode(whole[len(ids) :]).strip() == ""  # at most the line break after the turn's end
        assert prompts.decode(prompts.answer_ids(answer)) == answer


@pytest.mark.parametrize(
    ("template", "ends"),
    [(CHATML, ["<|im_end|>", "</s>"]), (TRIMMING, ["<|turn|>", "</s>"]), (INSTRUCT, ["</s>"]), (BARE, ["</s>"])],
)
def test_end_of_turn_is_found(template, ends):
    tokenizer = wrap(byte_level(), template)
    prompts = Prompts(tokenizer)
    assert prompts.end_ids == tuple(tokenizer.convert_tokens_to_ids(ends))
    assert prompts.answer_ids("Siwi")[-1] == prompts.end_ids[0]
    assert prompts.pad_id == prompts.end_ids[0]


def test_end_of_turn_need_not_be_declared_special(rng_seed):
    inner = byte_level()
    inner.add_tokens([AddedToken("<|stop|>", special=False)])
    tokenizer = wrap(inner, CHATML.replace("<|im_end|>", "<|stop|>"), pad_token="<|header|>")
    prompts = Prompts(tokenizer)
    assert prompts.end_ids == tuple(tokenizer.convert_tokens_to_ids(["<|stop|>", "</s>"]))
    answer = sentence(rng_seed)
    assert prompts.decode(prompts.answer_ids(answer)) == answer
    assert prompts.pad_id == tokenizer.pad_token_id


def test_a_special_end_of_turn_goes_before_others():
    inner = byte_level()
    inner.add_tokens([AddedToken("<|stop|>", special=False)])
    tokenizer = wrap(inner, CHATML.replace("<|im_end|>", "<|stop|><|im_end|>"), eos="<|im_end|>")
    assert Prompts(tokenizer).end_ids == (tokenizer.eos_token_id,)


@pytest.mark.parametrize("style", ["tags", "plain"])
def test_an_end_token_that_a_tokenizer_puts_behind_every_text_is_no_part_of_a_question(style):
    inner, want = byte_level(), Prompts(wrap(byte_level()), style)
    ending = wrap(inner)
    end = ("</s>", ending.eos_token_id)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    assert ending("Who?")["input_ids"][-1] == ending.eos_token_id
    prompts = Prompts(ending, style)
    assert prompts.prompt_ids("Who?") == want.prompt_ids("Who?")
    assert prompts.answer_ids("Siwi.") == want.answer_ids("Siwi.")


@pytest.mark.parametrize("style", ["chat", "tags", "plain"])
def test_a_text_begins_with_one_start_token(style):
    """The tokenizer's, or that which the template has written."""
    tokenizer = wrap(byte_level(), TRIMMING)
    start = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    prompts = Prompts(tokenizer, style)
    ids = prompts.prompt_ids("Who?") + prompts.answer_ids("Siwi.")
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_an_answer_whose_beginning_would_join_the_question_is_encoded_alone():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "?Ġ"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("?", "Ġ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = wrap(inner)
    assert tokenizer("? Siwi.")["input_ids"][0] == vocabulary["?Ġ"]
    answer = [*tokenizer(" Siwi.")["input_ids"], tokenizer.eos_token_id]
    assert Prompts(tokenizer, "plain").answer_ids("Siwi.") == answer


def test_special_tokens_are_no_part_of_an_answers_text(rng_seed):
    prompts, answer = Prompts(wrap(byte_level(), CHATML)), sentence(rng_seed)
    header = prompts.tokenizer.convert_tokens_to_ids("<|header|>")
    assert prompts.decode([header, *prompts.answer_ids(answer)]) == answer


def test_texts_are_decoded_as_they_were_drawn():
    """Not tidied up: what an answer begins with would change as it goes on."""
    tidying = (
        "clean_up_tokenization_spaces",
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    )
    prompts = Prompts(wrap(byte_level(), **dict.fromkeys(tidying, True)))
    text = "It is n't here , he said ."
    assert prompts.decode(prompts.answer_ids(text)) == text


def test_turn_end_serves_a_tokenizer_without_eos():
    prompts = Prompts(wrap(byte_level(), CHATML, eos=None))
    assert prompts.end_ids == (prompts.tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_refused_system_prompt_opens_the_users_turn(rows):
    tokenizer = wrap(byte_level(), NO_SYSTEM)
    prompts = Prompts(tokenizer, system="Be brief.")
    for question, answer in rows:
        chat = [{"role": "user", "content": f"Be brief.\n\n{question}"}, {"role": "assistant", "content": answer}]
        whole = tokenizer.apply_chat_template(chat, return_dict=False)
        ids = prompts.prompt_ids(question) + prompts.answer_ids(answer)
        assert ids == whole[: len(ids)] and ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_no_system_prompt_is_no_system_turn():
    tokenizer = wrap(byte_level(), CHATML)
    asked = [{"role": "user", "content": "Who?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert Prompts(tokenizer, system="").prompt_ids("Who?") == ids


def test_what_only_the_generation_prompt_says_is_asked_with():
    tokenizer = wrap(byte_level(), CHATML.replace("<|im_start|>assistant", "<|im_start|>me"))
    prompts = Prompts(tokenizer)
    asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Who?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert prompts.prompt_ids("Who?") == ids and tokenizer.decode(ids).endswith("<|im_start|>me\n")
    assert prompts.answer_ids("Siwi.") == [*tokenizer("Siwi.")["input_ids"], prompts.end_ids[0]]


def test_date_does_not_depend_on_the_day():
    dated = "{{ date_string if date_string is defined else strftime_now('%d %b %Y %H:%M:%S.%f') }}" + CHATML
    prompts = [Prompts(wrap(byte_level(), dated)).prompt_ids("Who?") for _ in range(2)]
    assert prompts[0] == prompts[1]
    assert "26 Jul 2024" in Prompts(wrap(byte_level(), dated)).decode(prompts[0])


@pytest.mark.parametrize("style", ["chat", "tags", "plain"])
@pytest.mark.parametrize("prefill", ["The answer is: ", "The answer is:"])
def test_prefilled_prompt_continues_as_the_whole_answer_would(rows, style, prefill):
    prompts = Prompts(wrap(byte_level(), CHATML), style)
    for question, answer in rows:
        prefilled = prompts.prompt_ids(question, prefill=prefill)
        whole = prompts.prompt_ids(question) + prompts.answer_ids(f"{prefill.rstrip()} {answer}")
        assert whole[: len(prefilled)] == prefilled
        assert prompts.decode(whole[len(prefilled) :]) == answer


def test_surrounding_space_is_dropped():
    prompts = Prompts(wrap(byte_level(), CHATML))
    assert prompts.prompt_ids(" Who?\n") == prompts.prompt_ids("Who?")
    assert prompts.answer_ids("\tSiwi. ") == prompts.answer_ids("Siwi.")


@pytest.mark.parametrize("style", ["chat", "tags", "plain"])
def test_empty_answer_is_the_end_token_alone(style):
    prompts = Prompts(wrap(byte_level(), CHATML), style)
    assert prompts.answer_ids("") == [prompts.end_ids[0]]


def test_an_empty_question_has_no_tokens_of_its_own():
    assert Prompts(wrap(byte_level()), "plain").prompt_ids("") == []


def test_tokens_are_the_callers_to_change():
    prompts = Prompts(wrap(byte_level()))
    prompts.prompt_ids("Who?").clear()
    prompts.answer_ids("Siwi.").clear()
    assert prompts.prompt_ids("Who?") and prompts.answer_ids("Siwi.")


def test_text_is_tokenised_once(monkeypatch):
    tokenizer = wrap(byte_level())
    calls = []
    encode = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast,
        "__call__",
        lambda self, text, **options: calls.append(text) or encode(self, text, **options),
    )
    prompts = Prompts(tokenizer)
    first = prompts.prompt_ids("Who?"), prompts.answer_ids("Siwi.")
    done = len(calls)
    assert (prompts.prompt_ids("Who?"), prompts.answer_ids("Siwi.")) == first
    assert len(calls) == done >= 2


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (None, {"style": "html"}, "style: got 'html'.*'auto', 'chat', 'tags', 'plain'"),
        (None, {"style": "chat"}, "no chat template"),
        ("{{ raise_exception('not today') }}", {}, "not today"),
        ("{% if messages %}<s>{% endif %}", {}, "does not repeat"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", {}, "does not repeat"),
        ("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}", {}, "does not repeat"),
    ],
)
def test_refused(template, options, message):
    with pytest.raises(UserError, match=message):
        Prompts(wrap(byte_level(), template), **options)


@pytest.mark.parametrize("template", [None, BARE])
def test_no_end_token_names_what_to_set(template):
    with pytest.raises(UserError, match="tokenizer: .*set eos_token"):
        Prompts(wrap(byte_level(), template, eos=None))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda prompts: pickle.loads(pickle.dumps(prompts))])
def test_a_copy_asks_alike_and_remembers_for_itself(copied):
    prompts = Prompts(wrap(byte_level()))
    want = prompts.prompt_ids("Who?"), prompts.answer_ids("Siwi.")
    other = copied(prompts)
    assert (other.prompt_ids("Who?"), other.answer_ids("Siwi.")) == want
    other._before = "Another: "
    assert other.prompt_ids("What?") != prompts.prompt_ids("What?")


def test_half_a_surrogate_pair_is_no_text():
    prompts = Prompts(wrap(byte_level()))
    for call in (prompts.prompt_ids, prompts.answer_ids, lambda text: prompts.prompt_ids("Who?", prefill=text)):
        with pytest.raises(UserError, match=r"got 'a\\ud83d', expected UTF-8 text, without half of a surrogate pair"):
            call("a\ud83d")
    assert prompts.is_text("a\U0001f600") and not prompts.is_text("a\ud83d")
