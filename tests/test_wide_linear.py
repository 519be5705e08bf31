"""Modules in training on bfloat16 weights multiply in float32: as exact as their own products or more, and put back afterwards."""

import copy

import pytest
import torch
from tiny import checkpoint_activations, make_model

from pmc_fast import packed_layers, wide_linear
from pmc_fast.models import LanguageModel
from pmc_fast.packing import pack

FAMILIES = ["gpt_neox", "gpt2", "cohere"]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """How often a product was widened, on any CPU, by modules of whichever kind."""
    monkeypatch.setattr(packed_layers, "KERNELS", {})
    monkeypatch.setattr(wide_linear, "has_fast_bfloat16", lambda: False)
    calls, apply = [], wide_linear._Wide.apply
    monkeypatch.setattr(wide_linear._Wide, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


def batch():
    rows = [torch.randint(0, 256, (n,)).tolist() for n in (5, 2, 9, 7, 1, 3)]
    return pack(rows[:3], rows[3:])


def off(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def by_own_products(lm, packed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(wide_linear, "has_fast_bfloat16", lambda: True)
        return packed.hidden(lm)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_near_to_the_exact_values_as_the_layers_own_products(family, wide, monkeypatch, rng_seed):
    model = make_model(family, seed=rng_seed).bfloat16()
    exact, packed = copy.deepcopy(model).double(), batch()
    lm = LanguageModel(model)
    assert lm.unpackable is None  # was tried
    wide.clear()
    hidden = packed.hidden(lm)
    assert lm.packed_by == "modules" and len(wide) >= 8 and hidden.dtype == torch.bfloat16
    count = len(wide)
    theirs, want = by_own_products(lm, packed, monkeypatch), packed.hidden(LanguageModel(exact))
    assert len(wide) == count  # in float64 nothing is widened either
    assert off(hidden, want) < max(0.01, 1.2 * off(theirs, want))
    upstream, found = torch.randn_like(hidden), []
    for part, each in ((hidden, model), (theirs, model), (want, exact)):
        each.zero_grad()
        part.backward(upstream.to(part.dtype))
        found.append({name: p.grad for name, p in each.named_parameters()})
    got, theirs, want = found
    errors = []
    for name, gradient in want.items():
        assert (got[name] is None) == (gradient is None), name
        if gradient is not None and gradient.norm() > 0:
            assert got[name].dtype == torch.bfloat16
            errors.append((off(got[name], gradient), off(theirs[name], gradient)))
    mine, own = (sum(column) for column in zip(*errors, strict=True))
    assert mine < 1.2 * own, errors


@pytest.mark.parametrize("fails", [False, True])
def test_layers_are_put_back(fails, monkeypatch, rng_seed):
    model = make_model("gpt_neox", seed=rng_seed).bfloat16()
    lm, packed = LanguageModel(model), batch()
    assert lm.unpackable is None  # was tried
    if fails:
        monkeypatch.setattr(type(lm.backbone.layers[1]), "forward", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            packed.hidden(lm)
    else:
        packed.hidden(lm)
    assert not any("forward" in vars(module) for module in model.modules())


def test_adapters_and_layers_with_a_forward_of_their_own(wide, rng_seed):
    peft = pytest.importorskip("peft")
    options = {"r": 3, "target_modules": ["query_key_value"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = peft.get_peft_model(make_model("gpt_neox", seed=rng_seed).bfloat16(), peft.LoraConfig(**options))
    lm, packed = LanguageModel(model), batch()
    dense = lm.backbone.layers[0].attention.dense
    dense.forward = lambda x, forward=dense.forward: 2 * forward(x)
    own = dense.forward
    assert lm.unpackable is None  # was tried
    wide.clear()
    packed.hidden(lm).float().sum().backward()
    assert len(wide) == 2 * 4 - 1 and dense.forward is own  # the adapters are of float32
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == ("lora_" not in name)


@pytest.mark.parametrize("why", ["float32", "fast bfloat16", "checkpoints", "autocast"])
def test_when_layers_multiply_as_they_are(why, wide, monkeypatch, rng_seed):
    model = make_model("gpt_neox", seed=rng_seed).bfloat16().train()
    if why == "float32":
        model.float()
    elif why == "fast bfloat16":
        monkeypatch.setattr(wide_linear, "has_fast_bfloat16", lambda: True)
    elif why == "checkpoints":
        checkpoint_activations(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        batch().hidden(LanguageModel(model)).float().sum().backward()
    assert not wide and model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.grad is not None


def test_second_derivatives_are_refused(rng_seed):
    model = make_model("gpt_neox", seed=rng_seed).bfloat16()
    hidden = batch().hidden(LanguageModel(model))
    weight = model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight
    (gradient,) = torch.autograd.grad(hidden.float().square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="the hidden states of a packed batch"):
        gradient.float().square().sum().backward()
