"""PMC with other samplers: transformers' generate, and a stand-in for vLLM's engine that checks how it is called."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from distribution import assert_follows
from tiny import make_model, make_tokenizer

from pmc_fast import PMC, PMCConfig, Sampler, UserError
from pmc_fast.data import QA
from pmc_fast.integrations.samplers import GenerateSampler, VLLMSampler
from pmc_fast.packing import pad_left

QUESTIONS = ["Who is Ada?", "Where was Bo born?", "What did Cy write?"]
RETAIN = [QA("What is two?", "a number"), QA("Who sings?", "the bird")]
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


def make_config(**changes):
    return PMCConfig(**{"num_samples": 4, "max_new_tokens": 6, "max_length": None, **changes})


def assert_well_formed(samples, limits, ends):
    for b, limit in enumerate(limits):
        for length, ids, finished in zip(samples.lengths[b], samples.tokens[b], samples.finished[b], strict=True):
            answer = ids[:length].tolist()
            assert 1 <= len(answer) <= limit and finished == (answer[-1] in ends)
            assert not set(answer[:-1]) & set(ends) and set(ids[length:].tolist()) <= {ends[0]}
            assert finished or len(answer) == limit


class TestGenerate:
    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
    def test_greedy_is_the_samplers(self, family, rng_seed):
        model = make_model(family, seed=rng_seed).train()
        ids, mask = pad_left(PROMPTS, 256)
        options = {"max_length": 13, "num_samples": 2, "temperature": 0.0, "eos_token_id": [257, 7, 9]}
        got, want = (one.sample(ids, mask, **options) for one in (GenerateSampler(model), Sampler(model)))
        assert torch.equal(got.lengths, want.lengths) and torch.equal(got.finished, want.finished)
        assert torch.equal(got.tokens, want.tokens)
        assert model.training and not got.pruned.any() and got.logprobs.isnan().all()

    @pytest.mark.parametrize("family", ["llama", "gemma2"])
    def test_it_goes_on_after_a_packed_loss(self, family, rng_seed):
        """Which leaves this library's attention in the model."""
        model = make_model(family, seed=rng_seed)
        pmc = PMC(model, make_tokenizer(), make_config())
        pmc.initialise(QUESTIONS)
        pmc.loss([0], RETAIN)
        ids, mask = pad_left([*PROMPTS, list(range(20, 40))], 256)
        options = {"max_new_tokens": 9, "temperature": 0.0, "eos_token_id": 257}
        got, want = (one.sample(ids, mask, **options) for one in (GenerateSampler(model), Sampler(model)))
        assert torch.equal(got.tokens, want.tokens)

    @pytest.mark.parametrize("ends", [-1, [-1], [-1, 257]])
    def test_minus_1_is_no_end_token(self, ends, monkeypatch, rng_seed):
        ids, mask = pad_left(PROMPTS, 256)
        options = {"max_new_tokens": 5, "num_samples": 2, "temperature": 0.0, "eos_token_id": ends}
        model, asked = make_model(seed=rng_seed), []
        monkeypatch.setattr(
            model, "generate", lambda generate=model.generate, **given: asked.append(given) or generate(**given)
        )
        got, want = (one.sample(ids, mask, **options) for one in (GenerateSampler(model), Sampler(model)))
        for name in ("tokens", "lengths", "finished"):
            assert torch.equal(getattr(got, name), getattr(want, name))
        # transformers warns of tokens below 0, and of options beside a configuration.
        assert asked[0].keys() == {"input_ids", "attention_mask", "generation_config"}
        its = asked[0]["generation_config"]
        assert its.eos_token_id == ([257] if ends == [-1, 257] else None) and its.pad_token_id >= 0

    def test_limits_that_fit_their_own_prompts_alone(self, rng_seed):
        model = make_model("gpt2", seed=rng_seed, n_positions=24)
        ids, mask = pad_left([[3], [5] * 20, [7, 8]], 256)
        limits = torch.tensor([24, 5, 23])
        options = {"max_new_tokens": limits, "num_samples": 2, "temperature": 0.0, "eos_token_id": 300}
        got, want = (one.sample(ids, mask, **options) for one in (GenerateSampler(model), Sampler(model)))
        assert got.lengths.tolist() == [[limit] * 2 for limit in limits.tolist()]
        assert torch.equal(got.tokens, want.tokens)

    def test_draws_are_well_formed_and_repeatable(self, rng_seed):
        model, ends = make_model(seed=rng_seed), list(range(0, 259, 7))
        model.generation_config.repetition_penalty = 5.0
        ids, mask = pad_left(PROMPTS, 256)
        limits = torch.tensor([3, 8, 1])
        options = {"num_samples": 5, "max_new_tokens": limits, "eos_token_id": ends, "seed": rng_seed}
        before = torch.get_rng_state()
        first, again = (GenerateSampler(model).sample(ids, mask, **options) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), before)
        assert first.tokens.shape[:2] == (3, 5) and torch.equal(first.tokens, again.tokens)
        assert_well_formed(first, limits.tolist(), ends)
        other = GenerateSampler(model).sample(ids, mask, sequence_ids=torch.tensor([7, 8, 9]), **options)
        assert other.tokens.shape != first.tokens.shape or not torch.equal(other.tokens, first.tokens)
        assert model.generation_config.repetition_penalty == 5.0

    @pytest.mark.parametrize("truncation", [{"top_k": 6}, {"top_p": 0.5}, {"min_p": 0.4}], ids=str)
    def test_the_distribution_is_the_models(self, truncation, rng_seed):
        """Tempered and truncated, and nothing of the model's own generation settings."""
        model, draws = make_model(seed=rng_seed), 3000
        ids = torch.tensor([[3, 1, 4, 1, 5]])
        with torch.no_grad():
            top = (model(input_ids=ids).logits[0, -1].double() / 2).softmax(0).sort(descending=True)
        model.generation_config.suppress_tokens = top.indices[:1].tolist()
        model.generation_config.top_k = 2
        options = {"temperature": 2.0, "max_new_tokens": 1, "num_samples": draws, "eos_token_id": 257, **truncation}
        tokens = GenerateSampler(model).sample(ids, seed=rng_seed, **options).tokens.flatten()
        ((name, value),) = truncation.items()
        kept = {
            "top_k": torch.arange(len(top.values)) < value,
            "top_p": top.values.cumsum(0) - top.values < value,
            "min_p": top.values >= value * top.values[0],
        }[name]
        expected = torch.zeros_like(top.values).scatter(0, top.indices, top.values * kept)
        assert_follows(tokens.bincount(minlength=len(expected)), expected / expected.sum())

    @pytest.mark.parametrize("selection", ["best", "bradley_terry"])
    def test_pmc_trains_with_it(self, selection, rng_seed):
        model = make_model(seed=rng_seed)
        config = make_config(selection=selection)
        pmc = PMC(model, make_tokenizer(), config, sampler=GenerateSampler(model))
        plain = PMC(model, make_tokenizer(), config)
        pmc.initialise(QUESTIONS), plain.initialise(QUESTIONS)
        assert pmc.ledger.initial_answers == plain.ledger.initial_answers
        pmc.prepare([[0, 2], [1]])
        for batch in ([0, 2], [1]):
            pmc.loss(batch, RETAIN).backward()
        assert len(pmc.ledger.entries) == 3 and all(p.grad is not None for p in model.parameters())

    def test_an_integer_is_a_temperature(self, rng_seed):
        """As PMCConfig takes it; generate wants a float."""
        sampler, ids = GenerateSampler(make_model(seed=rng_seed)), torch.tensor([[1, 2, 3]])
        options = {"max_new_tokens": 9, "num_samples": 3, "eos_token_id": 257, "seed": rng_seed}
        want = sampler.sample(ids, temperature=2.0, **options)
        with torch.device("meta"):  # nor does torch's default device matter
            assert torch.equal(sampler.sample(ids, temperature=2, **options).tokens, want.tokens)

    def test_bad_input(self):
        with pytest.raises(
            UserError, match="model: got a value of type Linear, expected a transformers model with generate"
        ):
            GenerateSampler(torch.nn.Linear(2, 2))
        sampler, ids = GenerateSampler(make_model()), torch.tensor([[1, 2]])
        with pytest.raises(ValueError, match="exactly one of them"):
            sampler.sample(ids, eos_token_id=257)
        with pytest.raises(ValueError, match="eos_token_id: got none"):
            sampler.sample(ids, max_new_tokens=2, eos_token_id=[])
        with pytest.raises(ValueError, match="sequence_ids: got shape"):
            sampler.sample(ids, max_new_tokens=2, eos_token_id=257, sequence_ids=torch.tensor([1, 2]))


class Engine:
    """A stand-in for vllm.LLM: a model of its own, weights by name, answers in its formats; notes every call."""

    def __init__(self, seed):
        self.model, self.calls, self.parameters = make_model(seed=seed), [], []
        path = ("model_executor", "driver_worker", "model_runner")
        self.llm_engine = SimpleNamespace()
        end = self.llm_engine
        for name in path:
            setattr(end, name, SimpleNamespace())
            end = getattr(end, name)
        end.model = self

    def load_weights(self, weights):
        self.calls.append("load_weights")
        held = dict(self.model.named_parameters())
        given = {name: tensor.clone() for name, tensor in weights}
        assert given.keys() == held.keys() and not any(tensor.requires_grad for tensor in given.values())
        for name, tensor in given.items():
            held[name].data.copy_(tensor)

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")

    def generate(self, prompts, sampling_params, use_tqdm):
        self.calls.append("generate")
        assert use_tqdm is False and len(prompts) == len(sampling_params)
        self.parameters.append(sampling_params)
        outputs = []
        for prompt, wanted in zip(prompts, sampling_params, strict=True):
            options = vars(wanted)
            assert options.pop("ignore_eos") is True and options.pop("detokenize") is False
            samples = Sampler(self.model).sample(
                torch.tensor([prompt["prompt_token_ids"]]),
                num_samples=options["n"],
                max_new_tokens=options["max_tokens"],
                temperature=options["temperature"],
                top_k=None if options["top_k"] == -1 else options["top_k"],
                top_p=options["top_p"],
                min_p=options["min_p"],
                eos_token_id=options["stop_token_ids"],
                seed=options["seed"],
            )
            rows = zip(samples.tokens[0].tolist(), samples.lengths[0].tolist(), strict=True)
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(t[:n])) for t, n in rows]))
        return outputs


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.SamplingParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)


class TestVLLM:
    @pytest.fixture(autouse=True)
    def _installed(self, vllm):
        pass

    def test_calls_and_answers(self, rng_seed):
        model, engine, ends = make_model(seed=rng_seed), Engine(rng_seed + 1), [257, 7, 9]
        sampler = VLLMSampler(engine, model)
        assert engine.calls == []
        ids, mask = pad_left(PROMPTS, 256)
        limits = torch.tensor([2, 9, 4])
        options = {"num_samples": 3, "eos_token_id": ends, "seed": rng_seed, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
        streams = torch.tensor([30, 10, 20])
        got = sampler.sample(ids, mask, max_new_tokens=limits, sequence_ids=streams, temperature=0.7, **options)
        assert engine.calls == ["load_weights", "reset_prefix_cache", "generate"]
        assert_well_formed(got, limits.tolist(), ends)
        (sent,) = engine.parameters
        assert [one.max_tokens for one in sent] == [2, 9, 4]
        for one in sent:
            assert (one.n, one.temperature, one.top_k, one.top_p, one.min_p) == (3, 0.7, 50, 0.9, 0.01)
            assert one.stop_token_ids == ends and 0 <= one.seed < 2**62
        assert len({one.seed for one in sent}) == 3
        again = sampler.sample(ids, mask, max_new_tokens=limits, sequence_ids=streams, temperature=0.7, **options)
        assert torch.equal(got.tokens, again.tokens)
        assert [one.seed for one in engine.parameters[1]] == [one.seed for one in sent]
        swapped = sampler.sample(
            ids, mask, max_new_tokens=limits, sequence_ids=streams.flip(0), temperature=0.7, **options
        )
        assert [one.seed for one in engine.parameters[2]] == [one.seed for one in reversed(sent)]
        assert swapped.tokens.shape[:2] == (3, 3)

    def test_no_truncation_is_said_in_its_words(self, rng_seed):
        engine = Engine(rng_seed)
        VLLMSampler(engine, make_model(seed=rng_seed)).sample(torch.tensor([[1]]), max_length=4, eos_token_id=257)
        (one,) = engine.parameters[0]
        assert (one.top_k, one.top_p, one.min_p, one.max_tokens, one.n) == (-1, 1.0, 0.0, 3, 1)

    def test_pmc_samples_from_the_weights_of_each_step(self, rng_seed):
        model, engine = make_model(seed=rng_seed), Engine(rng_seed + 1)
        pmc = PMC(model, make_tokenizer(), make_config(), sampler=VLLMSampler(engine, model))
        plain = PMC(model, make_tokenizer(), make_config())
        pmc.initialise(QUESTIONS), plain.initialise(QUESTIONS)
        assert pmc.ledger.initial_answers == plain.ledger.initial_answers
        assert all(one.n == 1 and one.temperature == 0 for sent in engine.parameters for one in sent)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            pmc.ledger.entries.clear()  # sampled again even if final
            pmc.loss([0, 1, 2], RETAIN).backward()
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), engine.model.parameters(), strict=True))
            optimizer.step()
            assert not torch.equal(model.lm_head.weight, engine.model.lm_head.weight)
        assert engine.calls == ["load_weights", "reset_prefix_cache", "generate"] * 3

    def test_weights_by_another_way(self, rng_seed):
        model, engine, given = make_model(seed=rng_seed), Engine(rng_seed), []
        del engine.llm_engine
        with pytest.raises(UserError, match="llm: its model is not where .* VLLM_ENABLE_V1_MULTIPROCESSING=0, or give"):
            VLLMSampler(engine, model)
        sampler = VLLMSampler(engine, model, load_weights=lambda weights: given.extend(name for name, _ in weights))
        sampler.sample(torch.tensor([[1]]), max_new_tokens=2, eos_token_id=257)
        assert given == [name for name, _ in model.named_parameters()]

    def test_adapters_are_refused(self):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(UserError, match="model: got a model with adapters"):
            VLLMSampler(Engine(0), model)


def test_any_object_with_the_method_will_do(rng_seed):
    model, calls = make_model(seed=rng_seed), []

    class Mine:
        def sample(self, input_ids, attention_mask=None, **options):
            calls.append(options)
            return Sampler(model).sample(input_ids, attention_mask, **options)

    pmc = PMC(model, make_tokenizer(), make_config(), sampler=Mine())
    pmc.initialise(QUESTIONS)
    pmc.loss([0], RETAIN)
    assert len(calls) == 2 and calls[0]["temperature"] == 0 and calls[1]["num_samples"] == 4
    with pytest.raises(
        UserError, match="sampler: got a value of type object, expected an object with Sampler's sample method"
    ):
        PMC(model, make_tokenizer(), make_config(), sampler=object())
