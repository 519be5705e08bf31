"""Models of no known kind are decoded by their own modules, compiled on request: the same answers, and few compilations."""

import gc
import weakref
from functools import partial

import pytest
import torch
from tiny import make_model
from torch import nn

pytest.importorskip("triton")
from draws import assert_same
from static_decoding import DEVICE, adapt, sample, watch

from pmc_fast import attention, fast_linear, packed_layers, static_decoder
from pmc_fast.decoder_layers import Unknown
from pmc_fast.errors import UserError
from pmc_fast.running_rows import RunningRows
from pmc_fast.sampler import Sampler

INDUCTOR = "test_as_torch_compiles_by_default"
FAMILIES = ("gpt_neox", "gpt2", "cohere", "opt", "mixtral", "stablelm", "gemma2")
ONE_LAYER = {"num_hidden_layers": 1}  # torch traces them one by one
COUNTERS = torch._dynamo.utils.counters


@pytest.fixture(autouse=True)
def quickly(request, monkeypatch):
    """What torch traces runs as it is, but where a test is about what becomes of it."""
    if request.node.name != INDUCTOR:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    COUNTERS.clear()


@pytest.fixture
def unknown(monkeypatch):
    """All kinds of models are taken for unknown ones."""

    def refuse(*args):
        raise Unknown

    monkeypatch.setattr(static_decoder, "read_static_layers", refuse)
    monkeypatch.setattr("pmc_fast.running_rows.fused_decoder", lambda *args: None)
    monkeypatch.setattr(packed_layers, "KERNELS", {})


def make(family, seed, **changes):
    model = make_model(family, seed=seed, **changes).to(DEVICE)
    if family == "gemma2":  # transformers gives it eager attention, training this library's
        attention.install(model)
    if family == "mixtral":
        model.set_experts_implementation("batched_mm")
    return model


def compilations():
    return COUNTERS["stats"]["unique_graphs"]


@pytest.mark.parametrize("family", FAMILIES)
def test_same_answers_as_the_modules(family, unknown, rng_seed):
    model = make(family, rng_seed)
    want = sample(model, rng_seed)
    sampler = Sampler(model.train(), compile_modules=True)
    assert_same(sample(sampler, rng_seed), want)
    assert sampler.decoder in ("compiled modules", "cuda graph of compiled modules") and model.training
    assert compilations() and not COUNTERS["graph_break"]


def test_as_torch_compiles_by_default(unknown, rng_seed):
    model = make("gpt_neox", rng_seed)
    sampler = Sampler(model, compile_modules=True)
    for prompts in ([[1, 2, 3], [4]], [[5, 6]]):
        assert_same(sample(sampler, rng_seed, prompts=prompts), sample(model, rng_seed, prompts=prompts))


def test_calls_share_what_is_compiled_and_read_the_weights_of_now(unknown, rng_seed):
    model = make("cohere", rng_seed)
    sampler = Sampler(model, compile_modules=True)
    for prompts, samples, steps in (([[1, 2, 3], [4]], 3, 5), ([[5]], 7, 9), ([[6, 7]] * 5, 2, 12)):
        options = {"prompts": prompts, "num_samples": samples, "max_new_tokens": steps}
        assert_same(sample(sampler, rng_seed, **options), sample(model, rng_seed, **options))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    assert compilations() <= 2  # of rows, and of a single row


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.1),
        lambda model: setattr(model.config, "sliding_window", 2),
        lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.ReLU()),
        lambda model: model.model.rotary_emb.register_buffer("inv_freq", 0.5 * model.model.rotary_emb.inv_freq),
        lambda model: setattr(model.model.layers[0], "mlp", make("mistral", 1).model.layers[1].mlp),
    ],
    ids=["a number", "a window", "an activation", "a buffer", "a block"],
)
def test_a_model_that_has_changed_is_compiled_as_it_is(change, unknown, rng_seed):
    model = make("mistral", rng_seed, sliding_window=None, **ONE_LAYER)
    sampler = Sampler(model, compile_modules=True)
    before = sample(sampler, rng_seed)
    change(model)
    after = sample(sampler, rng_seed)
    assert_same(after, sample(model, rng_seed))
    assert before.logprobs.shape != after.logprobs.shape or not torch.equal(before.logprobs, after.logprobs)


def test_adapters_that_are_switched(unknown, rng_seed):
    model = adapt(make("llama", rng_seed, **ONE_LAYER), lora_bias=True)
    sampler = Sampler(model, compile_modules=True)
    for _ in range(2):
        assert_same(sample(sampler, rng_seed), sample(model, rng_seed))
        with model.disable_adapter():
            assert_same(sample(sampler, rng_seed), sample(model, rng_seed))
    assert compilations() <= 4


@pytest.mark.skipif(DEVICE == "cuda", reason="packed weights are a CPU's")
@pytest.mark.parametrize("packs", [True, False])
def test_linear_layers_multiply_as_those_that_are_not_compiled(packs, unknown, monkeypatch, rng_seed):
    model, calls, multiply = make("gpt_neox", rng_seed), [], fast_linear.packed_linear
    want = sample(model, rng_seed)
    monkeypatch.setattr(fast_linear, "packed_linear", lambda *args: calls.append(args) or multiply(*args))
    if not packs:
        monkeypatch.setattr(fast_linear, "missing_library", lambda: "hidden")
    sampler = Sampler(model, compile_modules=True)
    assert_same(sample(sampler, rng_seed), want)
    before = len(calls)
    assert_same(sample(sampler, rng_seed), want)
    passes = 1 + want.tokens.shape[2] - 1  # the prompts', and of each token but the last
    assert len(calls) - before == (passes * 2 * 4 if packs else 0)  # two layers of four products


def test_attention_without_a_kernel_of_ours(unknown, monkeypatch, rng_seed):
    model = make("gpt_neox", rng_seed)
    monkeypatch.setattr(RunningRows, "_attends_natively", lambda self: False)
    assert_same(sample(Sampler(model, compile_modules=True), rng_seed), sample(model, rng_seed))
    assert compilations()


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_from_fixed_memory(family, unknown, monkeypatch, rng_seed):
    model = make(family, rng_seed)
    want = [sample(model, rng_seed, max_new_tokens=steps) for steps in (7, 5)]
    made = watch(monkeypatch)
    sampler = Sampler(model, keep_graphs=True, compile_modules=True)
    assert_same(sample(sampler, rng_seed, max_new_tokens=7), want[0])
    assert_same(sample(sampler, rng_seed, max_new_tokens=5), want[1])
    assert made[0] is made[1] and sampler.decoder == "cuda graph of compiled modules"
    assert 0 < compilations() <= 2 and not COUNTERS["graph_break"]


def test_known_kinds_keep_their_kernels(rng_seed):
    sampler = Sampler(make("llama", rng_seed), compile_modules=True)
    assert_same(sample(sampler, rng_seed), sample(sampler.lm, rng_seed))
    assert sampler.decoder in ("native", "cuda graph") and not compilations()


class Prints(nn.Module):
    def forward(self, x):
        print(x)
        return x


def mlp(model):
    return model.gpt_neox.layers[-1].mlp


def does_nothing(*args): ...


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model: mlp(model).register_forward_hook(does_nothing), "a model with hooks or replaced forwards"),
        (lambda model: setattr(mlp(model), "forward", mlp(model).forward), "a model with hooks or replaced forwards"),
        (lambda model: model.set_attn_implementation("eager"), "a model whose attention is not torch's SDPA"),
        (lambda model: setattr(mlp(model), "act", Prints()), r"GPTNeoXModel, which torch cannot compile \(.*print"),
    ],
    ids=["hook", "forward", "attention", "what it does"],
)
def test_what_cannot_be_compiled_is_refused(change, message, unknown, rng_seed):
    model = make("gpt_neox", rng_seed, **ONE_LAYER)
    sampler = Sampler(model, compile_modules=True)
    sample(sampler, rng_seed, max_new_tokens=2)
    change(model)
    theirs = model.config._attn_implementation
    with pytest.raises(UserError, match=f"^compile_modules: got {message}.*; expected compile_modules=False for it$"):
        sample(sampler, rng_seed, max_new_tokens=2)
    assert model.config._attn_implementation == theirs
    sample(model, rng_seed, max_new_tokens=2)


def test_experts_that_the_host_asks_are_refused(rng_seed):
    model = make("mixtral", rng_seed)
    model.set_experts_implementation("eager")
    with pytest.raises(UserError, match="^compile_modules: got MixtralModel, which torch cannot compile"):
        sample(Sampler(model, compile_modules=True), rng_seed)


def test_torch_counts_compilations_by_model_and_says_when_it_has_enough(unknown, rng_seed):
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(3):
            model = make("gpt_neox", rng_seed, **ONE_LAYER)
            sampler = Sampler(model, compile_modules=True)
            sample(sampler, rng_seed, max_new_tokens=2)
        mlp(model).act = nn.ReLU()
        with pytest.raises(
            UserError, match="^compile_modules: got a model that has changed more often .*; expected a new"
        ):
            sample(sampler, rng_seed, max_new_tokens=2)
        sample(Sampler(model, compile_modules=True), rng_seed, max_new_tokens=2)


def test_nothing_stays_of_a_model_that_is_gone(unknown, rng_seed):
    sampler = Sampler(make("gpt_neox", rng_seed), compile_modules=True)
    sample(sampler, rng_seed, max_new_tokens=3)
    assert compilations()
    gone = weakref.ref(mlp(sampler.lm.model).dense_h_to_4h.weight)
    del sampler
    gc.collect()
    assert gone() is None
