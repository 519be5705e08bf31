"""Each loss against its formula over padded batches and full logits: value and the gradient of every parameter."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from tiny import FAMILIES, make_model
from torch.nn.functional import cross_entropy, logsigmoid

from pmc_fast import losses
from pmc_fast.models import LanguageModel
from pmc_fast.packing import pack

FORGET, RETAIN = 3, 2


def make_rows(count):
    sizes = torch.randint(1, 9, (count, 2)).tolist()
    return [tuple(torch.randint(0, 256, (size,)).tolist() for size in row) for row in sizes]


def padded_nll(model, rows):
    """The negative log-likelihood of each token [B, T] and which are labels, the plain way."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), 256)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
        mask[row, :end] = 1
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    nll = cross_entropy(logits.transpose(1, 2).float(), labels[:, 1:], reduction="none", ignore_index=-100)
    return nll, labels[:, 1:] != -100


def by_formula(name, model, rows, reference):
    """The losses as their papers write them; the last RETAIN rows are kept, with weight 0.7."""
    nll, label = padded_nll(model, rows)
    forget, is_label = nll[:-RETAIN], label[:-RETAIN]
    s, size, p = -forget.sum(1), is_label.sum(1), (-forget.detach()).exp()
    kept = nll[-RETAIN:][label[-RETAIN:]].mean()
    half = len(forget) // 2
    value = {
        "npo": lambda: -2 / 0.3 * logsigmoid(-0.3 * (s - reference)).mean(),
        "simnpo": lambda: -2 / 1.5 * logsigmoid(-1.5 / size * s - 0.4).mean(),
        "dpo": lambda: -logsigmoid(0.3 * ((s - reference)[:half] - (s - reference)[half:])).mean(),
        "grad_diff": lambda: -forget[is_label].mean(),
        "wga": lambda: -(p**0.8 * forget)[is_label].mean(),
        "satimp": lambda: -(p**0.8 * (1 - p) ** 0.6 * forget)[is_label].mean(),
        "idk": lambda: forget[is_label].mean(),
    }[name]()
    return value + 0.7 * kept


def by_library(name, lm, batch, count, reference):
    keep = {"retain_weight": 0.7}
    return {
        "npo": lambda: losses.npo(lm, batch, count, reference, beta=0.3, **keep),
        "simnpo": lambda: losses.simnpo(lm, batch, count, beta=1.5, gamma=0.4, **keep),
        "dpo": lambda: losses.dpo(lm, batch, count // 2, reference, beta=0.3, **keep),
        "grad_diff": lambda: losses.grad_diff(lm, batch, count, **keep),
        "wga": lambda: losses.wga(lm, batch, count, beta=0.8, **keep),
        "satimp": lambda: losses.satimp(lm, batch, count, beta1=0.8, beta2=0.6, **keep),
        "idk": lambda: losses.idk(lm, batch, count, **keep),
    }[name]()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


ALL = ["npo", "simnpo", "dpo", "grad_diff", "wga", "satimp", "idk"]


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("name", ALL)
def test_value_and_gradients(name, family, rng_seed):
    assert family in FAMILIES
    model, initial = make_model(family, seed=rng_seed), make_model(family, seed=rng_seed + 1)
    count = 2 * FORGET if name == "dpo" else FORGET
    rows = make_rows(count + RETAIN)
    batch = pack([prompt for prompt, _ in rows], [answer for _, answer in rows])
    with torch.no_grad():
        want_reference = -padded_nll(initial, rows)[0].sum(1)
    reference = losses.sequence_logprob(LanguageModel(initial), batch)
    assert not reference.requires_grad
    torch.testing.assert_close(reference, want_reference, rtol=1e-4, atol=1e-4)

    want = by_formula(name, model, rows, want_reference[:count])
    want_gradients = gradients(model, want)
    got = by_library(name, LanguageModel(model), batch, count, reference[:count])
    got_gradients = gradients(model, got)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert got_gradients.keys() == want_gradients.keys()
    for key, gradient in want_gradients.items():
        atol = 1e-4 * gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(got_gradients[key], gradient, rtol=1e-3, atol=atol, msg=lambda m, k=key: f"{k}: {m}")


def test_without_rows_to_keep(rng_seed):
    lm, rows = LanguageModel(make_model(seed=rng_seed)), make_rows(3)
    batch = pack([prompt for prompt, _ in rows], [answer for _, answer in rows])
    nll, label = padded_nll(lm.model, rows)
    torch.testing.assert_close(losses.idk(lm, batch, 3), nll[label].mean(), rtol=1e-4, atol=1e-4)


def test_the_reference_is_without_dropout_and_leaves_the_mode(rng_seed):
    model = make_model(seed=rng_seed, attention_dropout=0.5).train()
    lm, rows = LanguageModel(model), make_rows(3)
    batch = pack([prompt for prompt, _ in rows], [answer for _, answer in rows])
    assert torch.equal(losses.sequence_logprob(lm, batch), losses.sequence_logprob(lm, batch))
    assert model.training


def test_a_probability_that_rounds_to_above_1_is_taken_for_1(monkeypatch):
    lm, batch = LanguageModel(make_model()), pack([[1], [2]], [[3, 4], [5]])
    monkeypatch.setattr(losses, "_token_logprob", lambda *_: torch.tensor([1e-7, -0.5, -1.0]))
    p = torch.tensor(-0.5).exp()
    want = (p**5 * (1 - p) ** 0.5 * -0.5) / 2 + 1.0
    torch.testing.assert_close(losses.satimp(lm, batch, 1, beta2=0.5), want)


def test_an_integer_of_numpys(rng_seed):
    lm, batch = LanguageModel(make_model(seed=rng_seed)), pack([[1, 2], [4]], [[3], [5, 6]])
    assert torch.equal(losses.simnpo(lm, batch, np.int64(1)), losses.simnpo(lm, batch, 1))


def test_bad_input():
    lm, rows = LanguageModel(make_model()), [([1, 2], [3]), ([4], [5, 6])]
    batch = pack([prompt for prompt, _ in rows], [answer for _, answer in rows])
    with pytest.raises(ValueError, match="forget: got 3, expected 1 to 2"):
        losses.grad_diff(lm, batch, 3)
    with pytest.raises(TypeError, match="forget: got True, expected an integer"):
        losses.grad_diff(lm, batch, True)
    with pytest.raises(ValueError, match="refusals: got 0"):
        losses.idk(lm, batch, 0)
    with pytest.raises(ValueError, match="pairs: got 2, expected 1 to 1, since the batch has 2 sequences"):
        losses.dpo(lm, batch, 2, torch.zeros(4))
    with pytest.raises(ValueError, match=r"reference: got torch.float32 of shape \[2\], expected float32 \[1\]"):
        losses.npo(lm, batch, 1, torch.zeros(2))
    with pytest.raises(ValueError, match="gamma: got nan"):
        losses.simnpo(lm, batch, 1, gamma=float("nan"))


DEFAULTS = {
    "npo": {"beta": 0.1},
    "simnpo": {"beta": 2.5, "gamma": 0.0},
    "dpo": {"beta": 0.1},
    "grad_diff": {},
    "wga": {"beta": 1.0},
    "satimp": {"beta1": 5.0, "beta2": 1.0},
    "idk": {},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_options_have_defaults_and_ranges(name, monkeypatch, rng_seed):
    """With tokens probable enough for every exponent to matter."""
    lm, batch = LanguageModel(make_model()), pack([[1], [2], [3]], [[3, 4], [5], [6, 7, 8]])
    logprob = -torch.rand(6) - 0.05
    monkeypatch.setattr(losses, "_token_logprob", lambda *_: logprob)
    reference = {"npo": [torch.tensor([-1.0])], "dpo": [torch.tensor([-1.0, 2.0])]}

    def value(**options):
        return getattr(losses, name)(lm, batch, 1, *reference.get(name, ()), **options)

    defaults = {**DEFAULTS[name], "retain_weight": 1.0}
    assert torch.equal(value(), value(**defaults))
    above_0 = {"beta"} if name in ("npo", "simnpo", "dpo") else set()
    for option in defaults.keys() - {"gamma"}:
        wanted = f"a finite number {'above' if option in above_0 else 'of at least'} 0"
        for wrong in (-0.5, math.inf, math.nan, *([0.0] if option in above_0 else [])):
            with pytest.raises(ValueError, match=f"^{option}: got {wrong}, expected {wanted}$"):
                value(**{option: wrong})
        if option not in above_0:
            assert value(**{option: 0.0}).isfinite()


EVERY = [
    losses.sequence_logprob,
    lambda lm, batch: losses.npo(lm, batch, 1, torch.zeros(1)),
    lambda lm, batch: losses.dpo(lm, batch, 1, torch.zeros(2)),
    *(partial(one, forget=1) for one in (losses.simnpo, losses.grad_diff, losses.wga, losses.satimp)),
    partial(losses.idk, refusals=1),
]


def test_a_batch_elsewhere_is_refused_before_the_model_runs(monkeypatch):
    lm, batch = LanguageModel(make_model()), pack([[1, 2], [4]], [[3], [5, 6]], "meta")
    monkeypatch.setattr(type(lm.backbone), "forward", lambda *_, **__: pytest.fail("the model ran"))
    for call in EVERY:
        with pytest.raises(ValueError, match="^batch: got device meta, expected cpu, that of the model"):
            call(lm, batch)
    with pytest.raises(ValueError, match="^reference: got device meta, expected cpu, that of the model"):
        losses.npo(lm, pack([[1, 2]], [[3]]), 1, torch.zeros(1, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_reference_of_another_dtype_is_refused(dtype, rng_seed):
    """Than `sequence_logprob` gives."""
    lm, batch = LanguageModel(make_model(seed=rng_seed).to(dtype)), pack([[1, 2], [4]], [[3], [5, 6]])
    reference = losses.sequence_logprob(lm, batch)
    name = "float64" if dtype == torch.float64 else "float32"
    assert reference.dtype == getattr(torch, name)
    for call in (losses.npo, losses.dpo):
        loss = call(lm, batch, 1, reference[: 1 + (call is losses.dpo)])
        assert loss.isfinite() and loss.dtype == reference.dtype
        for wrong in {torch.float64, torch.float32, torch.bfloat16, torch.int64} - {reference.dtype}:
            with pytest.raises(ValueError, match=f"^reference: got {wrong} of shape .* expected {name} "):
                call(lm, batch, 1, reference[: 1 + (call is losses.dpo)].to(wrong))


@pytest.mark.parametrize("tokens", [([1, 999], [3]), ([1, 2], [3, 999]), ([1, -1], [3]), ([1, 2], [-100])])
def test_tokens_outside_of_the_vocabulary(tokens):
    """As inputs and as the labels that are none; on a GPU an assertion of the device."""
    lm = LanguageModel(make_model())
    batch = pack(*([[4], one] if one is tokens[0] else [[5, 6], one] for one in tokens))
    for call in EVERY:
        with pytest.raises(ValueError, match=r"^(input_ids|target\b).*: .* expected .*\[0, 259\)"):
            call(lm, batch)


def test_wrong_objects():
    lm, rows = LanguageModel(make_model()), [([1, 2], [3]), ([4], [5, 6])]
    batch = pack([prompt for prompt, _ in rows], [answer for _, answer in rows])
    reference = torch.zeros(1)
    for call in EVERY:
        with pytest.raises(
            TypeError, match="^lm: got a value of type LlamaForCausalLM, expected a LanguageModel: pmc_fast.models.Lang"
        ):
            call(lm.model, batch)
        with pytest.raises(
            TypeError, match="^batch: got a value of type list, expected a Packed: pmc_fast.packing.pack"
        ):
            call(lm, rows)
    for call in (lambda wrong: losses.npo(lm, batch, 1, wrong), lambda wrong: losses.dpo(lm, batch, 1, wrong)):
        for wrong, got in ((None, "None"), ([0.0], "a value of type list")):
            with pytest.raises(TypeError, match=f"^reference: got {got}, expected float32"):
                call(wrong)
    for wrong, got in ((None, "None"), ("1", "'1'"), (True, "True")):
        with pytest.raises(TypeError, match=f"^beta: got {got}, expected a number"):
            losses.npo(lm, batch, 1, reference, beta=wrong)
        with pytest.raises(TypeError, match=f"^retain_weight: got {got}, expected a number"):
            losses.idk(lm, batch, 1, retain_weight=wrong)
        with pytest.raises(TypeError, match=f"^gamma: got {got}, expected a finite number"):
            losses.simnpo(lm, batch, 1, gamma=wrong)
