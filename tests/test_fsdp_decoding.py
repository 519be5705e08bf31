"""Sampling from a model sharded by FSDP2 decodes as with whole weights, and leaves nothing of them behind."""

import weakref
from functools import partial
from itertools import chain
from types import SimpleNamespace
from unittest.mock import patch

import decoder_kernels
import pytest
import torch
from collectives import CountingGathers, on_ranks
from draws import differ
from tiny import VOCAB, make_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pmc_fast import backend, fast_linear, gpu, running_rows, static_decoder
from pmc_fast.packing import pad_left
from pmc_fast.sampler import Sampler
from pmc_fast.sharding import kind
from pmc_fast.static_layers import StaticLayers

# By kind of layer; what shares its weight with the head is decoded in the same way.
MODELS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("phi", {}),
]
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [20, 21]]


def test_two_ranks_decode_as_one_process(rng_seed, tmp_path):
    checks = [
        _same_decoder,
        _low_precision,
        _parts_by_themselves,
        _changed_weights,
        _fixed_memory,
        _compiled,
        _other_peoples_changes,
        _nothing_stays,
    ]
    on_ranks(2, checks, rng_seed, tmp_path / "store")


def _shard(model, **options):
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def _sample(sampler, seed, prompts=PROMPTS, **options):
    ends = list(range(0, VOCAB, 11))  # rows retire all the time
    options = {
        "num_samples": 5,
        "max_new_tokens": 14,
        "eos_token_id": ends,
        "temperature": 0.9,
        "top_p": 0.95,
        **options,
    }
    return sampler.sample(*pad_left(prompts, 256), seed=seed, **options)


def _assert_same(sampler, whole, seed, prompts=PROMPTS):
    """The tokens of a model with whole weights, decoded by the same."""
    got, want = _sample(sampler, seed, prompts), _sample(whole, seed, prompts)
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.lengths, want.lengths)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-4, atol=1e-4)
    assert sampler.decoder == whole.decoder
    assert all(isinstance(parameter, DTensor) for parameter in sampler.lm.model.parameters())


def _same_decoder(rank, ranks, seed):
    for family, changes in MODELS:
        model = _shard(make_model(family, seed, **changes))
        sampler, whole = Sampler(model), Sampler(make_model(family, seed, **changes))
        _assert_same(sampler, whole, seed + rank, PROMPTS[: 2 + 2 * rank])  # of as many prompts as a rank likes
        assert sampler.decoder == "native", family


def _low_precision(rank, ranks, seed):
    """Under a policy of bfloat16: native where torch multiplies that slowly, as with whole weights of bfloat16."""
    for family, changes in MODELS:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        model, whole = (
            _shard(make_model(family, seed, **changes), mp_policy=policy),
            make_model(family, seed, **changes),
        )
        for parameter in whole.parameters():
            parameter.data = parameter.data.bfloat16()  # but no buffer: the policy leaves them alone
        sampler = Sampler(model)
        _assert_same(sampler, Sampler(whole), seed)
        left_to_torch = fast_linear.has_fast_bfloat16() and not fast_linear.rounds_inputs()
        assert sampler.decoder == ("modules" if left_to_torch else "native")
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def _parts_by_themselves(rank, ranks, seed):
    """`fully_shard` of any module but the head."""
    model = make_model(seed=seed)
    for layer in model.model.layers:
        for module in (layer.self_attn.q_proj, layer.mlp, layer.input_layernorm):
            fully_shard(module)
    fully_shard(model.model.embed_tokens)
    fully_shard(model.model.norm)
    sampler = Sampler(_shard(model))
    with CountingGathers() as count:
        _assert_same(sampler, Sampler(make_model(seed=seed)), seed)
    assert sampler.decoder == "native"
    assert count.gathers == sum(isinstance(module, FSDPModule) for module in model.modules())


def _changed_weights(rank, ranks, seed):
    """A call multiplies with the weights that there are, wherever they were gathered before."""
    sampler, whole = Sampler(_shard(make_model(seed=seed))), Sampler(make_model(seed=seed))
    before = _sample(sampler, seed)
    with torch.no_grad():
        for parameter, its in zip(whole.lm.model.parameters(), sampler.lm.model.parameters(), strict=True):
            parameter *= 1.5
            its *= 1.5
    _assert_same(sampler, whole, seed)
    assert differ(before, _sample(sampler, seed))


def _fixed_memory(rank, ranks, seed):
    """The decoder for GPUs, torch in its kernels' place: what is kept for the next call knows where weights were gathered."""
    chosen = SimpleNamespace(choose=lambda *args: "triton", load=lambda op, impl: backend.load(op, "native"))
    with patch.object(static_decoder, "backend", chosen), patch.object(gpu, "kernels", lambda name: decoder_kernels):
        for family, name in (("llama", "cuda graph"), ("cohere", "cuda graph of modules")):
            sampler = Sampler(_shard(make_model(family, seed)), keep_graphs=True)
            whole = Sampler(make_model(family, seed))
            for scale in (1.0, 1.0, 1.5):
                with torch.no_grad():
                    for parameter in chain(sampler.lm.model.parameters(), whole.lm.model.parameters()):
                        parameter *= scale
                _assert_same(sampler, whole, seed)
                assert sampler.decoder == name
                assert not any(tensor.untyped_storage().size() for tensor in _weights_read(sampler))


def _weights_read(sampler):
    """Beyond those of the model's own modules."""
    for decoder in sampler._kept._used.values():
        for layer in decoder.layers.layers.layers if isinstance(decoder.layers, StaticLayers) else ():
            yield layer.query.parts.weight
            yield layer.norm.parts.weight


def _watch(model):
    return model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: 1.5 * out).remove


def _watch_before(model):
    return model.model.layers[0].register_forward_pre_hook(lambda module, args: (1.5 * args[0],)).remove


def _replace_forward(model):
    layer = model.model.layers[0]
    layer.forward = lambda *args, forward=layer.forward, **kwargs: 1.5 * forward(*args, **kwargs)
    return lambda: vars(layer).pop("forward")


def _replace_product(model):
    linear = model.model.layers[1].self_attn.o_proj
    linear.forward = lambda x, forward=linear.forward: 1.5 * forward(x)
    return lambda: vars(linear).pop("forward")


def _derive(model):
    """A class of somebody's own, made of what `fully_shard` made."""
    layer = model.model.layers[0]
    theirs = type(layer)

    class FSDPLlamaDecoderLayer(theirs):
        def forward(self, *args, **kwargs):
            return 1.5 * super().forward(*args, **kwargs)

    layer.__class__ = FSDPLlamaDecoderLayer
    return lambda: setattr(layer, "__class__", theirs)


def _other_peoples_changes(rank, ranks, seed):
    """They send it to the modules, which heed them."""
    model = _shard(make_model(seed=seed))
    sampler = Sampler(model)
    before = _sample(sampler, seed)
    for change in (_watch, _watch_before, _replace_forward, _replace_product, _derive):
        assert sampler.decoder == "native"
        undo = change(model)
        got = _sample(sampler, seed)
        assert sampler.decoder == "modules", change
        assert differ(before, got), change
        undo()
        assert torch.equal(_sample(sampler, seed).tokens, before.tokens), change


def _compiled(rank, ranks, seed):
    """Modules that are compiled once take the weights of each call, and let go of them."""
    traced = partial(torch.compile, backend="eager")
    with patch.object(torch, "compile", traced):
        sampler = Sampler(_shard(make_model("cohere", seed)), compile_modules=True)
    whole, storages = Sampler(make_model("cohere", seed)), []
    for _ in range(3):
        got = _sample(sampler, seed, progress=lambda rows: storages.extend(_storages(sampler.lm.model)))
        assert torch.equal(got.tokens, _sample(whole, seed).tokens) and sampler.decoder == "compiled modules"
        assert storages and not any(storage.size() for storage in storages)
        with torch.no_grad():
            for parameter in chain(whole.lm.model.parameters(), sampler.lm.model.parameters()):
                parameter *= 1.2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def _storages(model):
    return [parameter.untyped_storage() for parameter in model.parameters()]


def _nothing_stays(rank, ranks, seed):
    """Gathered weights are freed, and packed ones and what decoded are gone, also if a call fails."""
    model = _shard(make_model(seed=seed))
    sampler, storages, held = Sampler(model), {}, []
    made = running_rows.fused_decoder

    def watched(*args):
        held.append(weakref.ref(decoder := made(*args)))
        return decoder

    def note(rows):
        products = fast_linear._copies.get()._held.values()
        assert products
        held.extend(map(weakref.ref, products))
        storages.update((p.data_ptr(), p.untyped_storage()) for p in model.parameters())

    def fail(rows):
        note(rows)
        raise KeyError

    with patch.object(running_rows, "fused_decoder", watched):
        _sample(sampler, seed, progress=note)
        with pytest.raises(KeyError):
            _sample(sampler, seed, progress=fail)
    assert held and not any(reference() for reference in held)
    assert len(storages) >= len(list(model.parameters()))
    assert not any(storage.size() for storage in storages.values())
    assert fast_linear._copies.get() is None and not any("forward" in vars(module) for module in model.modules())


class _Own(nn.Linear):
    pass


@pytest.mark.parametrize("cls", [nn.Linear, _Own, type("FSDPLinear", (nn.Linear,), {})], ids=lambda cls: cls.__name__)
def test_a_module_that_is_not_sharded_is_of_its_own_class(cls):
    assert kind(cls(2, 3)) is cls
