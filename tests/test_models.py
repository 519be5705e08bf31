"""Backbone and head against the model's own loss, for many families."""

import pytest
import torch
from tiny import FAMILIES, VOCAB, make_model, make_tokenizer
from torch import nn

from pmc_fast.errors import UserError
from pmc_fast.models import LanguageModel, evaluating


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_models_own(family, impl, rng_seed):
    model = make_model(family, seed=rng_seed)
    ids = torch.randint(0, 256, (3, 11))
    expected = model(input_ids=ids, labels=ids).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    lm = LanguageModel(model)
    hidden = lm.hidden(ids)[:, :-1].flatten(0, 1)
    weight = torch.full((hidden.shape[0],), 1 / hidden.shape[0])
    loss = lm.head.collapse_loss(hidden, ids[:, 1:].flatten(), weight, impl=impl).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_loss_under_autocast_is_the_models_own(family, rng_seed):
    """Models disagree on whether their last hidden states are then float32 or bfloat16; the head takes both."""
    model, ids = make_model(family, seed=rng_seed), torch.randint(0, 256, (3, 11))
    lm = LanguageModel(model)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(input_ids=ids, labels=ids).loss
        hidden = lm.hidden(ids)[:, :-1].flatten(0, 1)
        weight = torch.full((hidden.shape[0],), 1 / hidden.shape[0])
        got = lm.head.collapse_loss(hidden, ids[:, 1:].flatten(), weight).loss
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(got, want.float(), rtol=1e-2, atol=1e-2)
    got.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)


def test_unknown_logits_are_refused():
    model = make_model("llama")
    forward = model.forward

    def doubled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    with pytest.raises(UserError, match="logits"):
        LanguageModel(model)


def test_a_model_without_a_linear_head_is_refused():
    with pytest.raises(UserError, match="model: got Linear"):
        LanguageModel(nn.Linear(VOCAB, 3))
    for wrong, got in (("llama", "'llama'"), (None, "None"), (make_tokenizer(), "a value of type ")):
        with pytest.raises(
            UserError, match=f"^model: got {got}.*, expected a transformers causal language model, as Auto"
        ):
            LanguageModel(wrong)


def test_evaluating_restores_each_modules_mode():
    model = make_model("llama").train()
    model.model.layers[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training
