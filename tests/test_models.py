"""Backbone and head against the model's own loss, for many families."""

import copy
import os
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from threading import Event, Thread

import pytest
import torch
from draws import assert_same
from tiny import FAMILIES, MORE, VOCAB, make_model, make_tokenizer
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pmc_fast import PMC, Sampler, attention
from pmc_fast.data import QA
from pmc_fast.errors import UserError
from pmc_fast.models import LanguageModel, evaluating
from pmc_fast.packing import pack


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


@pytest.mark.parametrize("put", ["hook", "pre-hook", "forward"])
def test_what_is_put_on_the_head_later_is_refused(put, rng_seed):
    """What was there before, and only watches, stays."""
    model = make_model(seed=rng_seed)
    model.lm_head.register_forward_hook(lambda *_: None)
    lm, packed = LanguageModel(model), pack([[1, 2]], [[3]])
    packed.hidden(lm)
    if put == "forward":
        model.lm_head.forward = lambda hidden, forward=model.lm_head.forward: 2 * forward(hidden)
    elif put == "hook":
        model.lm_head.register_forward_hook(lambda module, args, logits: 2 * logits)
    else:
        model.lm_head.register_forward_pre_hook(lambda module, args: 2 * args[0])
    for call in (lambda: packed.hidden(lm), lambda: lm.head, lambda: lm.hidden(torch.tensor([[1]]))):
        with pytest.raises(UserError, match="^model: got a hook or a forward put on its head after"):
            call()


def test_soft_caps_by_any_name(rng_seed):
    """Far above the logits they move them by little, which is noticed all the same."""
    model = make_other("recurrent_gemma", rng_seed)
    lm, ids = LanguageModel(model), torch.tensor([[1, 2, 3]])
    want = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(lm.head.logprob(lm.hidden(ids)[0, :-1], ids[0, 1:]), want, rtol=1e-5, atol=1e-5)
    model = make_model(seed=rng_seed)
    cap = 12 * float(model(input_ids=ids).logits.detach().abs().max())
    model.lm_head.register_forward_hook(lambda module, args, logits: cap * torch.tanh(logits / cap))
    with pytest.raises(UserError, match="computes its logits in a way this version does not know"):
        LanguageModel(model)


def test_a_head_of_another_width_is_refused(rng_seed):
    model = make_model(seed=rng_seed)
    model.lm_head = nn.Linear(12, VOCAB)
    model.lm_head.register_forward_pre_hook(lambda module, args: args[0][..., :12])  # as ELECTRA's projects them
    with pytest.raises(UserError, match=r"does not know \(its backbone gives 32 values, its head takes 12\)$"):
        LanguageModel(model)


def test_a_model_without_a_linear_head_is_refused():
    with pytest.raises(UserError, match="model: got Linear"):
        LanguageModel(nn.Linear(VOCAB, 3))
    for wrong, got in (("llama", "'llama'"), (None, "None"), (make_tokenizer(), "a value of type ")):
        with pytest.raises(
            UserError, match=f"^model: got {got}.*, expected a transformers causal language model, as Auto"
        ):
            LanguageModel(wrong)


SMALL = {"vocab_size": VOCAB, "max_position_embeddings": 64}
OTHERS = {
    "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "falcon_h1": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
    },
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "minimax": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2,
    },
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},  # a part of its configuration names no attention
    "recurrent_gemma": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "lru_width": 32, "attention_window_size": 6,
    },
}  # fmt: skip


def make_other(family, seed, dtype=torch.float32, **changes):
    """Of a family whose modules cannot do all that is asked of them."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[family](**{**SMALL, **OTHERS[family], **changes}), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*OTHERS])
def test_sequences_that_would_see_one_another_are_rows(family, dtype, rng_seed):
    """Packed they would be wrong, as they are where nothing is tried."""
    model = make_other(family, rng_seed, dtype)
    lm, packed = LanguageModel(model), pack([[1, 2], [3]], [[4], [5, 6, 7]])
    got = packed.hidden(lm)
    assert lm.packed_by == "padded rows"
    alone = [lm.hidden(torch.tensor([ids]))[0] for ids in ([1, 2], [3, 5, 6])]
    assert got.dtype == dtype
    bound = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(got, torch.cat([alone[0][-1:], alone[1]]), **bound)
    if lm.unpackable.endswith("position_ids"):
        lm = LanguageModel(model, check=False)
        first, second = packed.hidden(lm), pack([[3], [1, 2]], [[5, 6, 7], [4]]).hidden(lm)
        assert not torch.allclose(first, second.roll(1, 0), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("family", [*OTHERS])
def test_gradients_of_rows(family, rng_seed):
    """Prompts begin alike, which are not held once."""
    model = make_other(family, rng_seed)
    prompts, answers = [[*range(9), 1], [*range(9), 2, 3]], [[4, 5], [6]]
    alone = [
        model.base_model(input_ids=torch.tensor([p + a])).last_hidden_state[0, len(p) - 1 : -1]
        for p, a in zip(prompts, answers, strict=True)
    ]
    want = torch.cat(alone)
    up = torch.randn_like(want)
    parameters = [p for p in model.base_model.parameters()]
    wants = torch.autograd.grad(want, parameters, up, allow_unused=True)
    packed = pack(prompts, answers)
    assert packed.lengths.shared == 9
    got = torch.autograd.grad(packed.hidden(LanguageModel(model)), parameters, up, allow_unused=True)
    for mine, its in zip(got, wants, strict=True):
        assert (mine is None) == (its is None)
        if its is not None:
            torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_models_that_can_be_packed(family, dtype, rng_seed):
    assert LanguageModel(make_model(family, seed=rng_seed).to(dtype)).unpackable is None


@pytest.fixture
def tried(monkeypatch):
    """The models whose sequences were tried together."""
    why_not_packed, models = LanguageModel._why_not_packed, []

    def trying(lm):
        models.append(lm.model)
        return why_not_packed(lm)

    monkeypatch.setattr(LanguageModel, "_why_not_packed", trying)
    return models


class Mixing(nn.Module):
    """Gives a token a little of the one before it."""

    def __init__(self, inner, share):
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, x):
        return self.inner(x) + self.share * nn.functional.pad(x[:, :-1], (0, 0, 1, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_weak_mixing_is_seen(family, dtype, rng_seed):
    """Which changes nothing that comparing values would notice; of frozen weights, under inference mode."""
    model = make_model(family, seed=rng_seed).to(dtype).requires_grad_(False)
    assert LanguageModel(model).unpackable is None
    norm, weak = model.model.layers[0].input_layernorm, LanguageModel(model)
    model.model.layers[0].input_layernorm = Mixing(norm, 1e-6)
    with torch.inference_mode():
        assert "mixes tokens" in weak.unpackable
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weak_mixing_is_seen_while_sampling(tried, rng_seed):
    """When linear layers are replaced by ones without gradients."""
    model = make_model(seed=rng_seed)
    attention = model.model.layers[0].self_attn
    attention.o_proj = Mixing(attention.o_proj, 1e-6)
    alike = torch.tensor([[*range(1, 10)], [*range(1, 9), 10]])
    Sampler(model).sample(alike, max_new_tokens=2, eos_token_id=257)
    assert "mixes tokens" in LanguageModel(model).unpackable and tried == [model]


def test_a_model_that_sees_ahead_is_refused(rng_seed):
    """Packed it would not."""
    torch.manual_seed(rng_seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    for decodes in (True, False):
        config = CONFIG_MAPPING["bert-generation"](**SMALL, **sizes, is_decoder=decodes)
        lm = LanguageModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
        with nullcontext() if decodes else pytest.raises(UserError, match="^model: BertGenerationDecoder sees later"):
            pack([[1, 2], [3]], [[4], [5]]).hidden(lm)
        with nullcontext() if decodes else pytest.raises(UserError, match="^model: BertGenerationDecoder sees later"):
            PMC(lm.model, make_tokenizer())
        with nullcontext() if decodes else pytest.raises(UserError, match="^model: BertGenerationDecoder sees later"):
            Sampler(lm).sample(torch.tensor([[1, 2]]), max_new_tokens=2, eos_token_id=257)


def test_a_model_that_sees_ahead_with_tokens_first_is_refused(rng_seed):
    """XLNet embeds them so, [T, 1, D]."""
    torch.manual_seed(rng_seed)
    config = CONFIG_MAPPING["xlnet"](vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48)
    lm = LanguageModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    with pytest.raises(UserError, match="^model: XLNetLMHeadModel sees later tokens"):
        pack([[1, 2]], [[3]]).hidden(lm)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_attention_of_another_kind_is_left_alone(family, monkeypatch, rng_seed):
    """That weighs by more than this library's attention knows of."""
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def biased(module, query, key, value, mask, **kwargs):
        out, weights = inner(module, query, key, value, mask, **kwargs)
        return out * 1.5, weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", biased)
    model = make_model(family, seed=rng_seed)
    want = torch.cat(
        [model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, 1:] for ids in ([1, 2], [3, 4, 5])]
    )
    lm = LanguageModel(model)
    got = pack([[1, 2], [3, 4]], [[6], [5, 7]]).hidden(lm)
    assert lm.unpackable.endswith("attends in a way this version does not know") and lm.packed_by == "padded rows"
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_attention_that_is_given_more_is_its_own(rng_seed):
    """Neither sampling nor training puts this library's in its place; what all models hand on does not count."""
    for given, known in (({"position_ids": torch.arange(3)[None]}, True), ({"indices": torch.ones(1)}, False)):
        model = make_model(seed=rng_seed)
        layer = model.model.layers[1].self_attn
        layer.forward = lambda *args, _layer=layer, _given=given, **kwargs: type(_layer).forward(
            _layer, *args, **{**kwargs, **_given}
        )
        lm = LanguageModel(model)
        assert lm.attends_as_known == known
        drawn = Sampler(lm).sample(torch.tensor([[1, 2], [3, 4]]), max_new_tokens=3, eos_token_id=257, seed=rng_seed)
        assert drawn.count > 0 and lm.attends_as_known == known
        assert (lm.unpackable is None) == known
        if not known:
            assert "its attention is given indices, which this version does not know" in lm.unpackable


def test_modules_without_a_backward_pass_are_compared_alone(monkeypatch, rng_seed):
    model = make_model(seed=rng_seed)
    norm = model.model.norm
    norm.forward = lambda x, forward=norm.forward: forward(x).detach()
    assert LanguageModel(model).unpackable is None
    assert LanguageModel(make_other("bart", rng_seed)).unpackable
    with torch.inference_mode():
        assert LanguageModel(make_model(seed=rng_seed)).unpackable is None


def test_modules_that_fail_at_a_packed_batch_do_so_alone(monkeypatch, rng_seed):
    model = make_model("llama", seed=rng_seed)
    forward = type(model.model).forward

    def short(self, input_ids=None, packed_lengths=None, **options):
        if packed_lengths is not None:
            raise IndexError("too many")
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(model.model), "forward", short)
    lm = LanguageModel(model)
    pack([[1], [2]], [[3], [4]]).hidden(lm)
    assert lm.packed_by == "padded rows"
    assert lm.unpackable == "LlamaForCausalLM fails at a packed batch (IndexError: too many)"


def test_sequences_are_tried_together_before_the_first_packed_batch(tried, rng_seed):
    lm = LanguageModel(model := make_model(seed=rng_seed).train())
    sampler, options = Sampler(lm), {"max_new_tokens": 2, "eos_token_id": 257}
    sampler.sample(torch.tensor([[1, 2], [3, 4]]), **options)  # which do not begin alike
    assert tried == []
    alike = torch.tensor([[*range(1, 10)], [*range(1, 9), 10]])
    sampler.sample(alike, **options)
    pack([[1, 2], [3]], [[3], [4]]).hidden(lm).sum().backward()
    assert tried == [model] and model.training
    Sampler(model).sample(alike, **options)
    assert tried == [model]  # whoever wraps it
    other, packed = LanguageModel(make_model(seed=rng_seed)), pack([[1, 2], [3]], [[3], [4]])
    torch.compile(lambda: packed.hidden(other), backend="eager")()
    assert tried == [model, other.model]


def test_who_samples_asks_while_another_thread_waits_to_try(monkeypatch, rng_seed):
    lm, why_not_packed = LanguageModel(make_model(seed=rng_seed)), LanguageModel._why_not_packed
    waits, answers = Event(), []

    def trying(lm):
        waits.set()
        return why_not_packed(lm)

    def ask():
        answers.append(lm.unpackable)

    def ask_in_turn():
        with lm.turn:
            other.start()
            waits.wait()
            ask()

    monkeypatch.setattr(LanguageModel, "_why_not_packed", trying)
    one, other = (Thread(target=target, daemon=True) for target in (ask_in_turn, ask))
    one.start()
    one.join(60)
    assert not one.is_alive()
    other.join(60)
    assert answers == [None, None]


def test_one_sequence_may_be_packed_whatever_the_model(rng_seed):
    model = make_other("falcon_h1", rng_seed)
    got = pack([[1, 2]], [[3, 4]]).hidden(LanguageModel(model))
    want = model.base_model(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state[0, 1:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_sampled_from_says_why(rng_seed):
    ids, options = torch.tensor([[1, 2], [3, 4]]), {"max_new_tokens": 3, "eos_token_id": 257}
    with pytest.raises(
        UserError, match="^model: RecurrentGemmaForCausalLM does not go on from its cache as from the text"
    ):
        Sampler(make_other("recurrent_gemma", rng_seed)).sample(ids, **options)
    with pytest.raises(UserError, match="^model: MiniMaxForCausalLM does not run over the cache it is given"):
        Sampler(make_other("minimax", rng_seed)).sample(ids, **options)
    with pytest.raises(UserError, match="^model: it does not fill the key/value cache"):
        Sampler(make_other("bart", rng_seed, encoder_layers=3)).sample(ids, **options)
    bart = Sampler(make_other("bart", rng_seed))
    bart.sample(ids, **options)
    with pytest.raises(UserError, match="^attention_mask: got padding, but BartForCausalLM takes a token's place"):
        bart.sample(ids, torch.tensor([[1, 1], [0, 1]]), **options)


@pytest.mark.parametrize("held_by", ["another thread", "nobody", "the thread that forks"])
def test_in_a_process_that_is_forked(held_by, rng_seed):
    """The other thread is not there to change the model back; the child neither waits for it nor goes on."""
    lm = LanguageModel(make_model(seed=rng_seed))
    with ThreadPoolExecutor(1) as pool, ExitStack() as held:
        if held_by == "another thread":
            pool.submit(lm.turn.acquire).result()
        if held_by == "the thread that forks":
            held.enter_context(lm.turn)
        child = os.fork()
        if not child:
            signal.alarm(30)
            try:
                with lm.turn:
                    os._exit(1)
            except UserError as error:
                os._exit(2 if "when this process was forked" in str(error) else 3)
        if held_by == "another thread":
            pool.submit(lm.turn.release).result()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (2 if held_by == "another thread" else 1)
    with lm.turn:
        pass  # the parent is as it was


@pytest.mark.parametrize("fails", [False, True])
def test_each_parts_own_attention_comes_back(fails):
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": VOCAB, "model_type": "llama"}
    vision = {**text, "image_size": 8, "patch_size": 4, "model_type": "clip_vision_model"}
    config = CONFIG_MAPPING["llava"](text_config=text, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.set_attn_implementation({"": "sdpa", "text_config": "sdpa", "vision_config": "eager"})

    def used():
        return [part._attn_implementation for part in (config, config.text_config, config.vision_config)]

    with pytest.raises(KeyError) if fails else nullcontext(), attention.replacing_sdpa(model):
        assert used() == [attention.NAME] * 3
        if fails:
            raise KeyError
    assert used() == ["sdpa", "sdpa", "eager"]


@pytest.mark.parametrize("copied", ["before", "after"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_copied_layer_has_a_configuration_of_its_own(family, copied, rng_seed):
    """Which the model does not tell of another attention."""
    model, plain = (make_model(family, seed=rng_seed) for _ in range(2))
    layers, lm = model.model.layers, LanguageModel(model) if copied == "after" else None
    layers[1] = copy.deepcopy(layers[1])
    lm, packed = lm or LanguageModel(model), pack([[1, 2], [3]], [[4], [5, 6]])
    ids, options = torch.tensor([[1, 2, 3]]), {"num_samples": 3, "max_new_tokens": 4, "eos_token_id": 257}
    assert_same(Sampler(lm).sample(ids, **options), Sampler(plain).sample(ids, **options))
    assert layers[1].self_attn.config._attn_implementation == "sdpa"
    torch.testing.assert_close(packed.hidden(lm), packed.hidden(LanguageModel(plain)))
    torch.testing.assert_close(lm.hidden(ids), LanguageModel(plain).hidden(ids))


def test_evaluating_restores_each_modules_mode():
    model = make_model("llama").train()
    model.model.layers[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training


def test_weights_without_numbers_are_refused(rng_seed):
    with pytest.raises(UserError, match="^model: got weights on the meta device, which hold no numbers"):
        LanguageModel(make_model(seed=rng_seed).to("meta"))


@torch.no_grad()
def test_a_copy_is_a_model_of_its_own(rng_seed):
    pmc = PMC(make_model(seed=rng_seed), make_tokenizer())
    pmc.initialise(["Who?"], answers=["Ada"])
    for other in (copy.deepcopy(pmc), pickle.loads(pickle.dumps(pmc))):
        assert other.state_dict() == pmc.state_dict()
        other.lm.model.get_output_embeddings().weight.zero_()
        assert other.supervised_loss([QA("a", "b")]) != pmc.supervised_loss([QA("a", "b")])
