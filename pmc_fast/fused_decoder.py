"""Decodes a model of a known kind by this library's own CPU kernels: one token per row, from packed weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pmc_fast.attention import AttentionCall
from pmc_fast.cache import SampleCache
from pmc_fast.fast_linear import packed
from pmc_fast.models import LanguageModel
from pmc_fast.native.decode_attention import decode_attention
from pmc_fast.native.elementwise import activate, normalize, rotate
from pmc_fast.native.packed_linear import PackedWeight, packed_linear

# Layers of this form in transformers: h += attention(norm(h)), then h += down(silu(gate(norm(h))) * up(norm(h))).
GATED = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
# h += attention(norm(h)) + fc2(gelu(fc1(norm(h)))).
PARALLEL = ("PhiDecoderLayer",)


class _Unknown(Exception):
    """A part of the model is not what this module computes."""


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    bias: Tensor | None
    epsilon: float
    centered: bool

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return normalize(x, self.weight, self.bias, self.epsilon, centered=self.centered, out=out)


@dataclass(frozen=True)
class _Linear:
    weight: PackedWeight
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.weight, self.bias)

    def add_to(self, total: Tensor, x: Tensor) -> None:
        packed_linear(x, self.weight, self.bias, total, accumulate=True)


@dataclass(frozen=True)
class _Layer:
    """The parts of one layer; `mlp_norm` and `gate` are None in a parallel layer without a gate."""

    norm: _Norm
    query: _Linear
    key: _Linear
    value: _Linear
    query_norm: _Norm | None
    key_norm: _Norm | None
    output: _Linear
    mlp_norm: _Norm | None
    gate: _Linear | None
    up: _Linear
    down: _Linear
    attention: AttentionCall


class FusedDecoder:
    """The layers of a model, read once for the time of a sampling call. See `fused_decoder`."""

    def __init__(self, lm: LanguageModel, calls: list[AttentionCall]) -> None:
        backbone = lm.backbone
        if lm.device.type != "cpu" or _is_hooked(lm.model):
            raise _Unknown
        self._embed, self._rotary = backbone.embed_tokens, backbone.rotary_emb
        self._final = _norm(backbone.norm if hasattr(backbone, "norm") else backbone.final_layernorm)
        self._dtype, self._head_dim = self._embed.weight.dtype, calls[0].head_dim
        if type(self._embed) is not nn.Embedding:
            raise _Unknown
        layers = backbone.layers[: lm.model.config.num_hidden_layers]
        self._layers = [_layer(layer, call) for layer, call in zip(layers, calls, strict=True)]

    def step(self, token: Tensor, position: Tensor, cache: SampleCache, first: Tensor, prefix_row: Tensor) -> Tensor:
        """The last hidden states [N, D] of one more token per row, whose keys and values join the cache.

        Args:
            token, position: int64 [N].
            cache: holds what came before, the prompts once for all their rows.
            first: int64 [N], the first position that a row sees.
            prefix_row: int64 [N], each row's prompt.
        """
        embedded = self._embed(token[:, None])
        cosine, sine = (x[:, 0].float().contiguous() for x in self._rotary(embedded, position_ids=position[:, None]))
        hidden = embedded[:, 0].float()
        for layer, held in zip(self._layers, cache.layers, strict=True):
            x = layer.norm(hidden)
            query, key, value = (self._heads(part(x)) for part in (layer.query, layer.key, layer.value))
            for states, norm in ((query, layer.query_norm), (key, layer.key_norm)):
                if norm is not None:
                    norm(states.view(-1, self._head_dim), out=states.view(-1, self._head_dim))
            turned = rotate(query, cosine, sine, torch.empty_like(query, dtype=self._dtype))
            key_slot, value_slot = held.next_position()
            rotate(key, cosine, sine, key_slot)
            value_slot.copy_(value)
            call = layer.attention
            attended = decode_attention(
                turned,
                *held.filled(),
                held.first_seen(first, call.window),
                scale=self._head_dim**-0.5 if call.scaling is None else call.scaling,
                softcap=call.softcap,
                prefix_key=held.prefix_keys,
                prefix_value=held.prefix_values,
                prefix_row=prefix_row,
            )
            layer.output.add_to(hidden, attended.flatten(1).float())
            if layer.mlp_norm is not None:
                x = layer.mlp_norm(hidden)
            if layer.gate is None:
                wide = activate(layer.up(x), "gelu_tanh")
            else:
                wide = activate(layer.gate(x), "silu", layer.up(x))
            layer.down.add_to(hidden, wide)
        return self._final(hidden).to(self._dtype)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self._head_dim)


def fused_decoder(lm: LanguageModel, calls: list[AttentionCall]) -> FusedDecoder | None:
    """A decoder for this model, or None if one of its parts is not known or not packed by `fast_linear`.

    Args:
        calls: the attention calls of a pass through the model.
    """
    try:
        return FusedDecoder(lm, calls)
    except (_Unknown, AttributeError, ValueError):  # a part is missing, or there is not one call per layer
        return None


def _is_hooked(model: nn.Module) -> bool:
    """Whether somebody watches or replaces what modules do; `fast_linear` replaces that of nn.Linear."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or ("forward" in vars(module) and type(module) is not nn.Linear)
        for module in model.modules()
    )


def _layer(layer: nn.Module, call: AttentionCall) -> _Layer:
    kind, attention, mlp = type(layer).__name__, layer.self_attn, layer.mlp
    if not type(layer).__module__.startswith("transformers.models.") or kind not in GATED + PARALLEL:
        raise _Unknown
    gated = kind in GATED
    if getattr(attention, "qk_layernorm", False):
        raise _Unknown
    if type(mlp.act_fn if gated else mlp.activation_fn).__name__ != (
        "SiLUActivation" if gated else "NewGELUActivation"
    ):
        raise _Unknown
    return _Layer(
        norm=_norm(layer.input_layernorm),
        query=_linear(attention.q_proj),
        key=_linear(attention.k_proj),
        value=_linear(attention.v_proj),
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        output=_linear(attention.o_proj if gated else attention.dense),
        mlp_norm=_norm(layer.post_attention_layernorm) if gated else None,
        gate=_linear(mlp.gate_proj) if gated else None,
        up=_linear(mlp.up_proj if gated else mlp.fc1),
        down=_linear(mlp.down_proj if gated else mlp.fc2),
        attention=call,
    )


def _linear(module: nn.Linear) -> _Linear:
    weight = packed(module.weight) if type(module) is nn.Linear else None
    if weight is None:
        raise _Unknown
    return _Linear(weight, None if module.bias is None else module.bias.detach().float())


def _norm(module: nn.Module) -> _Norm:
    weight = module.weight.detach().float()
    if type(module) is nn.LayerNorm:
        return _Norm(weight, None if module.bias is None else module.bias.detach().float(), module.eps, True)
    if not type(module).__name__.endswith("RMSNorm"):
        raise _Unknown
    return _Norm(weight, None, module.variance_epsilon, False)
