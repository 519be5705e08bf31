"""Attention in chunks (Llama 4): exact within one, refused beyond where it trains, the model's own where it samples."""

import pytest
import torch
from tiny import VOCAB, make_model, make_tokenizer
from transformers import Llama4ForCausalLM, Llama4TextConfig

from pmc_fast import PMC, PMCConfig, Sampler, UserError
from pmc_fast.data import QA
from pmc_fast.models import LanguageModel
from pmc_fast.packing import pack, pad_left
from pmc_fast.positions import Positions, chunk_of

CHUNK = 17


def make_chunked(seed: int = 0, **changes):
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2,
        "no_rope_layers": [1, 0], "attention_chunk_size": CHUNK, "max_position_embeddings": 128,
        "pad_token_id": 256, "bos_token_id": 258, "eos_token_id": 257, **changes,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = Llama4ForCausalLM(Llama4TextConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def sequences(lengths):
    """Prompts and answers; the last token of an answer is no input."""
    tokens = [torch.randint(0, 256, (length + 1,)).tolist() for length in lengths]
    return [ids[: len(ids) // 2] for ids in tokens], [ids[len(ids) // 2 :] for ids in tokens]


def test_sequences_of_a_chunk_are_exact(rng_seed):
    model = make_chunked(rng_seed)
    model.set_attn_implementation("eager")
    prompts, answers = sequences([CHUNK, 5, CHUNK - 1, 2])
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logprob = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected.append(logprob.gather(1, torch.tensor(answer)[:, None])[:, 0])
    lm, packed = LanguageModel(model), pack(prompts, answers)
    got = lm.head.logprob(packed.hidden(lm), packed.target)
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_longer_sequences_are_refused_before_the_model_runs(monkeypatch):
    lm = LanguageModel(make_chunked())
    monkeypatch.setattr(type(lm.backbone), "forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(
        UserError, match=f"^sequence 1 has {CHUNK + 1} tokens, .*at most {CHUNK}: Llama4ForCausalLM attends in chunks"
    ):
        pack(*sequences([5, CHUNK + 1])).hidden(lm)
    with pytest.raises(UserError, match=f"^sequence 0 has {CHUNK + 2} tokens"):  # the beginning is held once
        pack([[1] * (CHUNK - 1)] * 2, [[2] * 4, [3]]).hidden(lm)


class Endless(Sampler):
    """No answer ends by itself."""

    def sample(self, *args, eos_token_id, **options):
        return super().sample(*args, eos_token_id=300, **options)


@pytest.mark.parametrize("reencode", [False, True])
def test_pmc_refuses_rows_and_answers_before_it_changes(reencode, rng_seed):
    config = PMCConfig(num_samples=2, max_new_tokens=CHUNK, prompt_style="plain", reencode=reencode)
    model = make_chunked(rng_seed)
    pmc = PMC(model, make_tokenizer(), config, sampler=Endless(model))
    pmc.initialise(["Who?"], answers=["one"])
    before = pmc.state_dict()
    with pytest.raises(UserError, match=f"^retain: row 0 has .*at most {CHUNK}: Llama4ForCausalLM attends in chunks"):
        pmc.loss([], [QA("Who was it?", "Somebody.")])
    with pytest.raises(UserError, match=f"^{'reencode: ' * reencode}the answer picked for question 0.*in chunks"):
        pmc.loss([0], [])
    assert pmc.state_dict() == before


ALONE = [{"no_rope_layers": [1, 1]}, {"layer_types": ["full_attention"] * 2, "floor_scale": 20}]  # chunks, scaling


@pytest.mark.parametrize("changes", [{}, *ALONE], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_sampling_is_the_models_own(padded, changes, rng_seed):
    """Greedy answers that cross a chunk's end, behind prompts that do; each token against the whole text's logits.

    With the prompt's padding: attention that is scaled by the place counts it.
    """
    model = make_chunked(rng_seed, **changes)
    begin = torch.randint(0, 250, (9,)).tolist()  # so that prompts would be packed, if attention allowed
    lengths = [3, 5, 12] if padded else [12, 12]
    prompts = [begin + torch.randint(0, 250, (length,)).tolist() for length in lengths]
    samples = Sampler(model).sample(
        *pad_left(prompts, 256), num_samples=2, temperature=0, max_new_tokens=20, eos_token_id=300
    )
    model.set_attn_implementation("eager")
    for prompt, mask, tokens in zip(*pad_left(prompts, 256), samples.tokens[:, 1], strict=True):
        mask = torch.cat([mask, torch.ones_like(tokens)])[None]
        options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with torch.no_grad():
            logits = model(torch.cat([prompt, tokens])[None], **options).logits[0, len(prompt) - 1 : -1]
        picked = logits.gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(picked, logits.amax(1), rtol=1e-4, atol=1e-4)


def test_a_base_model_that_leads_nowhere_is_refused():
    model = make_chunked()
    model.elsewhere, model.model, model.get_output_embeddings = model.model, None, lambda: model.lm_head
    with pytest.raises(UserError, match="^model: got Llama4ForCausalLM, whose base_model does not lead to its layers"):
        LanguageModel(model)


def test_a_packed_batch_ends_where_attention_is_scaled_by_the_place(monkeypatch, rng_seed):
    """In the row, whatever the positions are; each token of a shorter batch is exact."""
    assert (
        Positions.of(make_chunked()).tuned == 8192 and Positions.of(make_chunked(no_rope_layers=[1, 1])).tuned is None
    )
    model = make_chunked(rng_seed, floor_scale=20)
    lm = LanguageModel(model)
    assert lm.unpackable is None
    prompts, answers = sequences([9, 10])
    got = pack(prompts, answers).hidden(lm)
    model.set_attn_implementation("eager")
    alone = [
        lm.hidden(torch.tensor([prompt + answer[:-1]]))[0, len(prompt) - 1 :]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-4, atol=1e-4)
    with pytest.raises(
        UserError, match="^batch: got 20 tokens packed together, expected fewer than 20: .*Llama4ForCausalLM"
    ):
        pack(*sequences([10, 10])).hidden(lm)


def test_loss_and_gradients_equal_the_models_own(rng_seed):
    model, ids = make_chunked(rng_seed), torch.randint(0, 256, (3, 11))
    expected = model(input_ids=ids, labels=ids).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    lm = LanguageModel(model)
    assert lm.backbone is model.model
    rows = [([row[0]], row[1:]) for row in ids.tolist()]
    packed = pack(*map(list, zip(*rows, strict=True)))
    weight = torch.full((len(packed.target),), 1 / len(packed.target))
    lm.head.collapse_loss(packed.hidden(lm), packed.target, weight).loss.backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-5)


def test_which_models_have_chunks():
    assert Positions.of(make_chunked()).chunk == CHUNK
    assert Positions.of(make_model("mistral")).chunk is None
    config = make_chunked().config
    config.layer_types = ["full_attention"] * 2
    assert chunk_of(config) is None
