"""Reads a model of a known kind as the norms and products that its layers are made of, for decoders of our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from pmc_fast.attention import AttentionCall
from pmc_fast.fast_linear import is_fast, weight_of
from pmc_fast.layer_kinds import ACTIVATIONS, Names, names_of
from pmc_fast.layer_parts import Adapter, Angles, Embedding, Layer, Layers, Linear, LinearParts, Norm, NormParts
from pmc_fast.models import LanguageModel
from pmc_fast.sharding import is_tensor_parallel, kind


class Unknown(Exception):
    """A part of the model is not what this module reads."""


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
    backbone = lm.backbone
    names = names_of(backbone)
    if names is None or is_hooked(lm) or is_tensor_parallel(backbone):
        raise Unknown
    modules = backbone.get_submodule(names.layers)[: lm.model.config.num_hidden_layers]
    (unit,) = {getattr(module, "residual_multiplier", 1.0) for module in modules}
    if not unit > 0:
        raise Unknown
    turns = [_turns(_part(module, names.attention), names) for module in modules]
    angles = _angles(_part(backbone, names.rotary), unturned=not all(turns))
    embed = _embedding(backbone, names, unit)
    like = embed.weight
    return Layers(
        embed=embed,
        angles=angles,
        layers=[_layer(module, names, call, angles, unit, like) for module, call in zip(modules, calls, strict=True)],
        final=_in_units(_norm(_part(backbone, names.final), like), unit),
        head_dim=calls[0].head_dim,
    )


def _part(module: nn.Module, path: str | None) -> Any:
    return None if path is None else attrgetter(path)(module)


def _angles(rotary: nn.Module | None, unturned: bool) -> Angles:
    several = isinstance(getattr(rotary, "rope_type", None), dict)
    return Angles(rotary, tuple(rotary.rope_type) if several else (None,), unturned)


def _turns(attention: nn.Module, names: Names) -> bool:
    """Whether queries and keys are turned, where there are angles; SmolLM3 leaves every fourth layer's as they are."""
    if names.windows_turn:
        return attention.sliding_window is None or attention.is_sliding
    return bool(getattr(attention, "use_rope", True))


def _rotary(attention: nn.Module, names: Names, angles: Angles) -> int:
    """Which of the angles a layer's attention takes."""
    if not _turns(attention, names):
        return len(angles.kinds)
    if angles.kinds == (None,):
        return 0
    of = attention.layer_type if hasattr(attention, "layer_type") else attention.attention_type
    return angles.kinds.index(of)


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


def _embedding(backbone: nn.Module, names: Names, unit: float) -> Embedding:
    embed, positions = _part(backbone, names.embed), _part(backbone, names.positions)
    known = kind(embed).__name__.endswith("TextScaledWordEmbedding") if names.scaled else kind(embed) is nn.Embedding
    is_table = kind(positions) is nn.Embedding or kind(positions).__name__ == "OPTLearnedPositionalEmbedding"
    if not known or not (positions is None or is_table):
        raise Unknown
    parts = [part for part in (embed, positions) if part is not None]
    if any(part.max_norm is not None or part.scale_grad_by_freq or part.sparse for part in parts):
        raise Unknown
    if len({part.embedding_dim for part in parts}) > 1:  # OPT-350m projects one of them
        raise Unknown
    weight = embed.weight
    scale = (
        embed.embed_scale.to(weight.dtype).item() if names.scaled else getattr(backbone, "embedding_multiplier", 1.0)
    )
    return Embedding(
        weight,
        scale / unit,
        embed.padding_idx,
        None if positions is None else positions.weight,
        getattr(positions, "offset", 0),
    )


def _in_units(norm: NormParts | None, unit: float) -> NormParts | None:
    """What it makes of h, given h / unit.

    Granite adds unit * f(norm(h)) to h. So that a decoder can add f(norm(h)), it keeps h / unit, of whose scale a norm takes
    no notice but for its epsilon.
    """
    return None if norm is None else replace(norm, epsilon=norm.epsilon / unit**2)


def _layer(
    layer: nn.Module, names: Names, call: AttentionCall, angles: Angles, unit: float, like: Tensor
) -> Layer[NormParts, LinearParts]:
    attention = _part(layer, names.attention)
    if getattr(attention, "qk_layernorm", False) or hasattr(layer, "crossattention"):
        raise Unknown
    if not getattr(layer, "do_layer_norm_before", True):
        raise Unknown
    activation = kind(_part(layer, names.activation)).__name__
    if activation not in ACTIVATIONS:
        raise Unknown
    norm, output_norm, mlp_norm, down_norm = (_norm(_part(layer, name), like) for name in names.norms)
    query, key, value = _query_key_value(layer, names)
    gate, up = _gate_up(layer, names)
    if names.scales_query:
        call = replace(call, scaling=attention.scaling * call.scaling)
    return Layer(
        norm=_in_units(norm, unit),
        query=query,
        key=key,
        value=value,
        clip=attention.config.clip_qkv if names.clips else None,
        query_norm=_norm(getattr(attention, "q_norm", None), like),
        key_norm=_norm(getattr(attention, "k_norm", None), like),
        output=_linear(_part(layer, names.output)),
        output_norm=output_norm,
        parallel=getattr(layer, names.parallel) if isinstance(names.parallel, str) else names.parallel,
        mlp_norm=_in_units(mlp_norm, unit),
        gate=gate,
        up=up,
        activation=ACTIVATIONS[activation],
        down=_linear(_part(layer, names.down)),
        down_norm=down_norm,
        rotary=_rotary(attention, names, angles),
        attention=call,
    )


def _query_key_value(layer: nn.Module, names: Names) -> tuple[LinearParts, LinearParts | None, LinearParts | None]:
    if not isinstance(names.query_key_value, str):
        query, key, value = (_linear(_part(layer, name)) for name in names.query_key_value)
        return query, key, value
    whole, attention = _linear(_part(layer, names.query_key_value)), _part(layer, names.attention)
    if names.by_head:
        return whole, None, None
    heads = attention.num_key_value_heads if hasattr(attention, "num_key_value_heads") else attention.num_heads
    keys = heads * attention.head_dim
    query, key, value = whole.split(len(whole.weight) - 2 * keys, keys, keys)
    return query, key, value


def _gate_up(layer: nn.Module, names: Names) -> tuple[LinearParts | None, LinearParts]:
    if names.up is not None:
        return None, _linear(_part(layer, names.up))
    if isinstance(names.gate_up, str):
        whole = _linear(_part(layer, names.gate_up))
        gate, up = whole.split(*[len(whole.weight) // 2] * 2)
    else:
        gate, up = (_linear(_part(layer, name)) for name in names.gate_up)
    return gate, up


def _norm(module: nn.Module | None, like: Tensor) -> NormParts | None:
    """A norm's parts, or None without one; weights that it has none of are ones as `like`."""
    if module is None:
        return None
    name = kind(module).__name__
    if name == "OlmoLayerNorm":
        return NormParts(_ones(*module.normalized_shape, like.dtype, like.device), None, 1e-5, True, 0.0)
    weight = module.weight
    if kind(module) is nn.LayerNorm and weight is not None:
        return NormParts(weight, module.bias, module.eps, True, 0.0)
    if not name.endswith("RMSNorm"):
        raise Unknown
    if name.startswith("Gemma"):
        return NormParts(weight, None, module.eps, False, 1.0)
    return NormParts(weight, None, module.variance_epsilon, False, 0.0)


@cache
@torch.inference_mode(False)  # they may be saved for a backward pass later
def _ones(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(size, dtype=dtype, device=device)


def _linear(module: nn.Module) -> LinearParts:
    if (weight := weight_of(module)) is not None:
        return LinearParts(weight, module.bias, (), weight)
    if (kind(module).__module__, kind(module).__name__) != ("peft.tuners.lora.layer", "Linear"):
        raise Unknown
    if module.merged and module.disable_adapters:
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
