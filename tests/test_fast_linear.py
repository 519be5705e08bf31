"""nn.Linear by the faster library: the same values, and nothing of the model changed for good."""

import io

import pytest
import torch
from tiny import make_model
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pmc_fast import fast_linear as the_module
from pmc_fast.cli import main
from pmc_fast.fast_linear import _multiply_unseen, add_linear, fast_linear, is_fast, linear, operand, packed, scratch
from pmc_fast.native.packed_linear import packed_bytes


@pytest.fixture(params=["Intel's", "another's"])
def cpu(request, monkeypatch):
    """The libraries that `linear` takes on either, and both of them for so few rows."""
    monkeypatch.setattr(the_module, "_is_intel", lambda: request.param == "Intel's")
    monkeypatch.setattr(the_module, "MKL_ROWS", 4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 3, 65), (0, 5), (4, 1, 576)])
def test_values(shape, dtype, bias, cpu, rng_seed):
    x, weight = torch.randn(shape).to(dtype), torch.randn(19, shape[-1]).to(dtype)
    b = torch.randn(19).to(dtype) if bias else None
    with torch.no_grad():
        got = linear(x, weight, b)
    assert got.dtype == dtype and got.shape == (*shape[:-1], 19)
    if dtype == torch.float32:
        want = F.linear(x.double(), weight.double(), None if b is None else b.double())
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    else:
        assert torch.equal(got, F.linear(x, weight, b))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_a_product_is_written_or_added_where_it_belongs(rows, dtype, cpu, rng_seed):
    x, weight, b = torch.randn(rows, 33).to(dtype), torch.randn(19, 33).to(dtype), torch.randn(19).to(dtype)
    memory = torch.full((rows, 40), torch.nan, dtype=dtype)
    for bias in (b, None):
        assert linear(x, weight, bias, out=memory[:, 5:24]).data_ptr() == memory[:, 5:24].data_ptr()
        torch.testing.assert_close(memory[:, 5:24], F.linear(x, weight, bias))
    assert memory[:, :5].isnan().all() and memory[:, 24:].isnan().all()
    total = torch.randn(rows, 19)  # float32
    want = total + F.linear(x, weight)
    add_linear(x, weight, total)
    torch.testing.assert_close(total, want)


def test_strides_do_not_matter(cpu, rng_seed):
    x, weight = torch.randn(40, 9).T, torch.randn(80, 40)[::2, :]
    torch.testing.assert_close(linear(x[:, :40], weight), F.linear(x[:, :40], weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear(x, weight.T.contiguous().T), F.linear(x, weight), rtol=1e-5, atol=1e-5)
    b = torch.randn(80)[::2]
    torch.testing.assert_close(linear(x, weight, b), F.linear(x, weight, b), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("multiply", [linear, lambda x, weight: add_linear(x, weight, torch.zeros(3, len(weight)))])
def test_onednn_is_given_no_weight_with_gaps(multiply, cpu, monkeypatch, rng_seed):
    """Which it multiplies, a thousand times as slowly: a slice of columns, of a transposed weight's rows, every other row."""
    given, inner = [], the_module._onednn
    monkeypatch.setattr(the_module, "_onednn", lambda x, weight, bias: given.append(weight) or inner(x, weight, bias))
    x, w = torch.randn(3, 8), torch.randn(20, 20)
    for weight in (w[:, 3:11], w[:8].T[5:15], w[::2, :8]):
        multiply(x, weight)
    assert given == []
    monkeypatch.setattr(the_module, "_is_intel", lambda: False)
    for weight in (w[:, :8].contiguous(), w[:8].T):
        multiply(x, weight)
    assert len(given) == 2


@torch.no_grad()
def test_the_model_computes_the_same_and_is_left_as_it_was(rng_seed):
    model, ids = make_model(seed=rng_seed), torch.randint(0, 256, (2, 7))
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    want, calls = model(ids).logits, []
    hook = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(KeyError), fast_linear(model):
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
        raise KeyError
    assert calls == [1]
    hook.remove()
    assert {name: dict(vars(module)) for name, module in model.named_modules()}.keys() == before.keys()
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
    assert torch.equal(model(ids).logits, want)


def test_layers_with_a_forward_of_their_own_keep_it(rng_seed):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    patched = nn.Linear(3, 3)
    patched.forward = lambda x: x
    model = nn.Sequential(Doubled(3, 3), patched)
    x = torch.randn(5, 3)
    with torch.no_grad(), fast_linear(model):
        assert torch.equal(model(x), 2 * F.linear(x, model[0].weight, model[0].bias))
    assert "forward" in vars(patched) and "forward" not in vars(model[0])


@torch.no_grad()
@pytest.mark.parametrize("packs", [0, 1, 2])
def test_bfloat16_without_instructions_for_it_is_multiplied_as_float32(packs, monkeypatch, rng_seed):
    monkeypatch.setattr(the_module, "has_fast_bfloat16", lambda: False)
    layers = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 33, bias=False)).bfloat16()
    room = sum(packed_bytes(layer.weight) for layer in layers[:packs])
    monkeypatch.setattr(the_module, "free_bytes", lambda device: room / the_module.PACKED_SHARE)
    x = torch.randn(5, 32).bfloat16()
    with fast_linear(layers):
        got = layers(x)
        assert [packed(layer.weight) is not None for layer in layers] == [packs > 0, packs > 1]
    middle = F.linear(x.double(), layers[0].weight.double(), layers[0].bias.double()).bfloat16()
    want = F.linear(middle.double(), layers[1].weight.double())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=1e-3)  # one of the middle may round the other way


@torch.no_grad()
@pytest.mark.parametrize("room", [True, False], ids=["room", "no room"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_keep_their_weight_transposed_are_multiplied_from_a_copy(dtype, room, monkeypatch, rng_seed):
    monkeypatch.setattr(the_module, "has_fast_bfloat16", lambda: False)
    monkeypatch.setattr(the_module, "free_bytes", lambda device: 2**30 * room)
    layer, x = Conv1D(48, 32), torch.randn(2, 5, 32)
    layer.weight.normal_(), layer.bias.normal_()
    layer, x = layer.to(dtype), x.to(dtype)
    with fast_linear(layer):
        got = layer(x)
        assert is_fast(layer) == room == (packed(layer.weight.T) is not None)
    assert not is_fast(layer) and got.dtype == dtype
    want = x.double() @ layer.weight.double() + layer.bias.double()
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), want, rtol=rounding, atol=10 * rounding)


@torch.no_grad()
@pytest.mark.parametrize("room", [True, False], ids=["room", "no room"])
@pytest.mark.parametrize("rounds", [True, False], ids=["rounded", "not rounded"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast bfloat16", "slow bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_which_product_a_layer_takes(dtype, fast, rounds, room, monkeypatch, rng_seed):
    """The library's own from a copy, or in place of one of bfloat16 that is slow or takes rounded inputs; what is left to torch has no
    operand either."""
    monkeypatch.setattr(the_module, "has_fast_bfloat16", lambda: fast)
    monkeypatch.setattr(the_module, "rounds_inputs", lambda: rounds)
    monkeypatch.setattr(the_module, "free_bytes", lambda device: 2**30 * room)
    taken = []
    for name in ("packed_linear", "_onednn"):
        product = getattr(the_module, name)
        monkeypatch.setattr(
            the_module, name, lambda *args, name=name, product=product: taken.append(name) or product(*args)
        )
    layer, head = nn.Linear(7, 5, dtype=dtype), torch.randn(9, 7, dtype=dtype)
    gains = dtype == torch.float32 or (dtype == torch.bfloat16 and (rounds or not fast))
    with fast_linear(layer, head):
        layer(torch.randn(3, 7, dtype=dtype))
        for weight in (layer.weight, head):
            assert (packed(weight) is not None) == (gains and room)
            assert (operand(weight) is not None) == gains
            assert not gains or operand(weight).rounded == (rounds and dtype == torch.bfloat16)
    own = room or dtype == torch.bfloat16
    assert taken == (["packed_linear" if own else "_onednn"] if gains else [])


@torch.no_grad()
@pytest.mark.parametrize(("rows", "fast", "own"), [(3, True, True), (4, True, False), (4, False, True)])
def test_many_rows_of_bfloat16_are_torchs_where_it_is_fast(rows, fast, own, monkeypatch, rng_seed):
    monkeypatch.setattr(the_module, "TORCH_ROWS", 4)
    monkeypatch.setattr(the_module, "has_fast_bfloat16", lambda: fast)
    monkeypatch.setattr(the_module, "rounds_inputs", lambda: True)
    taken, product = [], the_module.packed_linear
    monkeypatch.setattr(the_module, "packed_linear", lambda *args: taken.append(args) or product(*args))
    layer, x = nn.Linear(7, 5).bfloat16(), torch.randn(1, rows, 7).bfloat16()
    with fast_linear(layer):
        got = layer(x)
    assert bool(taken) == own and got.dtype == torch.bfloat16
    torch.testing.assert_close(got, layer(x), rtol=2**-7, atol=1e-3)


def test_a_copy_is_of_one_view_of_the_memory(rng_seed):
    weight = torch.randn(9, 9)
    with fast_linear(nn.Identity(), weight):
        assert packed(weight) is packed(weight[:]) is not None
        for other in (weight.T, weight[:8], weight[1:], weight.view(torch.int32), weight.clone()):
            assert packed(other) is None


@pytest.mark.parametrize(
    ("supported", "amx", "vendor", "fast"),
    [
        (False, False, "AuthenticAMD", False),
        (True, False, "AuthenticAMD", True),
        (True, False, "GenuineIntel", False),
        (True, True, "GenuineIntel", True),
    ],
)
def test_where_bfloat16_is_fast(supported, amx, vendor, fast, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(the_module, "_is_intel", the_module._is_intel.__wrapped__)
    monkeypatch.setattr("builtins.open", lambda *_, **__: io.StringIO(f"processor\t: 0\nvendor_id\t: {vendor}\n"))
    assert the_module.has_fast_bfloat16.__wrapped__() == fast


@pytest.mark.parametrize(
    ("has", "vendor", "missing", "rounds"),
    [
        (True, "AuthenticAMD", None, True),
        (False, "AuthenticAMD", None, False),
        (True, "GenuineIntel", None, False),
        (True, "AuthenticAMD", "it was not built", False),
    ],
)
def test_where_inputs_are_rounded(has, vendor, missing, rounds, monkeypatch):
    monkeypatch.setattr(the_module, "multiplies_bfloat16", lambda: has)
    monkeypatch.setattr(the_module, "_is_intel", lambda: vendor == "GenuineIntel")
    monkeypatch.setattr(the_module, "missing_library", lambda: missing)
    assert the_module.rounds_inputs() == rounds


@pytest.mark.parametrize(
    ("rounds", "fast", "said"),
    [
        (True, True, "sampled by this library's products of pairs, trained by torch's products"),
        (False, True, "sampled and trained by torch's products"),
        (False, False, "sampled and trained by products of float32"),
    ],
)
def test_doctor_says_how_bfloat16_is_multiplied(rounds, fast, said, monkeypatch, capsys):
    monkeypatch.setattr(the_module, "rounds_inputs", lambda: rounds)
    monkeypatch.setattr(the_module, "has_fast_bfloat16", lambda: fast)
    assert main(["doctor"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bfloat16")]
    assert line.removeprefix("bfloat16").strip() == said


def test_an_older_instruction_set_has_none_for_pairs(isa):
    assert not the_module.multiplies_bfloat16() or isa == "avx512"


def test_memory_is_kept_until_the_block_ends():
    with fast_linear(nn.Identity()):
        memory = scratch(3, 50, torch.float32)
        assert memory.shape == (3, 50) and memory.dtype == torch.float32
        address = memory.data_ptr()
        del memory
        less = scratch(1, 50, torch.bfloat16)
        assert less.data_ptr() == address and less.shape == (1, 50) and less.dtype == torch.bfloat16
        assert scratch(4, 50, torch.float32).shape == (4, 50)
    apart = [scratch(3, 50, torch.float32) for _ in range(2)]
    assert apart[0].data_ptr() != apart[1].data_ptr()


def test_weights_are_packed_again_in_the_next_block(rng_seed):
    layer, x = nn.Linear(9, 5), torch.randn(3, 9)
    for _ in range(2):
        with torch.no_grad():
            layer.weight.copy_(torch.randn(5, 9))
            with fast_linear(layer):
                torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_compiler_sees_what_comes_out(dtype, bias, rng_seed):
    layer = nn.Linear(7, 13, bias=bias, dtype=dtype).requires_grad_(False)
    with torch.no_grad(), fast_linear(layer):
        arguments = (torch.randn(2, 5, 7, dtype=dtype), layer.weight, layer.bias)
        torch.library.opcheck(_multiply_unseen, arguments, test_utils=("test_schema", "test_faketensor"))
        assert torch.equal(_multiply_unseen(*arguments), layer(arguments[0]))
