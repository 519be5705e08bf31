"""Tiny models of random weights, of any class of causal language models that transformers has."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 259
_LAYERS = ["sliding_attention", "full_attention"] * 2
_TURNS = ["linear_attention", "full_attention"] * 2

# What configurations call their sizes; each takes those that it knows.
_SIZES = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 256,
    "eos_token_id": 257,
    "bos_token_id": 258,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "decoder_layers", "encoder_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 512),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 6,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "global_head_dim"), 16),
    **dict.fromkeys(("index_topk", "index_block_size"), 4),
    "index_n_heads": 16,  # of few, many scores tie at 0
    "index_topk_blocks": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(
        ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout", "residual_dropout"), 0.0
    ),
}
_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
# What these sizes do not fit, or what a small model would leave out.
_OTHER_SIZES = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "codegen": {"rotary_dim": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "gemma3_text": {"layer_types": _LAYERS},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": _LAYERS + _LAYERS[:2],
        "intermediate_size": [48] * 6,
        "activation_sparsity_pattern": [0.0] * 6,
        "laurel_rank": 4,
    },
    "gemma4_text": {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": _LAYERS + _LAYERS[:2]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 6},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", *["minimax_m3_sparse"] * 3],
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_local_blocks": 1,
    },
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8},
    **dict.fromkeys(("olmo_hybrid", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), {"layer_types": _TURNS}),
    "phi3": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4},
}


def names() -> list[str]:
    """What transformers calls the kinds of models that have a class for causal language models."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(name: str, seed: int) -> nn.Module:
    """A model of this kind, float32, in evaluation mode; raises what transformers raises where the sizes fit no such model."""
    kind = CONFIG_MAPPING[name]
    parts = {}
    if part := getattr(kind, "sub_configs", {}).get("text_config"):
        parts["text_config"] = part(**_sizes(part))
    config = kind(**_sizes(kind), **parts)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # or distributions would be flat
    return model


def _sizes(kind: type) -> dict[str, object]:
    known = {*getattr(kind, "__dataclass_fields__", {}), *(getattr(kind, "attribute_map", None) or {})}
    sizes = _SIZES | (_LATENT if "kv_lora_rank" in known else {})
    return {name: size for name, size in sizes.items() if name in known} | _OTHER_SIZES.get(kind.model_type, {})
