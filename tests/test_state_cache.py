"""Models with states besides keys and values: sampled from through transformers' cache, trained in padded rows."""

import pytest
import torch
from draws import assert_same
from test_models import make_other
from tiny import STATES, make_model, make_tokenizer

from pmc_fast import PMC, PMCConfig, Sampler, UserError
from pmc_fast.data import QA
from pmc_fast.models import LanguageModel
from pmc_fast.packing import pack, pad_left
from pmc_fast.prefill import cache_bytes
from pmc_fast.state_cache import StateCache, check_rows

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [20, 21]]

pytestmark = pytest.mark.skipif(not STATES, reason="transformers has none of these models")


@pytest.mark.parametrize("family", [*STATES])
def test_greedy_equals_generate(family, rng_seed):
    model = make_model(family, seed=rng_seed)
    for row, prompt in enumerate(PROMPTS):
        ids, mask = pad_left(PROMPTS, 256)
        sampler = Sampler(model)
        got = sampler.sample(ids, mask, max_new_tokens=13, temperature=0.0, eos_token_id=-1)
        assert sampler.decoder == "modules"
        options = {"max_new_tokens": 13, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
        alone = model.generate(input_ids=torch.tensor([prompt]), **options)[0, len(prompt) :]
        assert got.tokens[row, 0].tolist() == alone.tolist()


@pytest.mark.parametrize("family", [*STATES])
def test_an_answer_depends_on_its_prompt_alone(family, rng_seed):
    """Rows part, are copied and moved; prompts take turns."""
    model = make_model(family, seed=rng_seed)
    sampler, (ids, mask) = Sampler(model), pad_left(PROMPTS, 256)
    options = {"num_samples": 5, "max_new_tokens": 9, "temperature": 0.7, "eos_token_id": [3, 7, 200], "seed": rng_seed}
    want = sampler.sample(ids, mask, **options)
    assert want.decoded < want.count
    waves = sampler.sample(ids, mask, cache_budget=sampler.cache_bytes(5, ids.shape[1] + 9), **options)
    assert_same(waves, want)
    for row, prompt in enumerate(PROMPTS):
        alone = sampler.sample(torch.tensor([prompt]), sequence_ids=torch.tensor([row]), **options)
        assert torch.equal(alone.lengths[0], want.lengths[row])
        steps = alone.tokens.shape[2]
        assert torch.equal(alone.tokens[0], want.tokens[row, :, :steps])
        torch.testing.assert_close(alone.logprobs[0], want.logprobs[row, :, :steps], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", [*STATES])
def test_bytes_are_those_that_a_call_holds(family, rng_seed):
    model = make_model(family, seed=rng_seed)
    lm = LanguageModel(model)
    cache = StateCache(config=model.config)
    with torch.no_grad():
        lm.hidden(torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]), cache)
    held = cache.held
    assert cache_bytes(lm).row > 0
    assert Sampler(lm).cache_bytes(2, 5) == held.token + held.row
    model.base_model.bfloat16()  # the head stays as it is
    assert Sampler(lm).cache_bytes(2, 5) < held.token + held.row


def test_states_that_are_kept_elsewhere_are_found_out(rng_seed):
    model = make_other("recurrent_gemma", rng_seed)
    ids = torch.tensor([[1, 2], [3, 4]])
    for _ in range(2):
        with pytest.raises(UserError, match="^model: RecurrentGemmaForCausalLM does not go on from its cache"):
            Sampler(model).sample(ids, max_new_tokens=3, eos_token_id=257)
    lm, packed = LanguageModel(model), pack([[1, 2], [3]], [[4], [5]])  # of which training knows nothing
    torch.testing.assert_close(packed.hidden(lm)[1:], pack([[3]], [[5]]).hidden(lm), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [*STATES])
def test_rows_that_go_astray_are_found_out(family, monkeypatch, rng_seed):
    lm = LanguageModel(make_model(family, seed=rng_seed))
    monkeypatch.setattr(
        StateCache, "arrange", lambda cache, source, destination, rows: cache.reorder_cache(torch.tensor([0, 1, 0]))
    )
    with pytest.raises(UserError, match="does not go on from its cache"):
        check_rows(lm)
    monkeypatch.undo()
    check_rows(lm)


def test_layers_of_a_models_own_are_refused(monkeypatch, rng_seed):
    """Whatever they do with padding beyond what is tried."""
    lm = LanguageModel(make_model([*STATES][-1], seed=rng_seed))
    monkeypatch.setattr("pmc_fast.state_cache._KNOWN", "elsewhere")
    with pytest.raises(UserError, match="a cache of its own that this version does not know"):
        Sampler(lm).sample(torch.tensor([[1, 2]]), max_new_tokens=2, eos_token_id=257)


def test_no_cache_is_filled_by_rows(rng_seed):
    lm = LanguageModel(make_model([*STATES][-1], seed=rng_seed))
    with pytest.raises(UserError, match="^cache: got one, but .* gives a sequence in a packed batch"):
        pack([[1, 2], [3]], [[4], [5]]).hidden(lm, StateCache(config=lm.model.config))


def test_what_is_not_compiled_is_told(rng_seed):
    sampler = Sampler(make_model([*STATES][-1], seed=rng_seed), compile_modules=True)
    with pytest.raises(UserError, match="^compile_modules: got a model that keeps more than keys and values"):
        sampler.sample(torch.tensor([[1, 2]]), max_new_tokens=2, eos_token_id=257)


def test_pmc_step(rng_seed):
    family = [*STATES][-1]
    model = make_model(family, seed=rng_seed)
    config = PMCConfig(num_samples=3, max_new_tokens=5, max_length=None, prompt_style="plain", seed=rng_seed)
    pmc = PMC(model, make_tokenizer(), config)
    pmc.initialise(["Who?", "Where is it?"])
    loss = pmc.loss([0, 1], [QA("What?", "That."), QA("When is this?", "Now.")])
    loss.backward()
    assert pmc.lm.packed_by == "padded rows" and loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.layers.parameters())
