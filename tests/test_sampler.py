"""The sampler against transformers' own greedy answers, the exact distribution, and itself in other company."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from distribution import assert_follows
from draws import assert_same, part
from tiny import FAMILIES, MORE, VOCAB, make_model
from transformers import BatchEncoding
from transformers.masking_utils import create_causal_mask

from pmc_fast import attention, decode_attention, prefill
from pmc_fast.cache import SampleCache, argument_of, layers_of
from pmc_fast.integrations.samplers import GenerateSampler
from pmc_fast.packing import pad_left
from pmc_fast.running_rows import placed
from pmc_fast.sampler import Sampler

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [20, 21]]


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_greedy_equals_generate(family, rng_seed):
    model = make_model(family, seed=rng_seed)
    ids, mask = pad_left(PROMPTS, 256)
    samples = Sampler(model).sample(ids, mask, max_new_tokens=13, temperature=0.0, eos_token_id=257)
    expected = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=13, do_sample=False, eos_token_id=257, pad_token_id=256
    )[:, ids.shape[1] :]
    for row in range(len(PROMPTS)):
        length = int(samples.lengths[row, 0])
        assert samples.tokens[row, 0, :length].tolist() == expected[row, :length].tolist()


@pytest.mark.parametrize("same_length", [False, True])
def test_masks_of_somebodys_own_are_kept(same_length, monkeypatch, rng_seed):
    near = partial(create_causal_mask, and_mask_function=lambda batch, head, query, key: query - key < 3)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", near)
    model = make_model("llama", seed=rng_seed)
    ids, mask = pad_left([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]] if same_length else PROMPTS, 256)
    samples = Sampler(model).sample(ids, mask, max_new_tokens=9, temperature=0.0, eos_token_id=300)
    options = {
        "attention_mask": mask,
        "max_new_tokens": 9,
        "do_sample": False,
        "eos_token_id": 300,
        "pad_token_id": 256,
    }
    assert torch.equal(samples.tokens[:, 0], model.generate(input_ids=ids, **options)[:, ids.shape[1] :])


@pytest.mark.parametrize("prompts", [PROMPTS, [[*range(9), *prompt] for prompt in PROMPTS]])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])  # decoded by this library's kernels, by modules
def test_whatever_torchs_default_device_is(family, prompts, rng_seed):
    sampler, options = Sampler(make_model(family, seed=rng_seed)), {"max_new_tokens": 9, "eos_token_id": 257}
    ids, mask = pad_left(prompts, 256)
    expected = sampler.sample(ids, mask, num_samples=3, seed=rng_seed, **options)
    with torch.device("meta"):
        got = sampler.sample(ids, mask, num_samples=3, seed=rng_seed, **options)
    assert_same(got, expected)


@pytest.mark.parametrize("whose", ["one sampler", "samplers", "samplers of wrapped models"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])  # decoded by this library's kernels, by modules
def test_threads_draw_what_each_draws_alone(family, whose, rng_seed):
    model = make_model(family, seed=rng_seed)
    if whose == "samplers of wrapped models":
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    one = Sampler(model)

    def draw(number):
        sampler = one if whose == "one sampler" else Sampler(model if whose == "samplers" or number % 2 else wrapped)
        torch.set_grad_enabled(number % 2 == 0)  # of a thread's own
        ids = torch.full((3, 4 + number % 3), 7 + number)
        drawn = sampler.sample(ids, num_samples=4, max_new_tokens=20, temperature=1.2, eos_token_id=257, seed=number)
        return drawn.tokens, drawn.logprobs

    with torch.no_grad():
        alone = [draw(number) for number in range(6)]
    torch.set_grad_enabled(True)
    with ThreadPoolExecutor(max_workers=6) as pool:
        together = list(pool.map(draw, range(6)))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_call_within_a_call(rng_seed):
    """Its thread has its turn already."""
    sampler, within = Sampler(make_model(seed=rng_seed)), []
    options = {"num_samples": 20, "max_new_tokens": 3, "eos_token_id": 257}
    sampler.sample(torch.tensor([[5, 6]]), **options, progress=lambda _: within.append(Sampler(sampler.lm.model)))
    assert within


TRUNCATIONS = [
    {"top_p": 0.95},
    {},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "min_p": 0.2},
    {"temperature": 1.25, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
]


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_company_and_retirement_do_not_change_an_answer(family, truncation, rng_seed):
    model = make_model(family, seed=rng_seed)
    ends = list(range(0, VOCAB, 9))  # many tokens end an answer, so rows retire all the time
    options = {"num_samples": 7, "max_new_tokens": 15, "eos_token_id": ends, "seed": rng_seed, **truncation}
    streams = torch.randperm(9)[: len(PROMPTS)]

    def sampled(rows):
        ids, mask = pad_left([PROMPTS[row] for row in rows], 256)
        return Sampler(model).sample(ids, mask, sequence_ids=streams[rows], **options)

    together = sampled([0, 1, 2, 3])
    assert len(together.lengths.unique()) > 1
    for rows in ([0], [1], [2], [3], torch.randperm(4)[:3].tolist()):
        some = sampled(rows)
        assert_same(some, part(together, rows), rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompts", [PROMPTS, [[1, 2, 3]]], ids=["padded", "one prompt"])
def test_decode_attention_takes_the_place_of_torchs(family, prompts, monkeypatch, rng_seed):
    model, calls = make_model(family, seed=rng_seed), []
    if family == "gemma2":  # transformers gives it eager attention, training this library's
        attention.install(model)
    theirs = model.config._attn_implementation
    ids, mask = pad_left(prompts, 256)
    options = {"num_samples": 3, "max_new_tokens": 12, "eos_token_id": 257, "seed": rng_seed, "top_p": 0.95}

    def watched(*args, **kwargs):
        calls.append(1)
        return decode_attention(*args, **kwargs)

    monkeypatch.setattr(attention, "decode_attention", watched)
    monkeypatch.setattr("pmc_fast.running_rows.fused_decoder", lambda *args: None)
    fast = Sampler(model).sample(ids, mask, **options)
    assert calls and model.config._attn_implementation == theirs
    calls.clear()
    model.set_attn_implementation("eager")  # not torch's: left as it is
    slow = Sampler(model).sample(ids, mask, **options)
    assert not calls and model.config._attn_implementation == "eager"
    assert_same(fast, slow)


def test_where_no_kernel_attends_torchs_attention_goes_on(monkeypatch, rng_seed):
    model = make_model(seed=rng_seed).double()
    monkeypatch.setattr(attention, "decode_attention", lambda *_, **__: pytest.fail("of this library"))
    ids, mask = pad_left(PROMPTS, 256)
    samples = Sampler(model).sample(ids, mask, max_new_tokens=5, temperature=0.0, eos_token_id=300)
    expected = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=300, pad_token_id=256
    )
    assert torch.equal(samples.tokens[:, 0], expected[:, ids.shape[1] :])


def test_lengths_finished_and_logprobs(rng_seed):
    model = make_model("llama", seed=rng_seed)
    ends = list(range(0, VOCAB, 7))
    prompt = torch.tensor([[1, 2, 3]])
    samples = Sampler(model).sample(
        prompt, num_samples=25, max_new_tokens=9, eos_token_id=ends, seed=rng_seed, temperature=0.8, top_k=40
    )
    for tokens, length, finished, logprobs in zip(
        samples.tokens[0], samples.lengths[0], samples.finished[0], samples.logprobs[0], strict=True
    ):
        answer = tokens[:length]
        inside = torch.isin(answer, torch.tensor(ends))
        assert bool(inside[-1]) == bool(finished) and not inside[:-1].any()
        assert finished or length == 9
        full = model(input_ids=torch.cat([prompt[0], answer])[None]).logits[0, 2:-1].log_softmax(-1)
        torch.testing.assert_close(logprobs[:length], full.gather(1, answer[:, None])[:, 0], rtol=1e-4, atol=1e-4)
        assert not logprobs[length:].any() and (tokens[length:] == ends[0]).all()
    assert samples.count == int(samples.lengths.sum())


def test_first_tokens_follow_the_exact_distribution(rng_seed):
    model = make_model("llama", seed=rng_seed)
    prompt = torch.tensor([[7, 8, 9]])
    draws = 4000
    samples = Sampler(model).sample(
        prompt, num_samples=draws, max_new_tokens=1, eos_token_id=257, seed=rng_seed, temperature=1.1, top_k=30
    )
    probability = (model(input_ids=prompt).logits[0, -1].double() / 1.1).topk(30)
    expected = torch.zeros(VOCAB, dtype=torch.double).scatter(0, probability.indices, probability.values.softmax(0))
    assert_follows(samples.tokens[0, :, 0].bincount(minlength=VOCAB), expected)


def test_max_length_counts_the_padded_prompt(rng_seed):
    sampler, (ids, mask) = Sampler(make_model(seed=rng_seed)), pad_left(PROMPTS, 256)
    options = {"num_samples": 3, "eos_token_id": 257, "seed": rng_seed}
    for tokens in (1, 4):
        got = sampler.sample(ids, mask, max_length=ids.shape[1] + tokens, **options)
        want = sampler.sample(ids, mask, max_new_tokens=tokens, **options)
        assert torch.equal(got.tokens, want.tokens) and torch.equal(got.lengths, want.lengths)


@pytest.mark.parametrize("family", ["llama", "mixtral"])  # decoded by this library's kernels, by modules
def test_progress_is_how_many_answers_go_on(family, rng_seed):
    told, ends = [], list(range(0, VOCAB, 5))
    options = {"num_samples": 9, "max_new_tokens": 6, "eos_token_id": ends, "seed": rng_seed}
    samples = Sampler(make_model(family, seed=rng_seed)).sample(
        *pad_left(PROMPTS, 256), progress=told.append, **options
    )
    longest = int(samples.lengths.max())
    assert told == [int((samples.lengths > step).sum()) for step in range(1, longest)]


def test_every_prompt_may_have_a_limit_of_its_own(rng_seed):
    model = make_model(seed=rng_seed)
    ids, mask = pad_left(PROMPTS, 256)
    options = {"num_samples": 3, "eos_token_id": 257, "seed": rng_seed}
    whole = Sampler(model).sample(ids, mask, max_new_tokens=9, **options)
    limits = torch.tensor([2, 9, 1, 5])
    cut = Sampler(model).sample(ids, mask, max_new_tokens=limits, **options)
    for prompt, limit in enumerate(limits.tolist()):
        assert torch.equal(cut.lengths[prompt], whole.lengths[prompt].clamp(max=limit))
        assert torch.equal(cut.finished[prompt], whole.finished[prompt] & (whole.lengths[prompt] <= limit))
        for i, length in enumerate(cut.lengths[prompt].tolist()):
            assert torch.equal(cut.tokens[prompt, i, :length], whole.tokens[prompt, i, :length])
    assert not cut.pruned.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_waves_that_fit_a_budget_change_no_answer(family, monkeypatch, rng_seed):
    model, sizes = make_model(family, seed=rng_seed), []
    sampler, fill = Sampler(model), prefill.prefill
    monkeypatch.setattr("pmc_fast.sampler.prefill", lambda lm, ids, mask: sizes.append(len(ids)) or fill(lm, ids, mask))
    ids, mask = pad_left(PROMPTS, 256)
    options = {"num_samples": 3, "max_new_tokens": 8, "eos_token_id": 257, "seed": rng_seed}
    together = sampler.sample(ids, mask, **options)
    one = sampler.cache_bytes(3, ids.shape[1] + 8)
    for budget, fitting in ((one, [1, 1, 1, 1]), (4 * one - 1, [3, 1]), (4 * one, [4])):
        sizes.clear()
        waves = sampler.sample(ids, mask, cache_budget=budget, **options)
        assert sizes == fitting
        assert_same(waves, together, rtol=1e-4)
    with pytest.raises(ValueError, match=f"cache_budget: got {one - 1} bytes, expected at least {one}"):
        sampler.sample(ids, mask, cache_budget=one - 1, **options)


def test_answers_that_hardly_fit_take_turns(monkeypatch, rng_seed):
    """Where nobody gave a budget, half of what is free is no more than a wish."""
    model, (ids, mask), sizes = make_model(seed=rng_seed), pad_left(PROMPTS, 256), []
    options = {"num_samples": 3, "max_new_tokens": 8, "eos_token_id": 257, "seed": rng_seed}
    together, one = Sampler(model).sample(ids, mask, **options), Sampler(model).cache_bytes(3, ids.shape[1] + 8)
    fill = prefill.prefill
    monkeypatch.setattr("pmc_fast.sampler.prefill", lambda lm, ids, mask: sizes.append(len(ids)) or fill(lm, ids, mask))
    for free, fitting in ((0, [1, 1, 1, 1]), (2 * one, [1, 1, 1, 1]), (4 * one, [2, 2]), (8 * one, [4])):
        monkeypatch.setattr("pmc_fast.sampler.free_bytes", lambda device, free=free: free)
        sizes.clear()
        assert torch.equal(Sampler(model).sample(ids, mask, **options).tokens, together.tokens)
        assert sizes == fitting


def test_defaults(rng_seed):
    sampler, (ids, mask) = Sampler(make_model(seed=rng_seed)), pad_left(PROMPTS, 256)
    options = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0, "seed": 0, "num_samples": 1}
    options["sequence_ids"] = torch.arange(4)
    got, want = (sampler.sample(ids, mask, max_new_tokens=9, eos_token_id=257, **more) for more in ({}, options))
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.logprobs, want.logprobs)


@pytest.mark.parametrize(("family", "changes"), [*((family, {}) for family in FAMILIES), ("qwen3", {"head_dim": 16})])
@torch.no_grad()
def test_the_cache_takes_the_bytes_that_were_stated(family, changes):
    model = make_model(family, **changes)
    cache = SampleCache(layers_of(model.config), 11)
    model(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]), use_cache=True, **{argument_of(model): cache})
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == Sampler(model).cache_bytes(2, 11)


@pytest.mark.parametrize(("goes_on", "own"), [("grow", 5), ("share", 2)])
def test_rows_of_packed_texts_have_no_more_room_than_they_need(goes_on, own, rng_seed):
    cache, packed = SampleCache(1, 7), torch.randn(2, 1, 3, 7, 4)
    layer = cache.layers[0]
    layer.update(*packed)
    cache.spread(torch.tensor([[0, 1, 2], [0, 5, 6]]))
    for held, had in zip(layer.filled(), packed, strict=True):
        assert torch.equal(held, torch.stack([had[0, :, [0, 1, 2]], had[0, :, [0, 5, 6]]]))
    getattr(cache, goes_on)(6, 2)
    assert layer.keys.shape == layer.values.shape == (6, 3, own, 4)
    assert cache.get_seq_length() == 3 and layer.get_max_length() == 5


def test_training_mode_is_restored_and_dropout_is_off(rng_seed):
    model = make_model("gpt2", seed=rng_seed).train()
    prompt = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 6, "eos_token_id": 257, "seed": rng_seed}
    first = Sampler(model).sample(prompt, **options)
    assert all(module.training for module in model.modules())
    assert torch.equal(first.tokens, Sampler(model.eval()).sample(prompt, **options).tokens)


def test_autocast_changes_no_answer(rng_seed):
    model, prompt = make_model("gemma2", seed=rng_seed), torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 6, "eos_token_id": 257, "num_samples": 5, "seed": rng_seed}
    want = Sampler(model).sample(prompt, **options)
    with torch.autocast("cpu", torch.bfloat16):
        got = Sampler(model).sample(prompt, **options)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.logprobs, want.logprobs)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_torchs_default_dtype_changes_no_answer(default, fused, rng_seed):
    model, prompt = make_model("gemma2", seed=rng_seed), torch.tensor([[1, 2, 3]])
    if not fused:  # its linear layers still multiply from packed weights
        model.model.layers[0].register_forward_hook(lambda module, inputs, output: None)
    options = {"max_new_tokens": 6, "eos_token_id": 257, "num_samples": 5, "seed": rng_seed}
    want = Sampler(model).sample(prompt, **options)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = Sampler(model).sample(prompt, **options)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.logprobs, want.logprobs)


def beginnings(samples):
    """How many texts the answers had begun with when their next token was drawn, those of a prompt counted once."""
    texts = set()
    for prompt, (answers, lengths) in enumerate(zip(samples.tokens.tolist(), samples.lengths.tolist(), strict=True)):
        for answer, length in zip(answers, lengths, strict=True):
            texts.update((prompt, *answer[:end]) for end in range(1, length))
    return len(texts)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_answers_begin_with_in_common_is_decoded_once(family, rng_seed):
    model = make_model(family, seed=rng_seed)
    ids, mask = pad_left(PROMPTS, 256)
    n, ends = 6, [257, *range(0, 256, 9)]
    options = {"eos_token_id": ends, "seed": rng_seed, "top_k": 2, "max_new_tokens": torch.tensor([9, 4, 9, 7])}
    together = Sampler(model).sample(ids, mask, num_samples=n, **options)
    assert beginnings(together) == together.decoded < together.count - 4 * n
    for i in range(n):
        alone = Sampler(model).sample(ids, mask, sequence_ids=torch.arange(4) * n + i, **options)
        assert_same(alone, part(together, (slice(None), [i])))
    greedy = Sampler(model).sample(ids, mask, num_samples=n, temperature=0, **options)
    assert greedy.decoded == int((greedy.lengths[:, 0] - 1).sum())


def test_rows_that_go_on_stay_where_they_can(rng_seed):
    for _ in range(200):
        before = int(torch.randint(1, 9, ()))
        parent = torch.randint(before, (int(torch.randint(1, 12, ())),)).sort().values
        place, source, destination = placed(parent)
        held = torch.arange(12)
        held[destination] = held[source]
        assert torch.equal(held[place], parent) and torch.equal(place.sort().values, torch.arange(len(parent)))
        stay = {p for p in parent.tolist() if p < len(parent)}
        assert len(source) == len(parent) - len(stay)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "num_samples: got 0"),
        ({"num_samples": 2.5}, "num_samples: got 2.5, expected an integer"),
        ({"num_samples": True}, "num_samples: got True, expected an integer"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: got torch.float32 of shape"),
        ({"max_new_tokens": None, "max_length": 20.5}, "max_length: got torch.float32 of shape"),
        ({"max_new_tokens": None, "max_length": torch.tensor([9])}, "max_length: got torch.int64 of shape"),
        (
            {"max_new_tokens": None, "max_length": torch.tensor(2, dtype=torch.uint8)},
            "max_length: got 2, which leaves no",
        ),
        ({"max_length": 5}, "exactly one"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"max_new_tokens": torch.tensor([1, 2])}, "max_new_tokens: got torch.int64 of shape"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"eos_token_id": []}, "eos_token_id: got none"),
        ({"sequence_ids": torch.tensor([1, 2])}, "sequence_ids: got shape"),
        ({"sequence_ids": torch.tensor([-1])}, r"sequence_ids: got -1, expected integers in \[0, 4294967296\)"),
        (
            {"sequence_ids": torch.tensor([2**32 // 3]), "num_samples": 3},
            r"sequence_ids: got 1431655765, expected integers in \[0, 1431655765\), for num_samples=3",
        ),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "attention_mask: a prompt ends in padding"),
        ({"attention_mask": torch.tensor([[2, 0, 1]])}, "attention_mask: got padding behind a token in row 0"),
    ],
)
def test_bad_input(change, message):
    model, options = make_model(), {"max_new_tokens": 3, "eos_token_id": 257, **change}
    for sampler in (Sampler(model), GenerateSampler(model)):
        with pytest.raises(ValueError, match=message):
            sampler.sample(torch.tensor([[1, 2, 3]]), **options)


@pytest.mark.parametrize(("wrong", "error"), [(-1, ValueError), (2.0, TypeError), (True, TypeError), ("2", TypeError)])
def test_bytes_of_what_is_no_number(wrong, error):
    sampler = Sampler(make_model())
    for given in ({"rows": wrong, "positions": 2}, {"rows": 2, "positions": wrong}):
        name = "rows" if given["rows"] is wrong else "positions"
        with pytest.raises(error, match=f"^{name}: got {wrong!r}, expected an integer of at least 0"):
            sampler.cache_bytes(**given)
    assert sampler.cache_bytes(0, 2) == sampler.cache_bytes(2, 0) == 0


def test_no_prompts():
    model = make_model()
    for sampler in (Sampler(model), GenerateSampler(model)):
        with pytest.raises(ValueError, match="input_ids: got no prompts, expected at least one"):
            sampler.sample(torch.zeros(0, 3, dtype=torch.int64), max_new_tokens=3, eos_token_id=257)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_any_number_but_0_is_no_padding(family, rng_seed):
    model = make_model(family, seed=rng_seed)
    ids, mask = pad_left(PROMPTS, 256)
    for sampler in (Sampler(model), GenerateSampler(model)):
        options = {"max_new_tokens": 4, "temperature": 0.0, "eos_token_id": 257}
        got, want = (sampler.sample(ids, held, **options) for held in (-2 * mask, mask))
        assert torch.equal(got.tokens, want.tokens)


def test_wrong_objects():
    ids = torch.tensor([[1, 2, 3]])
    encoding = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    wrong = [
        (
            {"input_ids": encoding},
            r'input_ids: got a value of type BatchEncoding, .*give \["input_ids"\] and, as attention_mask, \["att',
        ),
        ({"input_ids": [[1, 2, 3]]}, "input_ids: got a value of type list, expected an int64 tensor"),
        ({"input_ids": ids.int()}, "input_ids: got dtype torch.int32"),
        ({"attention_mask": [[1, 1, 1]]}, "attention_mask: got a value of type list, expected a tensor"),
        ({"sequence_ids": [0]}, r"sequence_ids: got a value of type list, expected an int64 tensor \[1\] or None"),
        ({"sequence_ids": torch.tensor([0.0])}, "sequence_ids: got dtype torch.float32, expected torch.int64"),
        ({"max_new_tokens": "3"}, "max_new_tokens: got '3', expected an integer"),
        *(({"eos_token_id": eos}, "eos_token_id: got .*, expected a token id or a list") for eos in NO_ENDS),
    ]
    model = make_model()
    for change, message in wrong:
        options = {"input_ids": ids, "max_new_tokens": 3, "eos_token_id": 257, **change}
        for sampler in (Sampler(model), GenerateSampler(model)):
            with pytest.raises(TypeError, match=f"^{message}"):
                sampler.sample(**options)


NO_ENDS = (None, "</s>", 2.0, True, [257, None], torch.tensor([1.0]))


@pytest.mark.parametrize("eos", [257, [257], (257,), torch.tensor(257), torch.tensor([257]), range(257, 258)], ids=str)
def test_end_tokens_of_any_kind(eos, rng_seed):
    model, ids = make_model(seed=rng_seed), torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 9, "num_samples": 3, "seed": rng_seed}
    want = Sampler(model).sample(ids, eos_token_id=[257], **options)
    assert torch.equal(Sampler(model).sample(ids, eos_token_id=eos, **options).tokens, want.tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_outside_of_the_vocabulary(family):
    model = make_model(family)
    for token in (VOCAB, -1):
        ids, mask = torch.tensor([[1, 2], [token, 2]]), torch.tensor([[1, 1], [0, 1]])
        with pytest.raises(ValueError, match=rf"^input_ids: got token {token}, expected ids in \[0, {VOCAB}\)"):
            Sampler(model).sample(ids, max_new_tokens=2, eos_token_id=257)
        options = {"attention_mask": mask, "max_new_tokens": 2, "temperature": 0.0, "eos_token_id": 257}
        for sampler in (Sampler(model), GenerateSampler(model)):  # what pads is looked up by nobody
            got, want = (sampler.sample(padded, **options) for padded in (ids, ids * mask))
            assert torch.equal(got.tokens, want.tokens)
    Sampler(model).sample(torch.tensor([[0, VOCAB - 1]]), max_new_tokens=2, eos_token_id=257)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_an_end_token_no_answer_ends(family, rng_seed):
    model, ids = make_model(family, seed=rng_seed), torch.tensor([[1, 2, 3]])
    drawn = Sampler(model).sample(ids, num_samples=3, max_new_tokens=5, eos_token_id=-1, seed=rng_seed)
    assert drawn.lengths.tolist() == [[5, 5, 5]] and not drawn.finished.any()
    assert drawn.tokens.min() >= 0
