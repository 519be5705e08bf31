"""PEFT adapters on the backbone: sampled from, trained, and without them the reference; on the head: refused."""

import copy
import re

import pytest
import torch
from draws import assert_same, differ
from tiny import make_model, make_tokenizer

from pmc_fast import PMC, PMCConfig, Sampler, UserError, losses
from pmc_fast.data import QA
from pmc_fast.fast_linear import fast_linear
from pmc_fast.models import LanguageModel
from pmc_fast.packing import pack

peft = pytest.importorskip("peft")

QUESTIONS = ["Who is Ada?", "Where was Bo born?"]
RETAIN = [QA("What is two?", "a number"), QA("Who sings?", "the bird")]


def adapted(family="llama", seed=0, **options):
    """A model with LoRA on every linear layer but the head, its adapters random instead of no-ops."""
    options = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(make_model(family, seed=seed), peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
            assert parameter.requires_grad == ("lora_" in name)
    return model.eval()


def trained(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "bias": "none"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_loss_and_gradients_are_the_adapted_models_own(family, options, rng_seed):
    model = adapted(family, seed=rng_seed, **options)
    prompts, answers = [[5, 6], [7]], [[8, 9, 10], [11, 12]]
    nll = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        nll.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    want = torch.cat(nll).mean()
    want.backward()
    want_gradients = trained(model)
    model.zero_grad()

    lm = LanguageModel(model)
    got = losses.idk(lm, pack(prompts, answers), 2)
    got.backward()
    got_gradients = trained(model)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert got_gradients.keys() == want_gradients.keys() and all("lora_" in name for name in got_gradients)
    for name, gradient in want_gradients.items():
        torch.testing.assert_close(got_gradients[name], gradient, rtol=1e-3, atol=1e-5)
    assert all(gradient.abs().max() > 0 for gradient in got_gradients.values())


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("phi", {"lora_bias": True})])
def test_samples_are_the_merged_models(family, changes, rng_seed):
    model = adapted(family, seed=rng_seed, **changes)
    merged = copy.deepcopy(model).merge_and_unload()
    plain = make_model(family, seed=rng_seed)
    ids = torch.randint(0, 256, (3, 5))
    options = {"num_samples": 2, "max_new_tokens": 8, "eos_token_id": 257, "seed": rng_seed}
    got, want, without = (Sampler(one).sample(ids, **options) for one in (model, merged, plain))
    assert_same(got, want, atol=1e-3)
    assert differ(got, without)


def test_adapters_that_are_merged_in_place_count_once(rng_seed):
    """In samples and in a packed batch, whatever was seen of the model before; switched off, they are in no weight."""
    model, plain = adapted(seed=rng_seed), make_model(seed=rng_seed)
    merged = copy.deepcopy(model).merge_and_unload()
    ids, lm, packed = torch.randint(0, 256, (3, 5)), LanguageModel(model), pack([[1, 2], [3]], [[4, 5], [6]])
    sampler = Sampler(lm)
    options = {"num_samples": 2, "max_new_tokens": 8, "eos_token_id": 257, "seed": rng_seed}

    def assert_sampled_as(other):
        got, want = (one.sample(ids, **options) for one in (sampler, Sampler(other)))
        assert torch.equal(got.tokens, want.tokens)
        torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-3, atol=1e-3)

    def assert_packed_as(other):
        torch.testing.assert_close(packed.hidden(lm), packed.hidden(LanguageModel(other)), rtol=1e-3, atol=1e-3)

    for checks in ((assert_sampled_as, assert_packed_as), (assert_packed_as, assert_sampled_as)):
        for prepare in (lambda: None, model.merge_adapter):
            prepare()
            for check in checks:
                check(merged)
        with model.disable_adapter():  # PEFT unmerges a layer when it is called next
            for check in checks:
                check(plain)


def test_pmc_trains_the_adapters_and_nothing_else(rng_seed):
    model = adapted(seed=rng_seed, lora_dropout=0.1).train()
    config = PMCConfig(num_samples=3, max_new_tokens=6, max_length=None)
    pmc = PMC(model, make_tokenizer(), config)
    pmc.initialise(QUESTIONS)
    assert model.training
    pmc.loss([0, 1], RETAIN).backward()
    gradients = trained(model)
    assert gradients.keys() == {name for name, p in model.named_parameters() if "lora_" in name}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_the_model_without_its_adapter_is_the_reference(rng_seed):
    model, plain = adapted(seed=rng_seed), make_model(seed=rng_seed)
    lm, batch = LanguageModel(model), pack([[1, 2], [3]], [[4, 5], [6]])
    with model.disable_adapter():
        reference = losses.sequence_logprob(lm, batch)
    torch.testing.assert_close(reference, losses.sequence_logprob(LanguageModel(plain), batch), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(reference, losses.sequence_logprob(lm, batch), atol=1e-3)
    losses.npo(lm, batch, 2, reference).backward()
    assert len(trained(model)) == sum("lora_" in name for name, _ in model.named_parameters())


def test_adapters_that_transformers_puts_in(rng_seed):
    model = make_model(seed=rng_seed)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "up_proj"]))
    pmc = PMC(model, make_tokenizer(), PMCConfig(num_samples=2, max_new_tokens=4, max_length=None))
    pmc.initialise(QUESTIONS)
    pmc.loss([0], RETAIN).backward()
    assert all("lora_" in name for name in trained(model)) and trained(model)


def test_adapters_of_several_kinds(rng_seed):
    model = peft.get_peft_model(make_model(seed=rng_seed), peft.LoraConfig(target_modules=["q_proj"]), mixed=True)
    model.add_adapter("other", peft.LoHaConfig(target_modules=["v_proj"], init_weights=False))
    model.set_adapter(["default", "other"])
    lm, ids = LanguageModel(model.eval()), torch.tensor([[1, 2, 3, 4]])
    loss = losses.idk(lm, pack([[1, 2]], [[3, 4]]), 1)
    want = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, 1:3], ids[0, 2:])
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert {re.search("lora|hada", name)[0] for name in trained(model)} == {"lora", "hada"}
    got = Sampler(lm).sample(ids, max_new_tokens=1, temperature=0.0, eos_token_id=-1)
    assert got.tokens.item() == model(input_ids=ids).logits[0, -1].argmax()


@torch.no_grad()
def test_adapters_on_parameters_while_sampling(rng_seed):
    """PEFT parametrizes the layer for the time of a call, when fast_linear has already replaced its product."""
    config = {"target_modules": [], "target_parameters": ["up_proj.weight"]}
    model = adapted(seed=rng_seed, **config)
    ids = torch.randint(0, 256, (2, 7))
    want = model(input_ids=ids).logits
    assert not torch.allclose(want, make_model(seed=rng_seed)(input_ids=ids).logits, atol=1e-3)
    with fast_linear(LanguageModel(model).backbone):
        torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]},
    ],
    ids=["lora", "modules_to_save", "target_parameters"],
)
def test_adapters_on_the_head_are_refused(family, options):
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    with pytest.raises(UserError, match=r"model: got PeftModelForCausalLM with output head \w+, .* target_modules"):
        Sampler(peft.get_peft_model(make_model(family), config))


def test_an_adapter_put_on_the_head_later_is_refused():
    model = make_model()
    pmc = PMC(model, make_tokenizer(), PMCConfig(num_samples=2, max_new_tokens=4, max_length=None))
    pmc.initialise(QUESTIONS)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(UserError, match="adapters on the head are not supported"):
        pmc.loss([0], RETAIN)


def test_learned_prompts_are_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UserError, match="model: got adapters that learn prompts"):
        Sampler(peft.get_peft_model(make_model(), config))


@pytest.mark.parametrize("later", [False, True])
def test_adapters_that_tokens_invoke_are_refused(later):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    model = adapted()
    sampler = Sampler(model)
    model.add_adapter("invoked", config)
    model.set_adapter("invoked")
    with pytest.raises(UserError, match=r"model: got adapters that tokens invoke \(Activated LoRA\)"):
        sampler.sample(torch.tensor([[1, 2]]), max_new_tokens=2, eos_token_id=257) if later else Sampler(model)
