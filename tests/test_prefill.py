"""Prompts that begin alike, packed, leave what each would leave by itself."""

import pytest
import torch
from tiny import FAMILIES, make_model

from pmc_fast import Sampler, UserError, attention, packing
from pmc_fast.models import LanguageModel
from pmc_fast.packing import pad_left
from pmc_fast.prefill import prefill

TEMPLATE = [258, *range(40, 50)]
QUESTIONS = [[1, 2, 3], [4], [1, 2, 9, 10, 11, 12, 13, 14], [4]]  # one asked twice, two alike for longer than all are


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, "stablelm", "nemotron"])
def test_same_hidden_states_and_cache(family, monkeypatch, rng_seed):
    lm = LanguageModel(make_model(family, seed=rng_seed))
    ids, mask = pad_left([TEMPLATE + question for question in QUESTIONS], 256)
    tokens = []
    lm.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with attention.replacing_sdpa(lm.model):
        packed = prefill(lm, ids, mask)
        monkeypatch.setattr(packing, "LEAST_SHARED", len(TEMPLATE) + 1)
        padded = prefill(lm, ids, mask)
    packs = family != "gemma2"  # whose attention transformers runs by its own code
    assert tokens == [len(TEMPLATE) + sum(map(len, QUESTIONS)) if packs else ids.numel(), ids.numel()]
    assert packed.suits_decode_attention == padded.suits_decode_attention == packs
    torch.testing.assert_close(packed.hidden, padded.hidden, rtol=1e-3, atol=1e-5)
    assert torch.equal(packed.position, padded.position) and torch.equal(packed.padding, padded.padding)
    seen = mask.bool()
    for mine, theirs in zip(packed.cache.layers, padded.cache.layers, strict=True):
        assert mine.get_seq_length() == theirs.get_seq_length()
        for held, want in zip(mine.filled(), theirs.filled(), strict=True):
            assert held.shape == want.shape and held.isfinite().all()
            torch.testing.assert_close(held.transpose(1, 2)[seen], want.transpose(1, 2)[seen], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_answers(family, monkeypatch, rng_seed):
    model = make_model(family, seed=rng_seed)
    ids, mask = pad_left([TEMPLATE + question for question in QUESTIONS], 256)
    options = {"num_samples": 4, "max_new_tokens": 8, "eos_token_id": 257, "seed": rng_seed, "top_p": 0.9}
    packed = Sampler(model).sample(ids, mask, **options)
    monkeypatch.setattr(packing, "LEAST_SHARED", 99)
    padded = Sampler(model).sample(ids, mask, **options)
    assert torch.equal(packed.tokens, padded.tokens) and torch.equal(packed.lengths, padded.lengths)
    torch.testing.assert_close(packed.logprobs, padded.logprobs, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_other_attention_is_given_each_prompt_by_itself(rng_seed):
    model = make_model(seed=rng_seed)
    model.set_attn_implementation("eager")
    lm = LanguageModel(model)
    ids, mask = pad_left([TEMPLATE + question for question in QUESTIONS], 256)
    filled = prefill(lm, ids, mask)
    assert filled.calls == [] and not filled.suits_decode_attention
    one = prefill(lm, ids[1:2, -12:], None)
    torch.testing.assert_close(filled.hidden[1], one.hidden[0], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_a_mask_with_holes_is_not_packed(rng_seed):
    lm = LanguageModel(make_model(seed=rng_seed))
    ids = torch.tensor([TEMPLATE + [1, 2, 3], TEMPLATE + [4, 5, 6]])
    mask = torch.ones_like(ids)
    mask[1, len(TEMPLATE) - 1] = 0  # what comes before it is still enough to be shared
    with attention.replacing_sdpa(lm.model):
        filled = prefill(lm, ids, mask)
        alone = prefill(lm, ids[1:], mask[1:])
    assert not any(call.packed for call in filled.calls)
    torch.testing.assert_close(filled.hidden[1], alone.hidden[0], rtol=1e-3, atol=1e-5)
    for mine, its in zip(filled.cache.layers, alone.cache.layers, strict=True):
        torch.testing.assert_close(mine.keys[1:], its.keys, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("keeps", ["none", "some"])
def test_models_that_lose_the_lengths_are_sampled_from_all_the_same(keeps, monkeypatch, rng_seed):
    """As keywords and as masks."""
    model = make_model(seed=rng_seed)
    ids, mask = pad_left([TEMPLATE + question for question in QUESTIONS], 256)
    options = {"num_samples": 3, "max_new_tokens": 6, "eos_token_id": 257, "seed": rng_seed}
    with monkeypatch.context() as patch:
        patch.setattr(packing, "LEAST_SHARED", 99)
        want = Sampler(model).sample(ids, mask, **options)
    inner = attention._forward

    def loses(module, query, key, value, mask, *, packed_lengths=None, **kwargs):
        if keeps == "none" or module.layer_idx > 0:
            packed_lengths, mask = None, mask if mask is None or mask.dim() == 4 else None
        return inner(module, query, key, value, mask, packed_lengths=packed_lengths, **kwargs)

    monkeypatch.setattr(attention, "_forward", loses)
    got = Sampler(model).sample(ids, mask, **options)
    assert torch.equal(got.tokens, want.tokens)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_what_the_model_refuses_keeps_its_words(monkeypatch):
    lm = LanguageModel(make_model())

    def refuse(*_, **__):
        raise UserError("model: its attention has sinks")

    monkeypatch.setattr(type(lm.backbone), "forward", refuse)
    with pytest.raises(UserError, match="^model: its attention has sinks$"):
        prefill(lm, torch.tensor([[1, 2, 3]]), None)
