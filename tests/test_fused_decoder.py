"""Decoding by this library's own kernels gives the answers of the model's modules, or leaves the model alone."""

import weakref

import pytest
import torch
from draws import assert_same, differ
from tiny import ALIKE, KNOWN, VOCAB, checkpoint_activations, make_model

from pmc_fast import attention, fast_linear, fused_decoder
from pmc_fast.native.packed_linear import packed_bytes
from pmc_fast.packing import pad_left
from pmc_fast.sampler import Sampler

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [20, 21]]
ENDS = list(range(0, VOCAB, 11))  # rows retire all the time
DRAW = {"top_p": 0.95, "temperature": 0.9}
# Each is read once for its answers.
LONG = [[(7 * i) % VOCAB for i in range(90)], [(5 * i + 1) % VOCAB for i in range(75)]]


@pytest.fixture
def built(monkeypatch):
    """What `fused_decoder` made, call by call."""
    made = []

    def watched(*args):
        made.append(fused_decoder.fused_decoder(*args))
        return made[-1]

    monkeypatch.setattr("pmc_fast.running_rows.fused_decoder", watched)
    return made


def make(family, seed):
    model = make_model(family, seed=seed, **KNOWN[family])
    if family == "gemma2":  # transformers gives it eager attention, training this library's
        attention.install(model)
    return model


def sample(model, seed, prompts=PROMPTS):
    ids, mask = pad_left(prompts, 256)
    return Sampler(model).sample(ids, mask, num_samples=5, max_new_tokens=14, eos_token_id=ENDS, seed=seed, **DRAW)


def by_modules(model, seed, monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setattr("pmc_fast.running_rows.fused_decoder", lambda *args: None)
        return sample(model, seed, **options)


@pytest.mark.parametrize("prompts", [PROMPTS, [[1, 2, 3, 4, 5, 6, 7, 8]], LONG], ids=["padded", "one prompt", "long"])
@pytest.mark.parametrize("family", KNOWN)
def test_same_answers_as_the_modules(family, prompts, isa, built, monkeypatch, rng_seed):
    model = make(family, rng_seed)
    got = sample(model, rng_seed, prompts=prompts)
    assert len(built) == 1 and built[0] is not None
    want = by_modules(model, rng_seed, monkeypatch, prompts=prompts)
    assert_same(got, want)


def test_angles_that_change_with_the_longest_row(built, monkeypatch, rng_seed):
    angles = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    angles["original_max_position_embeddings"] = 12
    model = make_model("phi3", seed=rng_seed, rope_parameters=angles)
    got, want = sample(model, rng_seed), by_modules(model, rng_seed, monkeypatch)
    assert built[0] is not None and got.lengths.max() > 8
    assert_same(got, want)


def test_scores_that_are_no_numbers_are_refused(built, rng_seed):
    model = make("llama", rng_seed)
    with torch.no_grad():
        model.model.embed_tokens.weight[4:] = torch.nan  # of answers, not of the prompt
    with pytest.raises(ValueError, match="decode_attention: the scores of row . hold NaN"):
        sample(model, rng_seed, prompts=[[1, 2, 3]])
    assert built[0] is not None


VARIANTS = [
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"attention_bias": False, "hidden_act": "gelu_fast"}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"}),
    ("opt", {"enable_bias": False, "activation_function": "gelu"}),
    ("llama", {"hidden_act": "relu"}),
    ("phi", {"hidden_act": "gelu"}),
    ("olmo", {"clip_qkv": None}),
    ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),  # which turns all layers
    ("smollm3", {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 6}),
    ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    ("starcoder2", {"use_bias": False}),
    *((family, {}) for family in ALIKE),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
def test_variants_of_these_families(family, changes, built, monkeypatch, rng_seed):
    model = make_model(family, seed=rng_seed, **changes)
    got, want = sample(model, rng_seed), by_modules(model, rng_seed, monkeypatch)
    assert built[0] is not None
    assert_same(got, want)


ODD = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 51}


@pytest.fixture
def bfloat16(rng_seed, monkeypatch):
    """Its weights are this library's to multiply: every other seed by inputs rounded to bfloat16, as on some CPUs."""
    monkeypatch.setattr(fast_linear, "has_fast_bfloat16", lambda: False)
    monkeypatch.setattr(fast_linear, "rounds_inputs", lambda: rng_seed % 2 == 1)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_a_fused_product_that_begin_within_a_panel(dtype, isa, built, monkeypatch, rng_seed):
    """Queries end at row 32, keys at 40, gates at 51; a panel has 8, 16 or 32 rows."""
    model = make_model("phi3", seed=rng_seed, **ODD).to(dtype)
    got, want = sample(model, rng_seed), by_modules(model, rng_seed, monkeypatch)
    assert built[0] is not None
    if dtype == torch.float32:
        assert_same(got, want)
    else:
        exact = make_model("phi3", seed=rng_seed, **ODD).bfloat16().float()
        assert error(got, exact) < error(want, exact)


@pytest.fixture(params=[0, 0.5], ids=["no room", "room for half"])
def memory(request, monkeypatch):
    """Little memory for copies of weights, and those that were made."""
    made = {"copies": [], "in place": []}

    def limit(model):
        weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
        room = int(request.param * sum(map(packed_bytes, weights)))
        monkeypatch.setattr(fast_linear, "free_bytes", lambda device: room / fast_linear.PACKED_SHARE)
        return room

    def watch(name, make):
        def watched(*args):
            own = make(*args)
            shared = name == "copies" and own.memory._base is not None
            made[name].append((weakref.ref(own.memory._base if shared else own.memory), own.memory.nbytes))
            return own

        return watched

    monkeypatch.setattr(fast_linear, "pack", watch("copies", fast_linear.pack))
    monkeypatch.setattr(fast_linear, "in_place", watch("in place", fast_linear.in_place))
    return limit, made


@pytest.mark.parametrize("family", [family for family in KNOWN if family != "gpt2"])
def test_weights_that_find_no_room_are_read_where_they_lie(family, isa, memory, monkeypatch, rng_seed):
    limit, made = memory
    model = make(family, rng_seed)
    want = by_modules(model, rng_seed, monkeypatch)
    room = limit(model)
    made["copies"].clear()
    ids, mask = pad_left(PROMPTS, 256)
    sampler = Sampler(model)
    got = sampler.sample(ids, mask, num_samples=5, max_new_tokens=14, eos_token_id=ENDS, seed=rng_seed, **DRAW)
    assert sampler.decoder == "native"
    assert_same(got, want)
    assert made["in place"] and bool(made["copies"]) == bool(room)
    assert sum(size for _, size in made["copies"]) <= room
    del sampler
    assert all(memory() is None for memory, _ in made["copies"] + made["in place"])


def test_but_for_those_that_lie_transposed(monkeypatch, rng_seed):
    """A GPT-2's; while they have room their copies are as all others."""
    model = make("gpt2", rng_seed)
    want = by_modules(model, rng_seed, monkeypatch)
    monkeypatch.setattr(fast_linear, "free_bytes", lambda device: 0)
    ids, mask = pad_left(PROMPTS, 256)
    sampler = Sampler(model)
    got = sampler.sample(ids, mask, num_samples=5, max_new_tokens=14, eos_token_id=ENDS, seed=rng_seed, **DRAW)
    assert sampler.decoder == "modules"
    assert_same(got, want)


@torch.no_grad()
@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "gpt_neox"])
def test_so_they_are_in_bfloat16(family, isa, built, memory, monkeypatch, rng_seed):
    model, exact = make(family, rng_seed).bfloat16(), make(family, rng_seed).bfloat16().float()
    memory[0](model)
    got = sample(model, rng_seed)
    assert built[-1] is not None and memory[1]["in place"]
    assert error(got, exact) < error(by_modules(model, rng_seed, monkeypatch), exact) < 0.02


def test_so_they_are_beside_lora_adapters(built, memory, monkeypatch, rng_seed):
    peft = pytest.importorskip("peft")
    options = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(make_model("phi3", seed=rng_seed), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    want = by_modules(model, rng_seed, monkeypatch)
    memory[0](model)
    got = sample(model, rng_seed)
    assert built[-1] is not None and memory[1]["in place"]
    assert_same(got, want)


@pytest.mark.parametrize(
    ("family", "checkpoints"),
    [("llama", False), ("phi", True), ("phi3", False), ("gemma3_text", True), ("gpt_neox", False), ("gpt2", True)],
)
def test_lora_adapters(family, checkpoints, built, monkeypatch, rng_seed):
    peft = pytest.importorskip("peft")
    options = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(make_model(family, seed=rng_seed), peft.LoraConfig(**options)).eval()
    plain = sample(model, rng_seed)  # new adapters change nothing
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    if checkpoints:
        checkpoint_activations(model)
        assert model.get_input_embeddings()._forward_hooks  # of transformers, which change no value
    got = sample(model, rng_seed)
    assert None not in built
    want = by_modules(model, rng_seed, monkeypatch)
    assert_same(got, want)
    assert differ(plain, got)


def error(samples, exact):
    """The root mean square error of the samples' log-probabilities, against a model in float32."""
    errors = []
    for prompt, tokens, lengths, logprobs in zip(
        PROMPTS, samples.tokens, samples.lengths, samples.logprobs, strict=True
    ):
        for answer, length, logprob in zip(tokens, lengths.tolist(), logprobs, strict=True):
            ids = torch.cat([torch.tensor(prompt), answer[:length]])[None]
            want = exact(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            errors.append(logprob[:length] - want.gather(1, answer[:length, None])[:, 0])
    return torch.cat(errors).square().mean().sqrt()


@torch.no_grad()
@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("family", KNOWN)
def test_in_bfloat16_it_is_nearer_to_the_exact_model_than_the_modules_are(family, isa, built, monkeypatch, rng_seed):
    """Between the products it keeps float32."""
    model, exact = make(family, rng_seed).bfloat16(), make(family, rng_seed).bfloat16().float()
    got = sample(model, rng_seed)
    assert built[-1] is not None
    assert error(got, exact) < error(by_modules(model, rng_seed, monkeypatch), exact) < 0.02


def test_the_weights_are_those_of_the_call(built, monkeypatch, rng_seed):
    model = make_model(seed=rng_seed)
    before = sample(model, rng_seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    got, want = sample(model, rng_seed), by_modules(model, rng_seed, monkeypatch)
    assert_same(got, want)
    assert differ(before, got)


class Twice(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.in_features, self.out_features, self.weight = inner.in_features, inner.out_features, inner.weight

    def forward(self, x):
        return 2 * self.inner(x)


def hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: 1.5 * out)


def adapt(model):
    model.model.layers[0].self_attn.v_proj = Twice(model.model.layers[0].self_attn.v_proj)


def replace_forward(model):
    norm = model.model.layers[0].input_layernorm
    norm.forward = lambda x, forward=norm.forward: 1.1 * forward(x)


def embed_unscaled(model):
    plain = torch.nn.Embedding(*model.model.embed_tokens.weight.shape)
    plain.weight = model.model.embed_tokens.weight
    model.model.embed_tokens = plain


def adapt_fused(model):
    model.model.layers[0].self_attn.qkv_proj = Twice(model.model.layers[0].self_attn.qkv_proj)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", hook),
        ("llama", adapt),
        ("llama", replace_forward),
        ("gemma", hook),
        ("gemma", embed_unscaled),
        ("phi3", adapt_fused),
    ],
)
def test_a_model_that_somebody_changed_is_left_to_its_modules(family, change, built, monkeypatch, rng_seed):
    model = make_model(family, seed=rng_seed)
    before = sample(model, rng_seed)
    change(model)
    got = sample(model, rng_seed)
    assert built[0] is not None and built[1] is None
    want = by_modules(model, rng_seed, monkeypatch)
    assert_same(got, want)
    assert differ(before, got)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"hidden_act": "quick_gelu"}),
        ("phi", {"qk_layernorm": True}),
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"word_embed_proj_dim": 16}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("granite", {"residual_multiplier": 0.0}),
        ("cohere", {}),
    ],
    ids=str,
)
def test_other_kinds_of_layers_are_left_to_their_modules(family, changes, built, rng_seed):
    sample(make_model(family, seed=rng_seed, **changes), rng_seed)
    assert built == [None]
