"""Reads a model of a known kind as the norms and products that its layers are made of, for decoders of our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from pmc_fast.attention import AttentionCall
from pmc_fast.fast_linear import is_fast
from pmc_fast.models import LanguageModel
from pmc_fast.sharding import is_tensor_parallel, kind

# Layers of this form in transformers: h += attention(norm(h)), then h += down(silu(gate(norm(h))) * up(norm(h))).
GATED = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
# h += attention(norm(h)) + fc2(gelu(fc1(norm(h)))).
PARALLEL = ("PhiDecoderLayer",)

Norm, Linear = TypeVar("Norm"), TypeVar("Linear")


class Unknown(Exception):
    """A part of the model is not what this module reads."""


@dataclass(frozen=True)
class NormParts:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias; the mean is 0 unless `centered`."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float
    centered: bool


class Adapter(NamedTuple):
    """scale * (x @ down.T) @ up.T."""

    down: Tensor  # [r, D]
    up: Tensor  # [O, r]
    scale: float


@dataclass(frozen=True)
class LinearParts:
    """x @ weight.T + bias, and what LoRA adapters add."""

    weight: Tensor
    bias: Tensor | None
    adapters: tuple[Adapter, ...]


@dataclass(frozen=True)
class Layer(Generic[Norm, Linear]):
    """The parts of one layer; `mlp_norm` and `gate` are None in a parallel layer without a gate."""

    norm: Norm
    query: Linear
    key: Linear
    value: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    output: Linear
    mlp_norm: Norm | None
    gate: Linear | None
    up: Linear
    down: Linear
    attention: AttentionCall


@dataclass(frozen=True)
class Layers(Generic[Norm, Linear]):
    """A whole backbone."""

    embed: nn.Embedding
    rotary: nn.Module
    layers: list[Layer[Norm, Linear]]
    final: Norm
    head_dim: int


def read_layers(
    lm: LanguageModel,
    calls: list[AttentionCall],
    norm: Callable[[NormParts], Norm],
    linear: Callable[[LinearParts], Linear],
) -> Layers[Norm, Linear]:
    """The parts of the model's backbone.

    Args:
        calls: the attention calls of a pass through the model.
        norm, linear: make what a decoder calls of a norm's and of a product's parts.

    Raises:
        Unknown: one of the parts is of no known kind, or somebody watches or replaces it.
    """
    try:
        return _read_layers(lm, calls, norm, linear)
    except (AttributeError, ValueError) as error:  # a part is missing, or there is not one call per layer
        raise Unknown from error


def _read_layers(lm, calls, norm, linear) -> Layers:
    if is_hooked(lm) or is_tensor_parallel(lm.backbone):
        raise Unknown
    backbone = lm.backbone
    if kind(backbone.embed_tokens) is not nn.Embedding:
        raise Unknown
    layers = backbone.layers[: lm.model.config.num_hidden_layers]
    return Layers(
        embed=backbone.embed_tokens,
        rotary=backbone.rotary_emb,
        layers=[
            _layer(layer, call, lambda part: norm(_norm(part)), lambda part: linear(_linear(part)))
            for layer, call in zip(layers, calls, strict=True)
        ],
        final=norm(_norm(backbone.norm if hasattr(backbone, "norm") else backbone.final_layernorm)),
        head_dim=calls[0].head_dim,
    )


def is_hooked(lm: LanguageModel) -> bool:
    """Whether somebody but `fast_linear` watches or replaces what modules do; the head's is not called."""
    head = lm.head_module
    return any(
        module._forward_pre_hooks
        or not all(map(_only_asks_for_gradients, module._forward_hooks.values()))
        or ("forward" in vars(module) and not is_fast(module))
        for module in lm.model.modules()
        if module is not head
    )


def _only_asks_for_gradients(hook: Callable) -> bool:
    """Whether it is what transformers puts on the embedding to train adapters with gradient checkpointing."""
    name = f"{getattr(hook, '__module__', '')}.{getattr(hook, '__qualname__', '')}"
    return name == (
        "transformers.modeling_utils.PreTrainedModel.enable_input_require_grads.<locals>.make_inputs_require_grads"
    )


def _layer(layer: nn.Module, call: AttentionCall, norm: Callable, linear: Callable) -> Layer:
    cls, attention, mlp = kind(layer), layer.self_attn, layer.mlp
    if not cls.__module__.startswith("transformers.models.") or cls.__name__ not in GATED + PARALLEL:
        raise Unknown
    gated = cls.__name__ in GATED
    if getattr(attention, "qk_layernorm", False):
        raise Unknown
    if kind(mlp.act_fn if gated else mlp.activation_fn).__name__ != (
        "SiLUActivation" if gated else "NewGELUActivation"
    ):
        raise Unknown
    return Layer(
        norm=norm(layer.input_layernorm),
        query=linear(attention.q_proj),
        key=linear(attention.k_proj),
        value=linear(attention.v_proj),
        query_norm=norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        output=linear(attention.o_proj if gated else attention.dense),
        mlp_norm=norm(layer.post_attention_layernorm) if gated else None,
        gate=linear(mlp.gate_proj) if gated else None,
        up=linear(mlp.up_proj if gated else mlp.fc1),
        down=linear(mlp.down_proj if gated else mlp.fc2),
        attention=call,
    )


def _norm(module: nn.Module) -> NormParts:
    weight = module.weight.detach()
    if kind(module) is nn.LayerNorm:
        return NormParts(weight, None if module.bias is None else module.bias.detach(), module.eps, True)
    if not kind(module).__name__.endswith("RMSNorm"):
        raise Unknown
    return NormParts(weight, None, module.variance_epsilon, False)


def _linear(module: nn.Module) -> LinearParts:
    if kind(module) is nn.Linear:
        return LinearParts(module.weight.detach(), None if module.bias is None else module.bias.detach(), ())
    if (kind(module).__module__, kind(module).__name__) != ("peft.tuners.lora.layer", "Linear"):
        raise Unknown
    if kind(module.base_layer) is not nn.Linear or module.fan_in_fan_out or (module.merged and module.disable_adapters):
        raise Unknown
    base = _linear(module.base_layer)
    if module.merged or module.disable_adapters:
        return base
    names = [name for name in module.active_adapters if name in module.lora_A]
    if any(name in module.lora_variant for name in names):  # DoRA, say
        raise Unknown
    return replace(base, adapters=tuple(_adapter(module, name) for name in names))


def _adapter(module: nn.Module, name: str) -> Adapter:
    down, up = module.lora_A[name], module.lora_B[name]
    if any(kind(part) is not nn.Linear or part.bias is not None for part in (down, up)):
        raise Unknown
    return Adapter(down.weight.detach(), up.weight.detach(), module.scaling[name])
