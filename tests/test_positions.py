"""Models whose table of positions ends somewhere: refused beyond, exactly there; all others go on."""

import warnings
from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, VOCAB, make_model, make_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pmc_fast import PMC, PMCConfig, Prompts, Sampler, UserError
from pmc_fast.data import QA
from pmc_fast.integrations.samplers import GenerateSampler
from pmc_fast.models import LanguageModel
from pmc_fast.packing import pack, pad_left
from pmc_fast.positions import Positions

MOST = 61
_N = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MOST}
_HIDDEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": MOST}
# Learned tables under three names, of OPT and BioGPT with two rows more; computed ones; a bias.
TABLES = {
    "gpt2": _N,
    "openai-gpt": _N,
    "gpt_bigcode": _N,
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4, "max_position_embeddings": MOST},
    "opt": {**_HIDDEN, "word_embed_proj_dim": 32, "ffn_dim": 48},
    "biogpt": {**_HIDDEN, "intermediate_size": 48},
    "gptj": {**_N, "rotary_dim": 8},
    "codegen": {**_N, "rotary_dim": 8},
    "ctrl": {**_N, "dff": 48},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": MOST},
}  # fmt: skip
ENDLESS = {"bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4}}


def make_tabled(kind):
    sizes = {"vocab_size": VOCAB, "pad_token_id": 256, "bos_token_id": 258, "eos_token_id": 257}
    config = CONFIG_MAPPING[kind](**sizes, **{**TABLES, **ENDLESS}[kind])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_is_found_where_the_model_has_one(kind, rng_seed):
    model = make_tabled(kind)
    model.register_buffer("other", torch.ones(3))
    assert Positions.of(model) == Positions(MOST, True)
    ids = torch.randint(0, 250, (1, MOST + 1))
    position = {} if kind == "mpt" else {"position_ids": torch.arange(MOST + 1)[None]}
    with torch.no_grad():
        model(input_ids=ids[:, :MOST], **{name: value[:, :MOST] for name, value in position.items()})
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids, **position)


def test_what_only_resembles_a_table_is_none():
    """As many words as positions, and embeddings and buffers of other lengths or under another name."""
    model = make_model(max_position_embeddings=VOCAB)
    model.register_buffer("pos_encoding", torch.ones(VOCAB - 1))
    model.register_buffer("other", torch.ones(VOCAB))
    model.shorter, model.longer = torch.nn.Embedding(VOCAB - 1, 2), torch.nn.Embedding(VOCAB + 3, 2)
    assert Positions.of(model) == Positions(VOCAB, False)
    endless = make_tabled("bloom")
    endless.other = torch.nn.Embedding(MOST, 2)
    assert Positions.of(endless) == Positions(None, False)


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_padding_takes_no_position_where_attention_is_biased_by_distance(kind, rng_seed):
    model = make_tabled(kind)
    prompts = [torch.randint(0, 250, (length,)).tolist() for length in (5, 3)]
    options = {"max_new_tokens": 6, "temperature": 0.0, "eos_token_id": 300}
    together = Sampler(model).sample(*pad_left(prompts, 256), **options)
    for prompt, tokens in zip(prompts, together.tokens, strict=True):
        assert torch.equal(Sampler(model).sample(torch.tensor([prompt]), **options).tokens[0], tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_models_go_on_with_a_warning(family):
    model = make_model(family)
    positions = Positions.of(model)
    assert positions == Positions(128, family == "gpt2")
    if positions.fixed:
        return
    ids = torch.randint(0, 250, (1, 100))
    with pytest.warns(
        UserWarning, match="max_new_tokens or max_length: prompt and answer may have more than 128 tokens together"
    ):
        samples = Sampler(model).sample(ids, max_new_tokens=60, eos_token_id=300)
    assert samples.lengths.item() == 60


CALLS = {
    "Sampler": lambda pmc: pmc.sampler.sample(torch.tensor([[1, 2, 3]]), max_new_tokens=130, eos_token_id=257),
    "GenerateSampler": lambda pmc: GenerateSampler(pmc.lm.model).sample(
        torch.tensor([[1, 2, 3]]), max_new_tokens=130, eos_token_id=257
    ),
    "initialise": lambda pmc: pmc.initialise(["Who?"]),
    "prepare": lambda pmc: pmc.prepare([[0]]),
    "loss": lambda pmc: pmc.loss([0], []),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_warning_names_the_line_of_the_caller(name, rng_seed):
    pmc = PMC(make_model(seed=rng_seed), make_tokenizer(), PMCConfig(num_samples=2, max_new_tokens=130))
    pmc.initialise(["Who?"], answers=["one"])
    with pytest.warns(UserWarning, match="more than 128 tokens together") as warned:
        CALLS[name](pmc)
    (where,) = {(w.filename, w.lineno) for w in warned if "more than 128 tokens" in str(w.message)}
    code = CALLS[name].__code__
    assert where[0] == __file__ and where[1] in {line for *_, line in code.co_lines()}


LIMITS = [
    ({"max_new_tokens": 300}, "max_new_tokens: got 300, expected at most 124: the model has positions for 128 tokens"),
    ({"max_new_tokens": torch.tensor([126, 125])}, "max_new_tokens: got 125, expected at most 124"),
    ({"max_new_tokens": torch.tensor([127, 100])}, "max_new_tokens: got 127, expected at most 126"),
    ({"max_length": 130}, "max_length: got 130, expected at most 129"),
]


@pytest.mark.parametrize(("limit", "message"), LIMITS)
def test_answers_past_the_table_are_refused_before_any_work(limit, message, monkeypatch):
    """The first prompt has 3 tokens and 2 of padding."""
    model = make_model("gpt2")
    samplers = Sampler(model), GenerateSampler(model)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("the model ran"))
    monkeypatch.setattr(type(model.transformer), "forward", lambda *_, **__: pytest.fail("the model ran"))
    ids, mask = torch.randint(0, 250, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    for sampler in samplers:
        with pytest.raises(UserError, match=f"^{message}"):
            sampler.sample(ids, mask, eos_token_id=257, **limit)
        with pytest.raises(UserError, match="^input_ids: got a prompt of 129 tokens, expected at most 128"):
            sampler.sample(torch.randint(0, 250, (1, 129)), eos_token_id=257, max_new_tokens=1)


def test_answers_reach_the_end_of_the_table(rng_seed):
    """Padding has no position: the padded prompt and the answer are longer than the table."""
    ids, mask = torch.randint(0, 250, (2, 30)), torch.ones(2, 30, dtype=torch.int64)
    mask[0, :20] = 0
    model, options = make_model("gpt2", seed=rng_seed), {"eos_token_id": 300}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        samples = Sampler(model).sample(ids, mask, max_new_tokens=torch.tensor([119, 99]), **options)
        assert samples.lengths.flatten().tolist() == [119, 99]
        samples = GenerateSampler(model).sample(ids, mask, max_new_tokens=99, **options)
        assert samples.lengths.flatten().tolist() == [99, 99]
        samples = GenerateSampler(model).sample(ids, mask, max_new_tokens=torch.tensor([119, 99]), **options)
        assert samples.lengths.flatten().tolist() == [119, 99]  # each by itself: both have no room for 119


def test_training_rows_past_the_table_are_refused_before_anything_is_sampled():
    tokenizer = make_tokenizer()  # one token per byte; "Question: a\nAnswer:" has 19
    pmc = PMC(make_model("gpt2"), tokenizer, PMCConfig(num_samples=2, max_new_tokens=5, prompt_style="tags"))
    pmc.initialise(["Who?"])
    before = pmc.state_dict()
    fits, over = (QA("a", "x" * count) for count in (108, 109))  # a space before it, the end token no input
    pmc.supervised_loss([fits])
    for call, name in (
        (lambda: pmc.loss([0], [fits, over]), "retain"),
        (lambda: pmc.supervised_loss([fits, over]), "rows"),
    ):
        with pytest.raises(UserError, match=f"^{name}: row 1 has 129 tokens, .*expected at most 128"):
            call()
    assert pmc.state_dict() == before


def test_which_of_prompt_and_limit_is_too_long():
    """A prompt has room for an answer of one token as long as it has positions itself."""
    positions, limits = Positions(10, True), torch.tensor([3])
    positions.check_answers(torch.tensor([8]), limits, None)
    with pytest.raises(UserError, match="^max_new_tokens: got 3, expected at most 2: the model has positions for 10"):
        positions.check_answers(torch.tensor([9]), limits, None)
    with pytest.raises(UserError, match="^max_new_tokens: got 3, expected at most 1: "):
        positions.check_answers(torch.tensor([10]), limits, None)
    with pytest.raises(UserError, match="^max_length: got 12, expected at most 10: .* for 10 tokens$"):
        positions.check_answers(torch.tensor([9]), limits, 12, more=1)
    for prompt, more in ((11, 0), (10, 1)):
        with pytest.raises(
            UserError, match=f"^input_ids: got a prompt of {prompt} tokens, expected at most {prompt - 1}"
        ):
            positions.check_answers(torch.tensor([prompt]), limits, None, more)


def test_packed_sequences_past_the_table_are_refused():
    lm = LanguageModel(make_model("gpt2"))
    prompts = [[1] * 100, [1] * 90]  # their beginning is held once
    pack(prompts, [[2] * 29, [3] * 5]).hidden(lm)
    with pytest.raises(UserError, match="^sequence 0 has 129 tokens, .*expected at most 128"):
        pack(prompts, [[2] * 30, [3] * 5]).hidden(lm)
    rotary = LanguageModel(make_model())
    assert pack(prompts, [[2] * 60, [3] * 5]).hidden(rotary).isfinite().all()


def test_pmc_names_its_own_limit():
    pmc = PMC(make_model("gpt2"), make_tokenizer(), PMCConfig(num_samples=2))
    with pytest.raises(UserError, match="^max_length: got 200, expected at most 129: .* all but the last one"):
        pmc.initialise(["Who?"])
    pmc.initialise(["Who?", "Where was Bo born?"], answers=["one", "two"])
    for call in (lambda: pmc.loss([0, 1], []), lambda: pmc.prepare([[0], [1]])):
        with pytest.raises(UserError, match="^max_length: got 200, expected at most 128"):
            call()
    assert pmc.ledger.visits == [0, 0] and pmc.prepared_batches == 0


class Endless(Sampler):
    """No answer ends by itself."""

    def sample(self, *args, eos_token_id, **options):
        return super().sample(*args, eos_token_id=300, **options)


def test_pmc_trains_on_answers_that_reach_the_end_of_the_table(rng_seed):
    """Cut off there, with an end token behind them."""
    config = PMCConfig(num_samples=2, max_length=128, prune=False, reencode=False)
    model = make_model("gpt2", seed=rng_seed)
    pmc = PMC(model, make_tokenizer(), config, sampler=Endless(model))
    pmc.initialise(["Who?"], answers=["one"])
    assert pmc.loss([0], []).isfinite()
    assert len(pmc.prompts.prompt_ids("Who?")) + len(pmc.ledger.entries[0].tokens) == 128 + 1
    longer = PMC(model, pmc.prompts, replace(config, max_length=129), sampler=Endless(model))
    longer.initialise(["Who?"], answers=["one"])
    with pytest.raises(UserError, match="^max_length: got 129, expected at most 128"):
        longer.loss([0], [])


class Doubled(Prompts):
    """Texts encode to twice as many tokens as they have."""

    def answer_ids(self, answer):
        ids = super().answer_ids(answer)
        return [*ids[:-1], *ids]


@pytest.mark.parametrize("prune", [False, True])
def test_answers_that_encode_too_long_are_refused_before_they_are_stored(prune, rng_seed):
    config = PMCConfig(num_samples=3, max_new_tokens=70, prune=prune)
    model = make_model("gpt2", seed=rng_seed)
    pmc = PMC(model, Doubled(make_tokenizer()), config, sampler=Endless(model))
    pmc.initialise(["Who?", "Where was Bo born?"], answers=["one", "two"])
    before = pmc.state_dict()
    message = "^reencode: the answer picked for question 1, encoded again, has .*at most 128: .*reencode=False"
    for call in (lambda: pmc.loss([1], []), lambda: pmc.prepare([[1], [0]])):
        with pytest.raises(UserError, match=message):
            call()
        assert pmc.state_dict() == before and pmc.prepared_batches == 0
    drawn = PMC(model, pmc.prompts, replace(config, reencode=False), sampler=Endless(model))
    drawn.load_state_dict(before)
    assert drawn.loss([1], []).isfinite()


def test_a_state_is_checked_as_fresh_answers_are(rng_seed):
    """Answers picked as drawn fit into the table; encoded again they may not."""
    config = PMCConfig(num_samples=2, max_new_tokens=70, prune=False, reencode=False)
    model, prompts = make_model("gpt2", seed=rng_seed), Doubled(make_tokenizer())
    drawn = PMC(model, prompts, config, sampler=Endless(model))
    drawn.initialise(["Who?", "Where was Bo born?"], answers=["one", "two"])
    drawn.loss([1], [])
    encoding = PMC(model, prompts, replace(config, reencode=True), sampler=Endless(model))
    encoding.initialise(["When?"], answers=["three"])
    before = encoding.state_dict()
    with pytest.raises(
        UserError, match="^reencode: the answer picked for question 1, encoded again, has .*reencode=False"
    ):
        encoding.load_state_dict(drawn.state_dict())
    assert encoding.state_dict() == before
    again = PMC(model, prompts, config)
    again.load_state_dict(drawn.state_dict())
    assert again.state_dict() == drawn.state_dict()


@pytest.mark.parametrize("reencode", [False, True])
def test_a_state_of_answers_that_fit_goes_on_under_either_setting(reencode, rng_seed):
    config = PMCConfig(num_samples=2, max_new_tokens=5, reencode=not reencode)
    model, tokenizer = make_model("gpt2", seed=rng_seed), make_tokenizer()
    pmc = PMC(model, tokenizer, config)
    pmc.initialise(["Who?"], answers=["one"])
    pmc.loss([0], [])
    other = PMC(model, tokenizer, replace(config, reencode=reencode))
    other.load_state_dict(pmc.state_dict())
    assert other.loss([0], []).isfinite()
