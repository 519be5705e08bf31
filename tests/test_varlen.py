"""Attention over sequences end to end, by what a GPU has for it, and by stand-ins for torch's own and flash-attn elsewhere."""

import math

import pytest
import torch
from tiny import make_model

from pmc_fast import varlen
from pmc_fast.models import LanguageModel
from pmc_fast.packing import pack

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LENGTHS = (5, 1, 17, 8)


def stand_in(query, key, value, ends_q, ends_k, longest_q, longest_k, *, scale, window_size, enable_gqa=False):
    """torch.nn.attention.varlen.varlen_attn, as its documentation has it."""
    assert ends_q is ends_k and ends_q.dtype == torch.int32 and ends_q[0] == 0 and ends_q[-1] == len(query)
    assert longest_q == longest_k == int(ends_q.diff().max())
    assert enable_gqa or query.shape[1] == key.shape[1]
    return by_pieces(query, key, value, ends_q, window_size, scale, None)


def flash_stand_in(
    query, key, value, ends_q, ends_k, longest_q, longest_k, *, softmax_scale, causal, window_size, softcap
):
    """flash_attn.flash_attn_varlen_func, as its documentation has it."""
    assert causal and ends_q is ends_k and ends_q.dtype == torch.int32
    assert longest_q == longest_k == int(ends_q.diff().max())
    return by_pieces(query, key, value, ends_q, window_size, softmax_scale, softcap or None)


def by_pieces(query, key, value, ends_q, window_size, scale, softcap):
    left, right = window_size
    pieces = []
    for begin, end in zip(ends_q[:-1].tolist(), ends_q[1:].tolist(), strict=True):
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
        ahead = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = (ahead >= -right) & (ahead <= (left if left >= 0 else end))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        scores = capped(scale * q @ k.transpose(1, 2), softcap)
        pieces.append((scores.masked_fill(~seen, -math.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(pieces)


@pytest.fixture(params=["grouped", "repeated"])
def heads(request, monkeypatch):
    """Whether torch's function takes fewer heads of keys than of queries; before 2.12 it does not say so."""
    monkeypatch.setattr(varlen, "flash_attn_varlen_func", None)
    if not GPU:
        monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    known = {"scale", "window_size"} | ({"enable_gqa"} if request.param == "grouped" else set())
    if GPU and not known <= varlen._parameters():
        pytest.skip("this torch's function lacks what is asked of it")
    monkeypatch.setattr(varlen, "_parameters", lambda: known)


def capped(scores, softcap):
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def exact(query, key, value, window, scale, softcap=None):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    sequence = torch.arange(len(LENGTHS), device=query.device).repeat_interleave(torch.tensor(LENGTHS).to(query.device))
    ahead = torch.arange(sum(LENGTHS), device=query.device)
    ahead = ahead[:, None] - ahead
    seen = (sequence[:, None] == sequence) & (ahead >= 0) & (ahead < (window or sum(LENGTHS)))
    scores = capped(scale * query @ key.transpose(2, 3), softcap)
    return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_values_and_gradients(kv_heads, window, heads, rng_seed):
    agrees(kv_heads, window, None)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_flash_attn_where_it_is_installed(kv_heads, window, softcap, monkeypatch, rng_seed):
    if not GPU:
        monkeypatch.setattr(varlen, "flash_attn_varlen_func", flash_stand_in)
    elif varlen.flash_attn_varlen_func is None:
        pytest.skip("flash-attn is not installed")
    agrees(kv_heads, window, softcap)


def agrees(kv_heads, window, softcap):
    dtype = torch.bfloat16 if GPU else torch.float64
    shapes = [(1, count, sum(LENGTHS), 32) for count in (6, kv_heads, kv_heads)]
    inputs = [torch.randn(shape).to(DEVICE, dtype).requires_grad_() for shape in shapes]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    tokens = (x[0].transpose(0, 1) for x in inputs)
    got, want = varlen.attend(*tokens, LENGTHS, window, 0.3, softcap)[None], exact(*wide, window, 0.3, softcap)
    upstream = torch.randn_like(want)
    got.backward(upstream.to(dtype))
    want.backward(upstream)
    tolerance = 0.02 if GPU else 1e-10
    for mine, its in ((got, want), *((a.grad, b.grad) for a, b in zip(inputs, wide, strict=True))):
        # a token that sees only itself has gradients of 0, and of rounding errors for its query and key
        assert mine.shape == its.shape and (mine.double() - its).norm() <= tolerance * its.norm().clamp(min=1e-2)


def test_what_it_takes(monkeypatch):
    monkeypatch.setattr(varlen, "flash_attn_varlen_func", None)
    device, known = torch.device(DEVICE), GPU and {"scale", "window_size"} <= varlen._parameters()
    assert varlen.takes(device, torch.bfloat16, 64, None) == known
    for dtype, dim in ((torch.float32, 64), (torch.bfloat16, 12), (torch.bfloat16, 320)):
        assert not varlen.takes(device, dtype, dim, None)
    assert not varlen.takes(device, torch.bfloat16, 64, 2.0)
    monkeypatch.setattr(varlen, "_parameters", set)
    assert not varlen.takes(device, torch.bfloat16, 64, None)
    monkeypatch.setattr(varlen, "flash_attn_varlen_func", flash_stand_in)
    assert varlen.takes(device, torch.bfloat16, 64, 2.0) == varlen.takes(device, torch.bfloat16, 64, None) == GPU


@torch.no_grad()
def test_values_of_another_size_than_keys_go_another_way(monkeypatch, rng_seed):
    model = make_model("deepseek_v3", seed=rng_seed)
    packed, ids = pack([[1, 2, 3], [4]], [[5, 6], [7]]), [[1, 2, 3, 5], [4]]
    monkeypatch.setattr(varlen, "takes", lambda *args: True)
    monkeypatch.setattr(varlen, "attend", None)
    lm = LanguageModel(model)
    hidden = packed.hidden(lm)
    assert lm.packed_by == "modules"
    want = [
        model.model(torch.tensor([row])).last_hidden_state[0, -count:] for row, count in zip(ids, (2, 1), strict=True)
    ]
    torch.testing.assert_close(hidden, torch.cat(want), rtol=1e-4, atol=1e-4)


def test_what_inference_asked_for_first_serves_backward_passes():
    varlen._ends.cache_clear()
    with torch.inference_mode():
        varlen._ends((3, 2), torch.device(DEVICE))
    ends = varlen._ends((3, 2), torch.device(DEVICE))
    assert ends.tolist() == [0, 3, 5] and not ends.is_inference()
