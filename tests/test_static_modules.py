"""Models of no known kind are decoded from fixed memory by their own modules, unless these need the host.

Here all kinds are taken for unknown ones. See test_static_decoder.py, which holds both ways to the same.
"""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from draws import assert_same, differ
from tiny import FAMILIES, make_model
from torch import nn
from transformers import DynamicCache
from transformers.activations import NewGELUActivation
from transformers.masking_utils import create_causal_mask

pytest.importorskip("triton")
from static_decoding import DEVICE, PROMPTS, adapt, by_modules, sample, watch

from pmc_fast import attention, static_decoder
from pmc_fast.decoder_layers import Unknown
from pmc_fast.host_values import HostValue, RefusingHostValues
from pmc_fast.models import LanguageModel
from pmc_fast.modules import Modules, PassingLayer
from pmc_fast.running_rows import RunningRows
from pmc_fast.sampler import Sampler
from pmc_fast.static_modules import Appending, StaticModules, check_modules

VARIANTS = {
    **{name: (name, {}) for name in FAMILIES},
    "llama with ReLU": ("llama", {"hidden_act": "relu"}),
    "gpt_neox, one after the other": ("gpt_neox", {"use_parallel_residual": False}),
}
ROPE = {"rope_theta": 1e4, "factor": 2.0}
LONG = {**ROPE, "rope_type": "longrope", "original_max_position_embeddings": 8}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.fixture
def built(monkeypatch):
    """What was made, call by call, where no layers are of a known kind."""

    def unknown(*args):
        raise Unknown

    monkeypatch.setattr(static_decoder, "read_static_layers", unknown)
    return watch(monkeypatch)


def make(family, seed, **changes):
    model = make_model(family, seed=seed, **changes).to(DEVICE)
    if family == "gemma2":  # transformers gives it eager attention, training this library's
        attention.install(model)
    return model


def by_transformers(model, seed, monkeypatch, **options):
    """With transformers' masks over the whole cache."""
    with monkeypatch.context() as patch:
        patch.setattr(RunningRows, "_attends_natively", lambda self: False)
        return by_modules(model, seed, monkeypatch, **options)


def is_captured(decoder):
    return decoder is not None and isinstance(decoder.layers, StaticModules)


@pytest.mark.parametrize("prompts", [PROMPTS, [[1, 2, 3, 4, 5, 6, 7, 8]]], ids=["padded", "one prompt"])
@pytest.mark.parametrize("kind", VARIANTS)
def test_same_answers_as_the_modules(kind, prompts, built, monkeypatch, rng_seed):
    family, changes = VARIANTS[kind]
    got = sample(make(family, rng_seed, **changes), rng_seed, prompts=prompts)
    assert len(built) == 1 and is_captured(built[0])
    reference = make_model(family, seed=rng_seed, **changes).to(DEVICE)
    assert_same(got, by_transformers(reference, rng_seed, monkeypatch, prompts=prompts))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_adapters_that_are_no_two_products(options, built, monkeypatch, rng_seed):
    model = adapt(make("llama", rng_seed), **options)
    adapted = sample(model, rng_seed)
    assert is_captured(built[-1])
    assert_same(adapted, by_modules(model, rng_seed, monkeypatch))
    with model.disable_adapter():
        plain = sample(model, rng_seed)
        assert_same(plain, by_modules(model, rng_seed, monkeypatch))
    assert differ(plain, adapted)


def test_an_answer_that_ended_takes_no_position_that_was_not_learned(built, monkeypatch, rng_seed):
    model, prompts = make("gpt2", rng_seed, n_positions=16), [list(range(14)), [4]]
    options = {"prompts": prompts, "max_new_tokens": torch.tensor([2, 15]), "eos_token_id": 257}
    assert_same(sample(model, rng_seed, **options), by_transformers(model, rng_seed, monkeypatch, **options))
    assert is_captured(built[0])


def test_prompts_may_fill_all_learned_positions(built, monkeypatch, rng_seed):
    model, options = make("gpt2", rng_seed, n_positions=7), {"max_new_tokens": 1}
    assert_same(sample(model, rng_seed, **options), by_modules(model, rng_seed, monkeypatch, **options))
    assert is_captured(built[0])


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.config, "sliding_window", 2),
        lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.1),
        lambda model: setattr(model.model.layers[1].mlp.activation_fn, "__class__", NewGELUActivation),
        lambda model: model.model.rotary_emb.register_buffer("inv_freq", 0.5 * model.model.rotary_emb.inv_freq),
    ],
    ids=["the configuration of attention", "a number", "a module", "a buffer"],
)
def test_kept_graphs_know_what_they_read(change, built, monkeypatch, rng_seed):
    model = make("phi3", rng_seed)
    sampler = Sampler(model, keep_graphs=True)
    before = sample(sampler, rng_seed)
    change(model)
    after = sample(sampler, rng_seed)
    assert built[0] is not built[1]
    assert_same(after, by_modules(model, rng_seed, monkeypatch))
    assert before.logprobs.shape != after.logprobs.shape or not torch.equal(before.logprobs, after.logprobs)
    sample(sampler, rng_seed)
    assert built[2] is built[1]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_are_captured_if_the_host_need_not_know_who_is_asked(implementation, built, monkeypatch, rng_seed):
    model = make("mixtral", rng_seed)
    model.set_experts_implementation(implementation)
    sampler = Sampler(model, keep_graphs=True)
    assert_same(sample(sampler, rng_seed), by_modules(model, rng_seed, monkeypatch))
    assert is_captured(built[0]) == (implementation == "batched_mm")
    assert_same(sample(sampler, rng_seed), by_modules(model, rng_seed, monkeypatch))
    sample(sampler, rng_seed)
    assert sampler.decoder == ("cuda graph of modules" if implementation == "batched_mm" else "modules")


@pytest.mark.parametrize("rope", [{**ROPE, "rope_type": "dynamic"}, LONG], ids=lambda rope: rope["rope_type"])
def test_angles_that_depend_on_other_rows_are_left_to_the_modules(rope, built, monkeypatch, rng_seed):
    options = {"rope_parameters": rope, "max_position_embeddings": 8}
    sampler = Sampler(make("cohere", rng_seed, **options))
    got = sample(sampler, rng_seed)
    assert built == [None] and sampler.decoder == "modules"
    assert_same(got, by_modules(make("cohere", rng_seed, **options), rng_seed, monkeypatch))


@torch.no_grad()
@pytest.mark.parametrize("kind", [*VARIANTS, "mixtral", "phimoe", "dora"])
def test_what_a_step_takes_from_the_host(kind):
    """meta stands for a GPU, where copies from the host are refused."""
    family, changes = {"dora": ("llama", {})}.get(kind) or VARIANTS.get(kind, (kind, {}))
    model = make_model(family, **changes)
    if kind in ("mixtral", "phimoe"):
        model.set_experts_implementation("batched_mm")
    model = adapt(model, use_dora=True) if kind == "dora" else model
    lm = LanguageModel(model)
    attention.install(lm.model)
    model.to("meta")
    rows = SimpleNamespace(attend=lambda layer, query, key, value, **options: torch.empty_like(query))
    token, held = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    refused = pytest.raises(HostValue) if kind == "phimoe" else nullcontext()  # its angles
    with refused, RefusingHostValues("meta"):
        assert Modules(lm).hidden(token, token, rows, held[0]).device.type == "meta"


def test_modules_are_told_how_many_positions_are_held(built, monkeypatch, rng_seed):
    told, hidden = [], Modules.hidden
    monkeypatch.setattr(Modules, "hidden", lambda modules, *args: told.append(args[3]) or hidden(modules, *args))
    sample(make("gpt2", rng_seed), rng_seed, max_new_tokens=2, eos_token_id=257)
    assert is_captured(built[0]) and told == [7, 7]  # the longest prompt; in the trial, and after the first token


def test_layers_of_several_shapes_are_left_to_the_modules():
    layers = [SimpleNamespace(keys=torch.empty(1, heads, 3, 8)) for heads in (4, 2)]
    lm = LanguageModel(make_model("cohere"))
    check_modules(lm, SimpleNamespace(cache=SimpleNamespace(layers=layers[:1] * 2)))
    with pytest.raises(Unknown):
        check_modules(lm, SimpleNamespace(cache=SimpleNamespace(layers=layers)))


def test_a_window_that_masks_alone_know_of_is_left_to_them(built, monkeypatch, rng_seed):
    model = make("phimoe", rng_seed)
    model.set_experts_implementation("batched_mm")
    got = sample(model, rng_seed)
    assert built == [None]
    assert_same(got, by_transformers(model, rng_seed, monkeypatch))
    model.config.sliding_window = None
    got = sample(model, rng_seed)
    assert is_captured(built[1]) == (DEVICE == "cpu")  # its angles are the host's
    assert_same(got, by_transformers(model, rng_seed, monkeypatch))


def test_masks_of_somebodys_own_are_left_to_them(built, monkeypatch, rng_seed):
    near = partial(create_causal_mask, and_mask_function=lambda batch, head, query, key: query - key < 3)
    monkeypatch.setattr("transformers.models.granite.modeling_granite.create_causal_mask", near)
    model = make("granite", rng_seed)
    got = sample(model, rng_seed)
    assert built == [None]
    assert_same(got, by_transformers(model, rng_seed, monkeypatch))


class Watched(nn.Module):
    """Somebody's own module around one of the model's."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.mlp.register_forward_hook(lambda module, args, out: out),
        lambda layer: layer.mlp.register_forward_pre_hook(lambda module, args: None),
        lambda layer: setattr(layer.mlp, "forward", layer.mlp.forward),
        lambda layer: setattr(layer, "mlp", Watched(layer.mlp)),
        lambda layer: setattr(layer.mlp, "_compiled_call_impl", layer.mlp._call_impl),  # as its compile() does
    ],
    ids=["hook", "hook before", "forward", "wrapper", "compiled"],
)
def test_modules_that_somebody_watches_replaces_or_compiles_run_by_themselves(change, built, rng_seed):
    model = make("granite", rng_seed)
    change(model.model.layers[1])
    sample(model, rng_seed, max_new_tokens=2)
    assert built == [None]


def test_a_token_is_kept_before_it_attends(rng_seed):
    own = torch.full((2, 2, 3, 2, 6, 4), torch.nan)  # of the second of two layers
    query, new, length = torch.randn(3, 4, 4), torch.randn(2, 3, 2, 4), torch.tensor([4, 1, 6])

    def attends(layer, got, window):
        assert layer == 1 and got is query and window == 5
        for row, place in enumerate((length - 1).tolist()):
            torch.testing.assert_close(own[1, :, row, :, place], new[:, row], rtol=0, atol=0)
        assert own.isnan().sum() == own.numel() - new.numel()
        return "attended"

    assert Appending(own, length, attends).attend(1, query, *new, window=5) == "attended"


@pytest.mark.parametrize("held", [5, torch.tensor(5)], ids=["number", "tensor"])
def test_the_cache_of_a_token_counts_as_any_cache(held, rng_seed):
    theirs, new = DynamicCache(), torch.randn(2, 3, 2, 1, 4)
    theirs.update(*torch.randn(2, 3, 2, 5, 4), 0)
    mine = PassingLayer(held)
    assert mine.get_mask_sizes(1) == theirs.get_mask_sizes(1, 0)
    for _ in range(2):
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert [states.data_ptr() for states in mine.update(*new)] == [states.data_ptr() for states in new]
        theirs.update(*new, 0)
    assert held == 5 and mine.get_seq_length() == theirs.get_seq_length()
    assert mine.get_max_length() == theirs.layers[0].get_max_length()


@pytest.mark.parametrize("owned", [False, True])
def test_steps_may_overlap_and_leave_the_model_as_it_was(owned, rng_seed):
    """As those of two threads do."""
    modules = Modules(lm := LanguageModel(make_model("gpt2", seed=rng_seed)))
    attention.install(lm.model)
    token, position = torch.tensor([5, 7]), torch.tensor([3, 4])
    if owned:
        lm.backbone.warn_if_padding_and_no_attention_mask = print
    before = dict(vars(lm.backbone))

    class Rows:
        inner = None

        def attend(self, layer, query, key, value, **options):
            if layer == 0 and self.inner is not None:
                torch.testing.assert_close(modules.hidden(token, position, self.inner, 3), alone)
            return query + value

    alone, outer = modules.hidden(token, position, Rows(), 3), Rows()
    outer.inner = Rows()
    torch.testing.assert_close(modules.hidden(token, position, outer, 3), alone)
    assert vars(lm.backbone) == before
