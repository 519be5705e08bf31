"""Reads a model of a known kind as the norms and products that its layers are made of, for decoders of our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pmc_fast.attention import AttentionCall
from pmc_fast.fast_linear import is_fast
from pmc_fast.models import LanguageModel
from pmc_fast.sharding import is_tensor_parallel, kind

# Layers of transformers, and what they call their norms: before attention, after it, before the MLP, after it.
_BEFORE = ("input_layernorm", None, "post_attention_layernorm", None)
_AROUND = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
NORMS = {
    "GemmaDecoderLayer": _BEFORE,
    "Gemma2DecoderLayer": _AROUND,
    "Gemma3DecoderLayer": _AROUND,
    "GraniteDecoderLayer": _BEFORE,
    "LlamaDecoderLayer": _BEFORE,
    "MistralDecoderLayer": _BEFORE,
    "Olmo2DecoderLayer": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "PhiDecoderLayer": ("input_layernorm", None, None, None),
    "Phi3DecoderLayer": _BEFORE,
    "Qwen2DecoderLayer": _BEFORE,
    "Qwen3DecoderLayer": _BEFORE,
}
PARALLEL = ("PhiDecoderLayer",)
ACTIVATIONS = {"SiLUActivation": "silu", "NewGELUActivation": "gelu_tanh", "GELUTanh": "gelu_tanh"}

Norm, Linear = TypeVar("Norm"), TypeVar("Linear")


class Unknown(Exception):
    """A part of the model is not what this module reads."""


@dataclass(frozen=True)
class NormParts:
    """(x - mean) / sqrt(variance + epsilon) * (weight + offset) + bias; the mean is 0 unless `centered`."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float
    centered: bool
    offset: float


class Adapter(NamedTuple):
    """scale * (x @ down.T) @ up.T."""

    down: Tensor  # [r, D]
    up: Tensor  # [O, r]
    scale: float


@dataclass(frozen=True)
class LinearParts:
    """x @ weight.T + bias, and what LoRA adapters add; the weight is `whole`, or its rows from `begin` on."""

    weight: Tensor
    bias: Tensor | None
    adapters: tuple[Adapter, ...]
    whole: Tensor
    begin: int = 0

    def split(self, *sizes: int) -> list[LinearParts]:
        """Products of so many outputs each."""
        return [self._rows(slice(end - size, end)) for size, end in zip(sizes, accumulate(sizes), strict=True)]

    def _rows(self, rows: slice) -> LinearParts:
        bias = None if self.bias is None else self.bias[rows]
        adapters = tuple(adapter._replace(up=adapter.up[rows]) for adapter in self.adapters)
        return LinearParts(self.weight[rows], bias, adapters, self.whole, self.begin + rows.start)


@dataclass(frozen=True)
class Embedding:
    """scale * weight[token] in float32; the row of `padding` gets no gradient."""

    weight: Tensor
    scale: float
    padding: int | None

    def __call__(self, token: Tensor) -> Tensor:
        rows = nn.functional.embedding(token, self.weight, self.padding).float()
        return rows if self.scale == 1 else rows * self.scale


@dataclass(frozen=True)
class Angles:
    """Rotary embeddings: of each kind that layers name, or the only one (None)."""

    rotary: nn.Module
    kinds: tuple[str | None, ...]

    def __call__(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions int64 [N] as a model of this dtype has them, float32 [K, N, R]."""
        like = torch.empty(0, dtype=dtype, device=position.device)
        each = [self.rotary(like, position[None], *(() if kind is None else (kind,))) for kind in self.kinds]
        cosine, sine = (torch.cat(angles).float() for angles in zip(*each, strict=True))
        return cosine, sine


@dataclass(frozen=True)
class Layer(Generic[Norm, Linear]):
    """h += output_norm(output(attention(x))) with x = norm(h), then h += down_norm(down(activation(gate(y)) * up(y))).

    y is mlp_norm(h), or x if the layer is `parallel`. Norms that are None change nothing; without a gate it is
    activation(up(y)).
    """

    norm: Norm | None
    query: Linear
    key: Linear
    value: Linear
    query_norm: Norm | None  # as wide as a head or as all of them, like key_norm
    key_norm: Norm | None
    output: Linear
    output_norm: Norm | None
    parallel: bool
    mlp_norm: Norm | None
    gate: Linear | None
    up: Linear
    activation: str  # "silu" or "gelu_tanh"
    down: Linear
    down_norm: Norm | None
    rotary: int  # which of the backbone's angles
    attention: AttentionCall


@dataclass(frozen=True)
class Layers(Generic[Norm, Linear]):
    """A whole backbone."""

    embed: Embedding
    angles: Angles
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
        read = _read_layers(lm, calls)
    except (AttributeError, ValueError) as error:  # a part is missing, or there is not one call per layer
        raise Unknown from error

    def made(part):
        if isinstance(part, NormParts):
            return norm(part)
        return linear(part) if isinstance(part, LinearParts) else part

    layers = [Layer(**{name: made(part) for name, part in vars(layer).items()}) for layer in read.layers]
    return replace(read, layers=layers, final=norm(read.final))


def _read_layers(lm: LanguageModel, calls: list[AttentionCall]) -> Layers[NormParts, LinearParts]:
    if is_hooked(lm) or is_tensor_parallel(lm.backbone):
        raise Unknown
    backbone = lm.backbone
    modules = backbone.layers[: lm.model.config.num_hidden_layers]
    (unit,) = {getattr(module, "residual_multiplier", 1.0) for module in modules}
    if not unit > 0:
        raise Unknown
    rotary = backbone.rotary_emb
    angles = Angles(rotary, tuple(rotary.rope_type) if isinstance(rotary.rope_type, dict) else (None,))
    final = _norm(backbone.norm if hasattr(backbone, "norm") else backbone.final_layernorm)
    return Layers(
        embed=_embedding(backbone, unit),
        angles=angles,
        layers=[_layer(module, call, angles, unit) for module, call in zip(modules, calls, strict=True)],
        final=_in_units(final, unit),
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


def _embedding(backbone: nn.Module, unit: float) -> Embedding:
    embed, scaled = backbone.embed_tokens, kind(backbone.layers[0]).__name__.startswith("Gemma")
    known = kind(embed).__name__.endswith("TextScaledWordEmbedding") if scaled else kind(embed) is nn.Embedding
    if not known or embed.max_norm is not None or embed.scale_grad_by_freq or embed.sparse:
        raise Unknown
    weight = embed.weight
    scale = embed.embed_scale.to(weight.dtype).item() if scaled else getattr(backbone, "embedding_multiplier", 1.0)
    return Embedding(weight, scale / unit, embed.padding_idx)


def _in_units(norm: NormParts | None, unit: float) -> NormParts | None:
    """What it makes of h, given h / unit.

    Granite adds unit * f(norm(h)) to h. So that a decoder can add f(norm(h)), it keeps h / unit, of whose scale a norm takes
    no notice but for its epsilon.
    """
    return None if norm is None else replace(norm, epsilon=norm.epsilon / unit**2)


def _layer(layer: nn.Module, call: AttentionCall, angles: Angles, unit: float) -> Layer[NormParts, LinearParts]:
    cls, attention, mlp = kind(layer), layer.self_attn, layer.mlp
    if not cls.__module__.startswith("transformers.models.") or cls.__name__ not in NORMS:
        raise Unknown
    if getattr(attention, "qk_layernorm", False):
        raise Unknown
    activation = kind(mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn).__name__
    if activation not in ACTIVATIONS:
        raise Unknown
    norm, output_norm, mlp_norm, down_norm = (name and _norm(getattr(layer, name)) for name in NORMS[cls.__name__])
    query, key, value = _query_key_value(attention)
    gate, up, down = _gate_up_down(mlp)
    return Layer(
        norm=_in_units(norm, unit),
        query=query,
        key=key,
        value=value,
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        output=_linear(attention.o_proj if hasattr(attention, "o_proj") else attention.dense),
        output_norm=output_norm,
        parallel=cls.__name__ in PARALLEL,
        mlp_norm=_in_units(mlp_norm, unit),
        gate=gate,
        up=up,
        activation=ACTIVATIONS[activation],
        down=down,
        down_norm=down_norm,
        rotary=0 if angles.kinds == (None,) else angles.kinds.index(attention.layer_type),
        attention=call,
    )


def _query_key_value(attention: nn.Module) -> list[LinearParts]:
    if not hasattr(attention, "qkv_proj"):
        return [_linear(attention.q_proj), _linear(attention.k_proj), _linear(attention.v_proj)]
    whole, keys = _linear(attention.qkv_proj), attention.num_key_value_heads * attention.head_dim
    return whole.split(len(whole.weight) - 2 * keys, keys, keys)


def _gate_up_down(mlp: nn.Module) -> tuple[LinearParts | None, LinearParts, LinearParts]:
    if hasattr(mlp, "fc1"):
        return None, _linear(mlp.fc1), _linear(mlp.fc2)
    if hasattr(mlp, "gate_up_proj"):
        whole = _linear(mlp.gate_up_proj)
        gate, up = whole.split(*[len(whole.weight) // 2] * 2)
    else:
        gate, up = _linear(mlp.gate_proj), _linear(mlp.up_proj)
    return gate, up, _linear(mlp.down_proj)


def _norm(module: nn.Module) -> NormParts:
    weight, name = module.weight, kind(module).__name__
    if kind(module) is nn.LayerNorm:
        return NormParts(weight, module.bias, module.eps, True, 0.0)
    if not name.endswith("RMSNorm"):
        raise Unknown
    if name.startswith("Gemma"):
        return NormParts(weight, None, module.eps, False, 1.0)
    return NormParts(weight, None, module.variance_epsilon, False, 0.0)


def _linear(module: nn.Module) -> LinearParts:
    if kind(module) is nn.Linear:
        return LinearParts(module.weight, module.bias, (), module.weight)
    if (kind(module).__module__, kind(module).__name__) != ("peft.tuners.lora.layer", "Linear"):
        raise Unknown
    if kind(module.base_layer) is not nn.Linear or (module.merged and module.disable_adapters):
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
    return Adapter(down.weight, up.weight, module.scaling[name])
