"""Prompts that begin alike or are of other lengths, packed, leave what each would leave by itself."""

from dataclasses import replace

import pytest
import torch
from draws import assert_same
from tiny import FAMILIES, make_model
from torch import nn

from pmc_fast import Sampler, UserError, attention, packed_layers
from pmc_fast.attention import Watched
from pmc_fast.models import LanguageModel
from pmc_fast.packing import pad_left
from pmc_fast.prefill import _suits_decode_attention, prefill

TEMPLATE = [258, *range(40, 50)]
QUESTIONS = [[1, 2, 3], [4], [1, 2, 9, 10, 11, 12, 13, 14], [4]]  # one asked twice, two alike for longer than all are


@torch.no_grad()
@pytest.mark.parametrize("template", [TEMPLATE, []])
@pytest.mark.parametrize("family", [*FAMILIES, "stablelm", "nemotron"])
def test_same_hidden_states_and_cache(family, template, monkeypatch, rng_seed):
    lm = LanguageModel(make_model(family, seed=rng_seed))
    ids, mask = pad_left([template + question for question in QUESTIONS], 256)
    lm.check_causal()
    assert lm.unpackable is None  # was tried
    tokens = []
    lm.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with attention.replacing_sdpa(lm.model):
        packed = prefill(lm, ids, mask)
        monkeypatch.setattr("pmc_fast.prefill.MOST_TOKENS", 0)
        padded = prefill(lm, ids, mask)
    packs = family != "gemma2"  # whose attention transformers runs by its own code
    assert tokens == [len(template) + sum(map(len, QUESTIONS)) if packs else ids.numel(), ids.numel()]
    assert packed.suits_decode_attention == padded.suits_decode_attention == packs
    torch.testing.assert_close(packed.hidden, padded.hidden, rtol=1e-3, atol=1e-5)
    assert torch.equal(packed.position, padded.position) and torch.equal(packed.padding, padded.padding)
    seen = mask.bool()
    for mine, theirs in zip(packed.cache.layers, padded.cache.layers, strict=True):
        assert mine.get_seq_length() == theirs.get_seq_length()
        for held, want in zip(mine.filled(), theirs.filled(), strict=True):
            assert held.shape == want.shape and held.isfinite().all()
            torch.testing.assert_close(held.transpose(1, 2)[seen], want.transpose(1, 2)[seen], rtol=1e-3, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mistral", "phi", "gemma3_text"])
def test_layers_of_a_known_kind_fill_the_cache(family, dtype, monkeypatch, rng_seed):
    monkeypatch.setattr(packed_layers, "has_fast_bfloat16", lambda: False)
    lm = LanguageModel(make_model(family, seed=rng_seed).to(dtype))
    ids, mask = pad_left([TEMPLATE + question for question in QUESTIONS], 256)
    with attention.replacing_sdpa(lm.model):
        mine = prefill(lm, ids, mask)
        assert lm.packed_by == "native"
        monkeypatch.setattr(packed_layers, "KERNELS", {})
        theirs = prefill(lm, ids, mask)
    assert lm.packed_by == "modules"
    assert mine.suits_decode_attention and theirs.suits_decode_attention
    seen, rounded = mask.bool(), 1e-4 if dtype == torch.float32 else 0.05

    def check_near(got, want):
        assert got.dtype == want.dtype == dtype and got.shape == want.shape
        assert (got - want).norm() <= rounded * want.norm()

    check_near(mine.hidden, theirs.hidden)
    for one, other in zip(mine.cache.layers, theirs.cache.layers, strict=True):
        for held, want in zip(one.filled(), other.filled(), strict=True):
            check_near(held.transpose(1, 2)[seen], want.transpose(1, 2)[seen])
    for one, other in zip(mine.calls, theirs.calls, strict=True):
        assert (one.layer, one.head_dim, one.scaling, one.softcap, one.window) == (
            *(other.layer, other.head_dim, other.scaling, other.softcap, other.window),
        )


@pytest.mark.parametrize("template", [TEMPLATE, []])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_answers(family, template, monkeypatch, rng_seed):
    model = make_model(family, seed=rng_seed)
    ids, mask = pad_left([template + question for question in QUESTIONS], 256)
    options = {"num_samples": 4, "max_new_tokens": 8, "eos_token_id": 257, "seed": rng_seed, "top_p": 0.9}
    packed = Sampler(model).sample(ids, mask, **options)
    monkeypatch.setattr("pmc_fast.prefill.MOST_TOKENS", 0)
    padded = Sampler(model).sample(ids, mask, **options)
    assert_same(packed, padded)


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
@pytest.mark.parametrize(
    ("lengths", "packs"), [((20, 19), False), ((20, 18), True), ((30,), False)]
)  # 0.95 of 40 are 38
def test_prompts_of_about_one_length_are_not_packed(lengths, packs, rng_seed):
    lm = LanguageModel(make_model(seed=rng_seed))
    ids, mask = pad_left([[number, *range(1, length)] for number, length in enumerate(lengths, 100)], 256)
    with attention.replacing_sdpa(lm.model):
        calls = prefill(lm, ids, mask).calls
    assert calls and all(call.packed == packs for call in calls)


def lose_lengths(monkeypatch, begin):
    """As keywords and as masks, from this layer on."""
    inner = attention._forward

    def loses(module, query, key, value, mask, *, packed_lengths=None, **kwargs):
        if module.layer_idx >= begin:
            packed_lengths, mask = None, mask if mask is None or mask.dtype == torch.bool else None
        return inner(module, query, key, value, mask, packed_lengths=packed_lengths, **kwargs)

    monkeypatch.setattr(attention, "_forward", loses)


@pytest.mark.parametrize("keeps", ["none", "some"])
def test_models_that_lose_the_lengths_are_sampled_from_all_the_same(keeps, monkeypatch, rng_seed):
    model = make_model(seed=rng_seed)
    ids, mask = pad_left([TEMPLATE + question for question in QUESTIONS], 256)
    options = {"num_samples": 3, "max_new_tokens": 6, "eos_token_id": 257, "seed": rng_seed}
    with monkeypatch.context() as patch:
        patch.setattr("pmc_fast.prefill.MOST_TOKENS", 0)
        want = Sampler(model).sample(ids, mask, **options)
    lose_lengths(monkeypatch, 0 if keeps == "none" else 1)
    sampler, passes = Sampler(model), []
    model.model.register_forward_pre_hook(
        lambda _, args, given: passes.append(given["input_ids"].shape), with_kwargs=True
    )
    for _ in range(2):
        passes.clear()
        got = sampler.sample(ids, mask, **options)
        assert_same(got, want)
        assert [shape for shape in passes if shape[1] > 5] == [ids.shape]  # padded alone; those of 5 are trials


@torch.no_grad()
def test_layers_that_lose_the_lengths_are_seen_where_nothing_is_tried(monkeypatch, rng_seed):
    lm = LanguageModel(make_model(seed=rng_seed), check=False)
    ids, mask = pad_left([TEMPLATE + question for question in QUESTIONS], 256)
    lose_lengths(monkeypatch, 1)
    with attention.replacing_sdpa(lm.model):
        filled = prefill(lm, ids, mask)
        alone = prefill(lm, ids[1:2, -12:], None)
    assert not any(call.packed for call in filled.calls)
    torch.testing.assert_close(filled.hidden[1], alone.hidden[0], rtol=1e-3, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "one", [{"layer": 0}, {"same_shape": False}, {"keys_at": 0}, {"window": 3}, {"sinks": True}, {}]
)
def test_one_call_is_enough_to_keep_decode_attention_away(one, rng_seed):
    lm = LanguageModel(make_model(seed=rng_seed))
    with attention.replacing_sdpa(lm.model):
        filled = prefill(lm, torch.tensor([[1, 2, 3]]), None)
    first, last = filled.calls
    assert _suits_decode_attention(filled.cache, Watched([first, replace(last, **one)])) == (not one)
    assert not _suits_decode_attention(filled.cache, Watched([first]))
    assert not _suits_decode_attention(filled.cache, Watched([first, last], {3}))
    assert not _suits_decode_attention(filled.cache, Watched([first, last], other_masks=True))


@torch.no_grad()
def test_padding_may_be_longer_than_all_prompts_together(rng_seed):
    lm = LanguageModel(make_model(seed=rng_seed))
    ids, mask = pad_left([[1, 2], [3]], 256)
    with attention.replacing_sdpa(lm.model):
        narrow, wide = (prefill(lm, *(nn.functional.pad(x, (more, 0)) for x in (ids, mask))) for more in (0, 9))
    assert all(call.packed for call in wide.calls)
    assert torch.equal(wide.hidden, narrow.hidden) and torch.equal(wide.padding, narrow.padding + 9)


@torch.no_grad()
def test_what_the_model_refuses_keeps_its_words(monkeypatch):
    lm = LanguageModel(make_model())

    def refuse(*_, **__):
        raise UserError("model: its attention has sinks")

    monkeypatch.setattr(type(lm.backbone), "forward", refuse)
    with pytest.raises(UserError, match="^model: its attention has sinks$"):
        prefill(lm, torch.tensor([[1, 2, 3]]), None)


@torch.no_grad()
@pytest.mark.parametrize("error", [AttributeError, TypeError, ValueError])
def test_what_layers_with_states_of_their_own_raise_is_explained(error, monkeypatch):
    lm = LanguageModel(make_model())

    def fail(*_, **__):
        raise error("no states")

    monkeypatch.setattr(type(lm.backbone), "forward", fail)
    message = rf"^model: LlamaForCausalLM does not run over the cache it is given \({error.__name__}: no states\)"
    with pytest.raises(UserError, match=message):
        prefill(lm, torch.tensor([[1, 2, 3]]), None)
