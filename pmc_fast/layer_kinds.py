"""The layers of transformers that decoders of our own know, and what their classes call their parts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from pmc_fast.sharding import kind


@dataclass(frozen=True)
class Names:
    """Where a layer and its backbone have their parts: paths of attributes from the layer on, and from the backbone on."""

    # Norms before attention, after it, before the MLP, after it.
    norms: tuple[str | None, str | None, str | None, str | None] = (
        "input_layernorm",
        None,
        "post_attention_layernorm",
        None,
    )
    attention: str = "self_attn"
    query_key_value: tuple[str, str, str] | str = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    by_head: bool = False  # whether of one product for all three each head has its own three in turn
    output: str = "self_attn.o_proj"
    gate_up: tuple[str, str] | str = ("mlp.gate_proj", "mlp.up_proj")  # or one product for both
    up: str | None = None  # of an MLP without a gate
    down: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"
    parallel: bool | str = False  # or the attribute that says it
    scales_query: bool = False  # whether attention is given queries that are scaled already
    clips: bool = False  # whether queries, keys and values are kept within what the configuration says
    windows_turn: bool = False  # whether, beside layers with a window, those without one turn nothing

    layers: str = "layers"
    embed: str = "embed_tokens"
    scaled: bool = False  # whether the embedding itself scales its rows
    positions: str | None = None
    rotary: str | None = "rotary_emb"
    final: str = "norm"


_LLAMA = Names()
_GEMMA = Names(
    norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    scaled=True,
)
_PHI = Names(
    norms=("input_layernorm", None, None, None),
    output="self_attn.dense",
    up="mlp.fc1",
    down="mlp.fc2",
    activation="mlp.activation_fn",
    parallel=True,
    final="final_layernorm",
)
_GPT_NEOX = Names(
    attention="attention",
    query_key_value="attention.query_key_value",
    by_head=True,
    output="attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    activation="mlp.act",
    parallel="use_parallel_residual",
    embed="embed_in",
    final="final_layer_norm",
)
_GPT2 = Names(
    norms=("ln_1", None, "ln_2", None),
    attention="attn",
    query_key_value="attn.c_attn",
    output="attn.c_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    activation="mlp.act",
    layers="h",
    embed="wte",
    positions="wpe",
    rotary=None,
    final="ln_f",
)
_OPT = Names(
    norms=("self_attn_layer_norm", None, "final_layer_norm", None),
    output="self_attn.out_proj",
    up="fc1",
    down="fc2",
    activation="activation_fn",
    scales_query=True,
    layers="decoder.layers",
    embed="decoder.embed_tokens",
    positions="decoder.embed_positions",
    rotary=None,
    final="decoder.final_layer_norm",
)
_OLMO2 = Names(norms=(None, "post_attention_layernorm", None, "post_feedforward_layernorm"))
KINDS = {
    "CwmDecoderLayer": _LLAMA,
    "Exaone4DecoderLayer": replace(_OLMO2, windows_turn=True),
    "GemmaDecoderLayer": replace(_LLAMA, scaled=True),
    "Gemma2DecoderLayer": _GEMMA,
    "Gemma3DecoderLayer": _GEMMA,
    "GPT2Block": _GPT2,
    "GPTNeoXLayer": _GPT_NEOX,
    "GraniteDecoderLayer": _LLAMA,
    "LlamaDecoderLayer": _LLAMA,
    "MinistralDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "OlmoDecoderLayer": replace(_LLAMA, clips=True),
    "Olmo2DecoderLayer": _OLMO2,
    "Olmo3DecoderLayer": _OLMO2,
    "OPTDecoderLayer": _OPT,
    "PhiDecoderLayer": _PHI,
    "Phi3DecoderLayer": replace(
        _LLAMA, query_key_value="self_attn.qkv_proj", gate_up="mlp.gate_up_proj", activation="mlp.activation_fn"
    ),
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "SeedOssDecoderLayer": _LLAMA,
    "SmolLM3DecoderLayer": _LLAMA,
    "StableLmDecoderLayer": replace(_LLAMA, parallel="use_parallel_residual"),
    "Starcoder2DecoderLayer": replace(_LLAMA, up="mlp.c_fc", down="mlp.c_proj", activation="mlp.act"),
}
ACTIVATIONS = {
    "FastGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "SiLUActivation": "silu",
}


def names_of(backbone: nn.Module) -> Names | None:
    """What the backbone and its layers, all of one known class, call their parts; None if they are of no known kind."""
    for path in ("layers", "h", "decoder.layers"):
        try:
            layers = backbone.get_submodule(path)
        except AttributeError:
            continue
        classes = {kind(layer) for layer in layers}
        (cls,) = classes if len(classes) == 1 else (None,)
        known = cls is not None and cls.__module__.startswith("transformers.models.")
        names = KINDS.get(cls.__name__) if known else None
        return names if names is not None and names.layers == path else None
    return None


def attentions_of(backbone: nn.Module) -> list[nn.Module]:
    """The attention of each layer, of known kinds."""
    names = names_of(backbone)
    return (
        []
        if names is None
        else [layer.get_submodule(names.attention) for layer in backbone.get_submodule(names.layers)]
    )


def with_one_layer(backbone: nn.Module) -> nn.Module:
    """The same modules without the other layers; other threads, and who fails, find the model as it was."""
    return _with_first(backbone, names_of(backbone).layers)


def _with_first(module: nn.Module, path: str) -> nn.Module:
    name, _, rest = path.partition(".")
    part = getattr(module, name)
    changed = {name: _with_first(part, rest) if rest else part[:1]}
    made = object.__new__(type(module))  # the class FSDP2 makes of it would not be copied
    vars(made).update(vars(module), _modules=module._modules | changed, _compiled_call_impl=None)
    return made
