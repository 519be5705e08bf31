"""A packed batch through layers as this library runs them gives what the model's modules give, or is left to them."""

import copy
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from tiny import ALIKE, FAMILIES, KNOWN, checkpoint_activations, make_model
from torch.utils.checkpoint import checkpoint

from pmc_fast import packed_layers
from pmc_fast.decoder_layers import LinearParts, NormParts
from pmc_fast.layer_gradients import add_and_normalize, products
from pmc_fast.models import LanguageModel
from pmc_fast.packing import pack

ALL = {family: (family, changes) for family, changes in KNOWN.items()}
ALL |= {family: (family, {}) for family in ALIKE}
ALL["mistral without windows"] = "mistral", {"sliding_window": None}
ALL["gpt_neox, one after the other"] = "gpt_neox", {"use_parallel_residual": False}
ALL["stablelm, side by side"] = "stablelm", {"use_parallel_residual": True}


@pytest.fixture
def used(monkeypatch):
    """For each call of `hidden_of`, whether it ran the layers itself."""
    calls, inner = [], packed_layers.hidden_of

    def watched(*args):
        calls.append((hidden := inner(*args)) is not None)
        return hidden

    monkeypatch.setattr(packed_layers, "hidden_of", watched)
    return calls


@pytest.fixture
def by_modules(monkeypatch):
    """Hidden states by the model's modules alone."""

    def hidden(lm, packed):
        with monkeypatch.context() as patch:
            patch.setattr(packed_layers, "hidden_of", lambda *args: None)
            return packed.hidden(lm)

    return hidden


def batch(shared=0, count=4):
    begin = torch.randint(0, 256, (shared,)).tolist()
    prompts = [
        [*begin, number, *torch.randint(0, 256, (int(torch.randint(1, 9, ())),)).tolist()] for number in range(count)
    ]
    answers = [torch.randint(0, 256, (int(torch.randint(1, 12, ())),)).tolist() for _ in range(count)]
    return pack(prompts, answers)


def gradients(model, hidden, upstream):
    """Of sum(hidden * upstream), by name; the others' are None."""
    model.zero_grad()
    hidden.backward(upstream)
    return {name: p.grad for name, p in model.named_parameters()}


def relative_error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-9))


@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("case", ALL)
def test_equals_the_modules(case, shared, isa, used, by_modules, monkeypatch, rng_seed):
    monkeypatch.setattr("pmc_fast.packing.LEAST_SHARED", 3)
    family, changes = ALL[case]
    model = make_model(family, seed=rng_seed, **changes).train()
    lm, packed = LanguageModel(model), batch(shared)
    assert packed.lengths.shared == shared
    hidden, want = packed.hidden(lm), by_modules(lm, packed)
    assert used == [True]
    torch.testing.assert_close(hidden, want, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(want)
    got, want = gradients(model, hidden, upstream), gradients(model, want, upstream)
    for name, gradient in want.items():
        if gradient is None:
            assert got[name] is None, name
        else:
            # Of keys' biases without rotary embeddings it is 0, but for rounding.
            assert (got[name] - gradient).norm() < 1e-3 * gradient.norm() + 1e-5, name


@pytest.mark.parametrize("family", KNOWN)
def test_bfloat16_is_nearer_to_the_exact_values_than_the_modules(family, used, by_modules, monkeypatch, rng_seed):
    """Weights are widened, all between them is float32."""
    monkeypatch.setattr(packed_layers, "has_fast_bfloat16", lambda: False)
    model = make_model(family, seed=rng_seed, **KNOWN[family]).bfloat16()
    lm, packed = LanguageModel(model), batch()
    hidden, theirs = packed.hidden(lm), by_modules(lm, packed)
    assert used == [True] and hidden.dtype == torch.bfloat16
    wide = copy.deepcopy(model).double()
    exact = by_modules(LanguageModel(wide), packed)
    assert relative_error(hidden, exact) < min(0.02, relative_error(theirs, exact))
    upstream = torch.randn_like(hidden)
    got = gradients(model, hidden, upstream)
    theirs = gradients(model, theirs, upstream)
    exact = gradients(wide, exact, upstream.double())
    errors = {
        name: (relative_error(got[name], want), relative_error(theirs[name], want))
        for name, want in exact.items()
        if want is not None
    }
    assert all(got[name].dtype == torch.bfloat16 for name in errors)
    mine, modules = (sum(column) for column in zip(*errors.values(), strict=True))
    assert mine < modules, errors


def test_without_gradients_and_with_weights_that_change(used, by_modules, rng_seed):
    model = make_model("qwen3", seed=rng_seed)
    lm, packed = LanguageModel(model), batch()
    with torch.no_grad():
        first = packed.hidden(lm)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        second, want = packed.hidden(lm), by_modules(lm, packed)
    assert used == [True, True] and not first.requires_grad
    torch.testing.assert_close(second, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, second, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])
def test_what_products_are_made_of_is_not_kept(family, monkeypatch, rng_seed):
    """The backward pass makes norms and activations anew."""
    made = []

    def watch(module, name):
        make = getattr(module, name)

        def watched(*args):
            result = make(*args)
            made.append(weakref.ref(result[1] if isinstance(result, tuple) else result))
            return result

        monkeypatch.setattr(module, name, watched)

    lm, packed = LanguageModel(make_model(family, seed=rng_seed)), batch()
    packed.hidden(lm)
    watch(packed_layers, "normalize")
    watch(packed_layers, "add_and_normalize")
    watch(packed_layers, "activate")
    hidden = packed.hidden(lm)
    assert hidden.requires_grad and len(made) >= 5
    assert [ref() for ref in made if ref() is not None and ref() is not hidden] == []


def _given_back_once(run):
    kept = {}

    def keep(tensor):
        kept[len(kept)] = tensor
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(keep, kept.pop):
        return run()


def _offloaded(run):
    with torch.autograd.graph.save_on_cpu():
        return run()


KEEPERS = {
    "checkpointing": lambda run: checkpoint(run, use_reentrant=False),
    "offloading": _offloaded,
    "once": _given_back_once,
}


@pytest.mark.parametrize("keeper", KEEPERS)
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_what_is_saved_is_kept_by_others(family, keeper, used, rng_seed):
    """Who may give each tensor back but once."""
    model, packed = make_model(family, seed=rng_seed), batch()
    lm = LanguageModel(model)
    upstream = torch.randn_like(hidden := packed.hidden(lm))
    want = gradients(model, hidden, upstream)
    got = gradients(model, KEEPERS[keeper](lambda: packed.hidden(lm)), upstream)
    assert used[:2] == [True, True]
    for name, gradient in want.items():
        assert gradient is None or torch.equal(got[name], gradient), name


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_parameters_that_change_before_the_backward_pass_are_an_error(family, rng_seed):
    """As with torch's own layers, which do not read their biases either."""
    model = make_model(family, seed=rng_seed)
    lm, packed = LanguageModel(model), batch()
    names = [name for name, p in model.named_parameters() if "layers" in name and (p.ndim == 2 or "norm" in name)]
    assert len(names) >= 14
    for name in names:
        hidden = packed.hidden(lm)
        with torch.no_grad():
            model.get_parameter(name).mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            hidden.sum().backward()


def test_the_sum_is_not_taken_for_its_norm(rng_seed):
    """Both are outputs of one function; the norm alone is made anew."""
    x, added, weight, scale = (torch.randn(*shape, requires_grad=True) for shape in ((5, 4), (5, 4), (3, 4), (4,)))
    total, y = add_and_normalize(x, added, NormParts(scale, None, 1e-5, False, 0.0))
    for states in (total, y):
        (product,) = products(states, (LinearParts(weight, None, (), weight),))
        upstream = torch.randn_like(product)
        (got,) = torch.autograd.grad(product, weight, upstream, retain_graph=True)
        torch.testing.assert_close(got, upstream.T @ states)


def test_frozen_parameters_get_no_gradients(used, by_modules, rng_seed):
    model = make_model("phi3", seed=rng_seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(part in name for part in ("1.self_attn.qkv_proj", "0.mlp.down_proj", "0.input"))
    lm, packed = LanguageModel(model), batch()
    hidden, want = packed.hidden(lm), by_modules(lm, packed)
    upstream = torch.randn_like(want)
    got, want = gradients(model, hidden, upstream), gradients(model, want, upstream)
    assert used == [True] and sum(g is not None for g in got.values()) == 3
    for name, gradient in want.items():
        assert (got[name] is None) == (gradient is None)
        if gradient is not None:
            assert relative_error(got[name], gradient) < 1e-3, name


def test_the_padding_tokens_row_gets_no_gradient(used, by_modules, rng_seed):
    model = make_model("llama", seed=rng_seed, pad_token_id=7)
    lm, packed = LanguageModel(model), pack([[5, 7, 7], [7, 3]], [[1, 2], [7, 4]])
    hidden = packed.hidden(lm)
    upstream = torch.randn_like(hidden)
    got = gradients(model, hidden, upstream)["model.embed_tokens.weight"]
    want = gradients(model, by_modules(lm, packed), upstream)["model.embed_tokens.weight"]
    assert used == [True] and not got[7].any() and got[5].any()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def _share_in_attention(layer):
    layer.self_attn.k_proj.weight = layer.self_attn.v_proj.weight


def _share_in_mlp(layer):
    layer.mlp.gate_proj.weight = layer.mlp.up_proj.weight


@pytest.mark.parametrize("share", [_share_in_attention, _share_in_mlp])
def test_weights_that_products_share(share, used, by_modules, rng_seed):
    model = make_model("llama", seed=rng_seed)
    share(model.model.layers[0])
    model.model.layers[1].mlp = model.model.layers[0].mlp
    lm, packed = LanguageModel(model), batch()
    hidden, want = packed.hidden(lm), by_modules(lm, packed)
    upstream = torch.randn_like(want)
    got, want = gradients(model, hidden, upstream), gradients(model, want, upstream)
    assert used == [True]
    for name, gradient in want.items():
        assert gradient is None or relative_error(got[name], gradient) < 1e-3, name


def test_each_backward_pass_adds_the_same(rng_seed):
    """None writes into what a later one reads, the upstream gradient included."""
    model, packed = make_model("gemma2", seed=rng_seed), batch()
    hidden = packed.hidden(LanguageModel(model))
    upstream = torch.randn_like(hidden)
    given = upstream.clone()
    hidden.backward(upstream, retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    hidden.backward(upstream)
    assert torch.equal(upstream, given) and once
    for name, gradient in once.items():
        assert relative_error(model.get_parameter(name).grad, 2 * gradient) < 1e-5, name


def test_frozen_products_keep_no_inputs(rng_seed):
    x, part = torch.randn(5, 4, requires_grad=True), LinearParts(weight := torch.randn(3, 4), None, (), weight)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda kept: kept
    ):
        (y,) = products(x, (part,))
    y.sum().backward()
    assert kept == [weight.shape]
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 4))


def test_second_derivatives_are_refused(rng_seed):
    model = make_model("llama", seed=rng_seed)
    hidden = batch().hidden(LanguageModel(model))
    parameters = [model.model.layers[1].mlp.down_proj.weight, model.model.norm.weight]
    for parameter in parameters:  # behind no attention
        (gradient,) = torch.autograd.grad(hidden.sum(), parameter, create_graph=True)
        with pytest.raises(RuntimeError, match="its gradients have no derivatives"):
            gradient.square().sum().backward(retain_graph=True)


def _unchanged(module, *args):
    return None


def _dropout(model):
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1


def _resid_dropout(model):
    model.model.layers[0].resid_dropout.p = 0.1


LEFT = {
    "forward hook": lambda model: model.model.layers[0].mlp.register_forward_hook(_unchanged),
    "forward pre-hook": lambda model: model.model.layers[0].register_forward_pre_hook(_unchanged),
    "backward hook": lambda model: model.model.layers[1].register_full_backward_hook(_unchanged),
    "backward pre-hook": lambda model: model.model.norm.register_full_backward_pre_hook(_unchanged),
    "replaced forward": lambda model: setattr(model.model.norm, "forward", model.model.norm.forward),
    "gradient checkpointing": checkpoint_activations,
    "dropout of attention": _dropout,
    "float16": lambda model: model.half(),
    "embeddings that a lookup shortens": lambda model: setattr(model.model.embed_tokens, "max_norm", 0.5),
    "gradients by how often a token comes": lambda model: setattr(model.model.embed_tokens, "scale_grad_by_freq", True),
    "sparse gradients": lambda model: setattr(model.model.embed_tokens, "sparse", True),
}


@pytest.mark.parametrize("reason", LEFT)
def test_left_to_the_modules(reason, used, rng_seed):
    """Whatever was seen of the model before."""
    model = make_model("llama", seed=rng_seed).train()
    lm, packed = LanguageModel(model), batch()
    packed.hidden(lm)
    assert lm.packed_by == "native"
    LEFT[reason](model)
    packed.hidden(lm)
    assert used == [True, False] and lm.packed_by == "modules"


@pytest.mark.parametrize("reason", ["gradient checkpointing", "dropout of attention"])
def test_what_only_training_does_is_no_matter_in_evaluation(reason, used, rng_seed):
    model = make_model("llama", seed=rng_seed).eval()
    LEFT[reason](model)
    batch().hidden(LanguageModel(model))
    assert used == [True]


def test_dropout_of_a_module(used, rng_seed):
    model = make_model("phi", seed=rng_seed).train()
    lm, packed = LanguageModel(model), batch()
    packed.hidden(lm)
    _resid_dropout(model)
    packed.hidden(lm)
    packed.hidden(LanguageModel(model.eval()))
    assert used == [True, False, True]


DROPS = [
    ("gpt2", {}),
    ("opt", {}),
    ("stablelm", {"hidden_dropout": 0.1}),
    ("starcoder2", {"embedding_dropout": 0.1}),
    ("starcoder2", {"residual_dropout": 0.1}),
]


@pytest.mark.parametrize(("family", "changes"), DROPS, ids=str)
def test_families_that_drop_in_training(family, changes, used, rng_seed):
    model = make_model(family, seed=rng_seed, **changes)
    lm, packed = LanguageModel(model.train()), batch()
    packed.hidden(lm)
    model.eval()
    packed.hidden(lm)
    assert used == [False, True]


UNKNOWN = [(family, {}) for family in sorted(set(FAMILIES) - set(KNOWN))] + [("stablelm", {"qk_layernorm": True})]


@pytest.mark.parametrize(("family", "changes"), UNKNOWN, ids=str)
def test_unknown_layers(family, changes, used, rng_seed):
    batch().hidden(LanguageModel(make_model(family, seed=rng_seed, **changes)))
    assert used == [False]


def test_bfloat16_where_it_is_fast_autocast_and_transforms(used, monkeypatch, rng_seed):
    lm, packed = LanguageModel(make_model("llama", seed=rng_seed)), batch()
    with torch.autocast("cpu", torch.bfloat16):
        packed.hidden(lm)
    torch.func.grad(lambda x: (x * packed.hidden(lm).detach()).sum())(torch.tensor(1.0))
    torch.compile(lambda: packed.hidden(lm), backend="eager")()
    packed.hidden(lm)
    monkeypatch.setattr(packed_layers, "has_fast_bfloat16", lambda: True)
    packed.hidden(lm)
    packed.hidden(LanguageModel(make_model("llama", seed=rng_seed).bfloat16()))
    assert used == [False, False, False, True, True, False]


def _patched(monkeypatch, module, changed):
    """Its class computes something else as a whole, which shows in the values alone."""
    cls = type(module)
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *args, **options: changed(forward(self, *args, **options)))


@pytest.mark.parametrize("factor", [1.1, 1])
def test_modules_that_compute_something_else(factor, used, monkeypatch, rng_seed):
    model = make_model("llama", seed=rng_seed)
    _patched(monkeypatch, model.model.layers[0].mlp, lambda x: factor * x)
    batch().hidden(LanguageModel(model))
    assert used == [factor == 1]


@pytest.mark.parametrize("part", ["input_layernorm", "self_attn", "mlp", "pre_feedforward_layernorm"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_modules_that_compute_something_else_in_bfloat16(family, part, used, monkeypatch, rng_seed):
    monkeypatch.setattr(packed_layers, "has_fast_bfloat16", lambda: False)
    model = make_model(family, seed=rng_seed).bfloat16()
    batch().hidden(LanguageModel(model))
    module = getattr(model.model.layers[0], part, model.model.norm)

    def changed(x):  # by no factor of all, of which a norm would take no notice
        hidden, *rest = x if isinstance(x, tuple) else (x,)
        hidden = torch.linspace(1, -1, hidden.shape[1])[:, None].to(hidden) * hidden
        return (hidden, *rest) if rest else hidden

    _patched(monkeypatch, module, changed)
    lm, packed = LanguageModel(model, check=False), batch()
    layers = model.model.layers
    hidden = packed.hidden(lm)
    assert used == [True, False] and lm.backbone.layers is layers and hidden.isfinite().all()


@pytest.mark.parametrize("family", KNOWN)
def test_one_layer_in_bfloat16_differs_by_less_than_half_the_tolerance(family, monkeypatch, rng_seed):
    """Which leaves room for weights other than these."""
    monkeypatch.setattr(packed_layers, "has_fast_bfloat16", lambda: False)
    monkeypatch.setattr(packed_layers, "ROUNDED", packed_layers.ROUNDED / 2)
    model = make_model(family, seed=rng_seed, **KNOWN[family]).bfloat16()
    lm = LanguageModel(model)
    batch().hidden(lm)
    assert lm.packed_by == "native"


def test_modules_that_hide_what_is_no_number(used, monkeypatch, rng_seed):
    model = make_model("llama", seed=rng_seed)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    mlp = type(model.model.layers[0].mlp)
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: forward(self, x).nan_to_num())
    batch().hidden(LanguageModel(model))
    assert used == [False]


def _backward_hook(model):
    return model.model.norm.register_full_backward_hook(_unchanged).remove


def _other_activation(model):
    """An activation of no known kind."""
    mlp = model.model.layers[0].mlp
    known, mlp.act_fn = mlp.act_fn, torch.nn.Tanh()
    return lambda: setattr(mlp, "act_fn", known)


@pytest.mark.parametrize("part", [_backward_hook, _other_activation])
def test_a_part_that_was_unknown_at_first(part, used, by_modules, monkeypatch, rng_seed):
    model, passes = make_model("llama", seed=rng_seed), []
    known = part(model)
    inner = packed_layers._observed
    monkeypatch.setattr(packed_layers, "_observed", lambda lm: passes.append(lm) or inner(lm))
    lm, packed = LanguageModel(model), batch()
    packed.hidden(lm), packed.hidden(lm)
    known()
    hidden = packed.hidden(lm)
    packed.hidden(lm)
    assert used == [False, False, True, True] and len(passes) == 2  # not for each batch
    torch.testing.assert_close(hidden, by_modules(lm, packed), rtol=1e-4, atol=1e-4)


def _other_scale(model):
    for layer in model.model.layers:
        layer.self_attn.scaling *= 0.5


def _other_window(model):
    model.config.sliding_window = 5


def _no_window(model):
    model.config.sliding_window = None


@pytest.mark.parametrize("change", [_other_scale, _other_window, _no_window])
def test_attention_that_changes_after_the_first_batch(change, used, by_modules, rng_seed):
    model = make_model("mistral", seed=rng_seed, sliding_window=2)
    lm, packed = LanguageModel(model), batch()
    first = packed.hidden(lm)
    change(model)
    second = packed.hidden(lm)
    assert used == [True, True] and not torch.allclose(first, second, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(second, by_modules(lm, packed), rtol=1e-4, atol=1e-4)


def test_a_model_is_looked_at_once(monkeypatch, rng_seed):
    model, passes = make_model("llama", seed=rng_seed), []
    lm, packed = LanguageModel(model), batch()
    inner = packed_layers._observed
    monkeypatch.setattr(packed_layers, "_observed", lambda lm: passes.append(lm) or inner(lm))
    packed.hidden(lm).sum().backward()
    with torch.no_grad():
        packed.hidden(LanguageModel(model, check=False))
        model.model.norm.weight.mul_(2)
        model.train()
        packed.hidden(lm)
    assert passes.count(lm) == 1 and len(passes) == 2


def test_threads_whose_first_batch_is_of_one_model(used, monkeypatch, rng_seed):
    """What is tried at first, of a bfloat16 model with one layer, none of them sees of another."""
    monkeypatch.setattr(packed_layers, "has_fast_bfloat16", lambda: False)
    model, packed, threads = make_model("llama", seed=rng_seed, num_hidden_layers=4).bfloat16(), batch(), 6
    layers, lms, together = model.model.layers, [LanguageModel(model) for _ in range(threads)], Barrier(threads)
    want = packed.hidden(LanguageModel(model))

    def first(lm):
        together.wait()
        return packed.hidden(lm)

    with ThreadPoolExecutor(threads) as pool:
        assert all(torch.equal(hidden, want) for hidden in pool.map(first, lms))
    assert model.model.layers is layers and len(layers) == 4 and used == [True] * (threads + 1)


def test_dtypes_that_change(used, rng_seed):
    model = make_model("llama", seed=rng_seed).half()
    lm, packed = LanguageModel(model), batch()
    packed.hidden(lm)
    model.float()
    packed.hidden(lm)
    model.model.embed_tokens.bfloat16()  # the modules then return what they are, float32
    assert packed.hidden(lm).dtype == torch.float32
    assert used == [False, True, False]


def test_a_model_that_moves_to_another_device(used, monkeypatch, rng_seed):
    lm, packed = LanguageModel(make_model("llama", seed=rng_seed)), batch()
    packed.hidden(lm)
    monkeypatch.setattr(LanguageModel, "device", torch.device("cuda"))  # which the modules here do not care about
    packed.hidden(lm)
    assert used == [True, False]


def test_whatever_torchs_default_device_is(used, by_modules, rng_seed):
    lm, packed = LanguageModel(make_model("llama", seed=rng_seed)), batch()
    with torch.device("meta"):
        hidden = packed.hidden(lm)
        hidden.sum().backward()
    assert used == [True]
    torch.testing.assert_close(hidden, by_modules(lm, packed), rtol=1e-4, atol=1e-4)


def test_without_the_compiled_module(used, monkeypatch, rng_seed):
    monkeypatch.setattr("pmc_fast.backend.missing_library", lambda: "not built")
    batch().hidden(LanguageModel(make_model("llama", seed=rng_seed)))
    assert used == [False]


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "gpt2"])
def test_lora_adapters(family, disabled, used, by_modules, rng_seed):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(family, seed=rng_seed, **KNOWN[family]), config).train()
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter += 0.1 * torch.randn_like(parameter)
    lm, packed = LanguageModel(model), batch()
    if disabled:  # as a reference model is
        with model.disable_adapter():
            hidden, want = packed.hidden(lm), by_modules(lm, packed)
        torch.testing.assert_close(hidden, want, rtol=1e-4, atol=1e-4)
        assert used == [True] and not hidden.requires_grad
        return
    hidden, want = packed.hidden(lm), by_modules(lm, packed)
    torch.testing.assert_close(hidden, want, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(want)
    got, want = gradients(model, hidden, upstream), gradients(model, want, upstream)
    assert used == [True]
    for name, gradient in want.items():
        assert (got[name] is None) == (gradient is None) == ("lora_" not in name)
        if gradient is not None:
            assert relative_error(got[name], gradient) < 1e-3, name


def test_lora_adapters_of_bfloat16(used, by_modules, monkeypatch, rng_seed):
    """On float32 weights: widened, where PEFT would round what comes to them and from them."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(packed_layers, "has_fast_bfloat16", lambda: False)
    config = peft.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(make_model("llama", seed=rng_seed), config).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    wide, packed = copy.deepcopy(model).float(), batch()
    lm = LanguageModel(model)
    hidden, rounded, want = packed.hidden(lm), by_modules(lm, packed), by_modules(LanguageModel(wide), packed)
    assert used == [True]
    exact = want.detach()
    assert relative_error(hidden.detach(), exact) < 1e-5 < 1e-4 < relative_error(rounded.detach(), exact)
    upstream = torch.randn_like(want)
    got, want = gradients(model, hidden, upstream), gradients(wide, want, upstream)
    for name, gradient in want.items():
        assert (got[name] is None) == (gradient is None) == ("lora_" not in name)
        if gradient is not None:
            assert got[name].dtype == torch.bfloat16 and relative_error(got[name], gradient) < 2**-8, name


def test_an_unknown_adapter_that_is_switched_and_unloaded(used, by_modules, rng_seed):
    peft = pytest.importorskip("peft")
    options = {"r": 3, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = peft.get_peft_model(make_model("llama", seed=rng_seed), peft.LoraConfig(use_dora=True, **options))
    model.add_adapter("plain", peft.LoraConfig(**options))
    lm, packed = LanguageModel(model), batch()
    packed.hidden(lm)
    model.set_adapter("plain")
    hidden = packed.hidden(lm)
    torch.testing.assert_close(hidden, by_modules(lm, packed), rtol=1e-4, atol=1e-4)
    model.set_adapter("default")
    packed.hidden(lm)
    whole = model.unload()
    again = LanguageModel(whole)
    packed.hidden(again)
    assert used == [False, True, False, True]
