"""A packed batch against each sequence on its own."""

import pytest
import torch
from tiny import FAMILIES, MORE, checkpoint_activations, make_model

from pmc_fast import Sampler, attention, packed_attention
from pmc_fast.models import LanguageModel
from pmc_fast.packing import pack, pad_left


def _rows(count):
    prompts = [torch.randint(0, 256, (int(torch.randint(1, 9, ())),)).tolist() for _ in range(count)]
    answers = [torch.randint(0, 256, (int(torch.randint(1, 12, ())),)).tolist() for _ in range(count)]
    return prompts, answers


@pytest.mark.parametrize("shared", [0, 3, 13])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_equals_each_sequence_alone(family, shared, monkeypatch, rng_seed):
    monkeypatch.setattr("pmc_fast.packing.LEAST_SHARED", 3)
    model = make_model(family, seed=rng_seed)
    prompts, answers = _rows(5)
    begin = torch.randint(0, 256, (shared,)).tolist()
    prompts = [begin + [number, *prompt] for number, prompt in enumerate(prompts)]
    alone = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer])
        alone.append(
            model(input_ids=ids)
            .logits[0, len(prompt) - 1 : -1]
            .log_softmax(-1)
            .gather(1, ids[0, len(prompt) :, None])[:, 0]
        )
    expected = torch.cat(alone)
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    lm = LanguageModel(model)
    packed = pack(prompts, answers)
    assert packed.lengths.shared == shared
    assert packed.input_ids.numel() == sum(map(len, prompts)) + sum(map(len, answers)) - 5 - 4 * shared
    logprob = lm.head.logprob(packed.hidden(lm), packed.target)
    torch.testing.assert_close(logprob, expected, rtol=1e-4, atol=1e-4)
    logprob.sum().backward()
    for name, parameter in model.named_parameters():
        # Those of Gemma 4's six layers reach 100.
        bound = 2e-4 * (max(1, float(gradients[name].abs().max())) if family == "gemma4_text" else 1)
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=2e-3, atol=bound, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "stablelm", "nemotron"])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant, rng_seed):
    """Attention runs again in the backward pass, when the packed forward pass is over."""
    model = make_model(family, seed=rng_seed).train()
    packed = pack(*_rows(4))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model, {"use_reentrant": reentrant})
        model.zero_grad()
        lm = LanguageModel(model)
        lm.head.logprob(packed.hidden(lm), packed.target).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("options", [{}, {"scaling": 0.3, "softcap": 2.0}, {"sliding_window": 4}], ids=str)
def test_one_call_for_all_sequences_is_worth_one_for_each(options, shared, monkeypatch, rng_seed):
    lengths = attention.PackedLengths(shared, (9, 1, 13))
    inputs = [torch.randn(1, heads, shared + 23, 8, requires_grad=True) for heads in (6, 2, 2)]
    upstream, calls, found = torch.randn(1, shared + 23, 6, 8), [], []

    def counted(*arguments, **keywords):
        calls.append(arguments)
        return packed_attention(*arguments, **keywords)

    monkeypatch.setattr(attention, "packed_attention", counted)
    for dropout in (0.0, 1e-30):  # that drops nothing
        out, _ = attention._forward(None, *inputs, None, packed_lengths=lengths, dropout=dropout, **options)
        found.append([out, *torch.autograd.grad(out, inputs, upstream)])
    assert len(calls) == 1
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtypes", [[torch.float16] * 3, [torch.float32, torch.float32, torch.bfloat16]], ids=str)
def test_other_dtypes_than_the_kernels_are_left_to_torch(dtypes, monkeypatch, rng_seed):
    monkeypatch.setattr(attention, "packed_attention", None)
    inputs = [torch.randn(1, 2, 7, 8).to(dtype) for dtype in dtypes]
    lengths = attention.PackedLengths(0, (3, 4))
    with torch.autocast("cpu", enabled=dtypes[0] == torch.float32):
        out, _ = attention._forward(None, *inputs, None, packed_lengths=lengths)
    assert out.shape == (1, 7, 2, 8) and out.dtype == dtypes[2]


def test_masks_of_sequences_are_parts_of_one():
    """One for each length would stay: 64 MB for 8192 tokens."""
    attention._square.cache_clear()
    device = torch.device("cpu")
    for keys in (1, 2, 9, 63, 64, 65, 130):
        for tokens in {1, max(1, keys // 2), keys}:
            for window in (None, 1, 5, keys, 200):
                mask = attention._seen(tokens, keys, window, device)
                query, key = torch.arange(keys - tokens, keys)[:, None], torch.arange(keys)
                assert torch.equal(mask, (key <= query) & (query - key < (window or keys)))
    masks = [attention._seen(keys, keys, None, device) for keys in range(65, 129)]
    assert len({mask.untyped_storage().data_ptr() for mask in masks}) == 1
    assert attention._square.cache_info().maxsize <= 4


def test_what_prompts_have_in_common():
    begin, answers = list(range(20)), [[1], [2, 3]]
    assert pack([[*begin, 50], [*begin, 51]], answers).lengths == (20, (1, 2))
    assert pack([begin, begin], answers).lengths == (19, (1, 2))  # the last token predicts a label
    assert pack([begin, [*begin, 7]], answers).lengths == (19, (1, 3))
    assert pack([begin[:8], begin[:8]], answers).lengths == (0, (8, 9))  # 7 are too few
    assert pack([[9, *begin], begin], answers).lengths == (0, (21, 21))
    assert pack([begin], [[1, 2]]).lengths == (0, (21,))  # nobody to share with


def test_nothing_padded_is_a_batch_of_token_ids():
    ids, mask = pad_left([[], []], 256)
    assert ids.shape == mask.shape == (2, 0) and ids.dtype == mask.dtype == torch.int64


def test_an_installed_model_still_answers_padded_batches_as_before(rng_seed):
    model = make_model("llama", seed=rng_seed)
    ids, mask = pad_left([[1, 2, 3], [4, 5, 6, 7, 8]], 256)
    expected = model(input_ids=ids, attention_mask=mask).logits
    lm = LanguageModel(model)
    pack([[1]], [[2]]).hidden(lm)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])


def test_an_installed_model_still_answers_a_single_token(rng_seed):
    """Which sees itself: with a soft cap it needs no mask."""
    model, ids = make_model("gemma2", seed=rng_seed), torch.tensor([[5]])
    expected = model(input_ids=ids).logits
    attention.install(model)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("gpt_oss" not in MORE, reason="transformers has no gpt-oss")
def test_sinks_weigh_in_an_installed_models_other_calls_too(rng_seed):
    model, ids = (
        make_model("gpt_oss", seed=rng_seed),
        torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [5, 6, 7, 8, 9, 10, 11, 12]]),
    )
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"num_samples": 3, "max_new_tokens": 9, "eos_token_id": 257, "seed": rng_seed}
    logits, drawn = model(input_ids=ids, attention_mask=mask).logits, Sampler(model).sample(ids, mask, **options)
    attention.install(model)
    assert model.config._attn_implementation == attention.NAME
    seen = mask.bool()
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=mask).logits[seen], logits[seen], rtol=1e-4, atol=1e-5
    )
    again = Sampler(model).sample(ids, mask, **options)
    assert torch.equal(again.tokens, drawn.tokens)
    torch.testing.assert_close(again.logprobs, drawn.logprobs, rtol=1e-4, atol=1e-4)


def test_an_installed_model_drops_attention_in_training_as_before(rng_seed):
    model, ids = make_model("llama", seed=rng_seed, attention_dropout=0.5).train(), torch.tensor([[1, 2, 3, 4, 5]])
    pack([[1]], [[2]]).hidden(LanguageModel(model))
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_lengths_and_windows_go_through_masks():
    lengths = attention.PackedLengths(3, (2, 4))
    for window in (None, 5):
        mask = attention._as_mask(lengths, window)
        assert attention._lengths_of(mask) == lengths and attention._window_of(mask) == window


@pytest.mark.parametrize("check", [True, False])
def test_a_model_that_hands_on_neither_keywords_nor_masks_runs_rows(check, monkeypatch, rng_seed):
    inner = attention._forward

    def loses(module, query, key, value, mask, *, packed_lengths=None, **kwargs):
        return inner(module, query, key, value, mask if mask is None or mask.dtype == torch.bool else None, **kwargs)

    packed = pack([[1, 2], [7]], [[3], [4]])
    want = packed.hidden(LanguageModel(make_model(seed=rng_seed)))
    monkeypatch.setattr(attention, "_forward", loses)
    monkeypatch.setattr("pmc_fast.packed_layers.hidden_of", lambda *_: None)  # which attends by itself
    for only in (packed, pack([[1, 2]], [[3]])):
        lm = LanguageModel(make_model(seed=rng_seed), check)
        torch.testing.assert_close(only.hidden(lm), want[: len(only.rows)], rtol=1e-4, atol=1e-5)
        assert lm.packed_by == "padded rows"


def test_bad_input():
    with pytest.raises(ValueError, match="answers: got 0, expected 1"):
        pack([[1]], [])
    with pytest.raises(ValueError, match="^prompts: got none, expected at least one"):
        pack([], [])
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        pack([[1], []], [[2], [3]])
    one, wanted = [[1]], "expected a list of lists of token ids"
    for wrong, message in (
        (torch.tensor([[1, 2]]), f"got a value of type Tensor, {wanted}"),
        ("ab", f"got 'ab', {wanted}"),
        ((ids for ids in one), f"got a value of type generator, {wanted}"),
        (
            [torch.tensor([1, 2])],
            r"row 0 is a value of type Tensor, expected a list of token ids \(of a tensor, its tolist",
        ),
        ([1], "row 0 is 1, expected a list of token ids"),
        (["ab"], "row 0 is 'ab', expected a list of token ids"),
        ([[0, 1.5]], r"row 0 is \[0, 1.5\], expected integers"),
    ):
        with pytest.raises(TypeError, match=f"^prompts: {message}"):
            pack(wrong, one)
        with pytest.raises(TypeError, match=f"^answers: {message}"):
            pack(one, wrong)
