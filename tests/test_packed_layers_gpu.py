"""A packed batch through a model's layers by Triton's kernels gives what the model's modules give.

Without a GPU some tests have the CPU's kernels in their place, others Triton's interpreter, which is slow; attention, which is
torch's on a GPU, is this library's reference.
"""

from types import SimpleNamespace

import pytest
import torch
from tiny import KNOWN, make_model

pytest.importorskip("triton")
from pmc_fast import gpu, layer_gradients, packed_layers, varlen
from pmc_fast.models import LanguageModel
from pmc_fast.ops import packed_attention
from pmc_fast.packing import pack

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def attend(query, key, value, lengths, window, scale, softcap):
    options = {"window": window, "scale": scale, "softcap": softcap, "impl": "reference"}
    return packed_attention(query, key, value, [0, *lengths], **options)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The layers as a GPU has them, with attention in any dtype."""
    monkeypatch.setattr(packed_layers, "KERNELS", {DEVICE: "triton"})
    monkeypatch.setattr(packed_layers, "varlen", SimpleNamespace(takes=lambda *args: True, attend=attend))


@pytest.fixture
def by_triton(as_on_a_gpu, monkeypatch):
    """The same by Triton's kernels, wherever the tensors are."""
    monkeypatch.setattr(layer_gradients, "kernels_for", lambda x: gpu.kernels("elementwise_gradient"))


def batch():
    prompts = [torch.randint(0, 256, (count,)).tolist() for count in (5, 1, 9)]
    return pack(prompts, [torch.randint(0, 256, (count,)).tolist() for count in (4, 7, 1)], DEVICE)


def gradients(model, packed, upstream, monkeypatch, by):
    with monkeypatch.context() as patch:
        if by == "modules":
            patch.setattr(packed_layers, "KERNELS", {})
        lm = LanguageModel(model)
        hidden = packed.hidden(lm)
        assert lm.packed_by == by
    model.zero_grad()
    hidden.backward(upstream.to(hidden.dtype))
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(model, packed, monkeypatch, tolerance):
    upstream = torch.randn(len(packed.rows), model.config.hidden_size, device=DEVICE)
    got, mine = gradients(model, packed, upstream, monkeypatch, "triton")
    want, theirs = gradients(model, packed, upstream, monkeypatch, "modules")
    assert got.dtype == want.dtype and near(got, want, tolerance)
    for name, gradient in theirs.items():
        assert (mine[name] is None) == (gradient is None), name
        assert gradient is None or (mine[name].dtype == gradient.dtype and near(mine[name], gradient, tolerance)), name


def near(got, want, tolerance):
    """Gradients of keys' biases without rotary embeddings are 0, but for rounding."""
    return (got.double() - want.double()).norm() <= tolerance * (want.double().norm() + 0.01)


@pytest.mark.parametrize("family", KNOWN)
def test_equals_the_modules(family, as_on_a_gpu, monkeypatch, rng_seed):
    model = make_model(family, seed=rng_seed, **KNOWN[family]).to(DEVICE).train()
    assert_same(model, batch(), monkeypatch, 1e-3)


@pytest.mark.parametrize("family", ["qwen3", "olmo2", "gpt_neox", "opt"])
def test_the_kernels_themselves(family, by_triton, monkeypatch, rng_seed):
    model = make_model(family, seed=rng_seed, **KNOWN[family]).to(DEVICE).train()
    assert_same(model, batch(), monkeypatch, 1e-3)


@pytest.mark.parametrize("family", ["gemma2", "phi"])
def test_in_16_bits(family, by_triton, monkeypatch, rng_seed):
    """Both round: they are as near to the exact gradients as a few roundings are."""
    model = make_model(family, seed=rng_seed, **KNOWN[family]).to(DEVICE, torch.bfloat16).train()
    assert_same(model, batch(), monkeypatch, 0.1)


def test_adapters_of_another_dtype(by_triton, monkeypatch, rng_seed):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model("llama", seed=rng_seed).to(DEVICE, torch.bfloat16), config).train()
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in adapters} == {torch.float32}
    with torch.no_grad():
        for parameter in adapters:
            parameter += 0.1 * torch.randn_like(parameter)
    assert_same(model, batch(), monkeypatch, 0.1)


def test_left_to_the_modules(as_on_a_gpu, monkeypatch, rng_seed):
    """Norms of a dtype of their own, attention that has no kernel, a beginning that is held once."""
    model, packed = make_model("llama", seed=rng_seed).to(DEVICE), batch()
    lm = LanguageModel(model)
    packed.hidden(lm)
    assert lm.packed_by == "triton"
    begin = pack([[*range(20), 1], [*range(20), 2]], [[3], [4]])
    if not GPU:
        assert begin.lengths.shared
        begin.hidden(lm)
        assert lm.packed_by == "modules"
    monkeypatch.setattr(packed_layers.varlen, "takes", lambda *args: False)
    packed.hidden(lm)
    assert lm.packed_by == "modules"
    monkeypatch.setattr(packed_layers.varlen, "takes", lambda *args: True)
    model.model.norm.double()
    packed.hidden(lm)
    assert lm.packed_by == "modules"


@pytest.mark.skipif(not GPU, reason="needs a GPU with torch's attention over sequences end to end")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_all_of_it_on_a_gpu(family, monkeypatch, rng_seed):
    monkeypatch.setattr(packed_layers, "KERNELS", {"cuda": "triton"})
    model = make_model(family, seed=rng_seed, **KNOWN[family]).to(DEVICE, torch.bfloat16).train()
    if not varlen.takes(torch.device("cuda"), torch.bfloat16, 8, None):
        pytest.skip("this torch has no such attention")
    assert_same(model, batch(), monkeypatch, 0.1)
