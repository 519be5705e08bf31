"""Random tiny models of many families and a byte-level tokenizer, made on the spot."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 259  # 256 bytes, padding, end, start: odd on purpose

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 256,
    "bos_token_id": 258,
    "eos_token_id": 257,
}

FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {},
    "phi": {"num_key_value_heads": 4},
    "phi3": {
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 64,
        "sliding_window": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "sliding_window": 6},
    "gemma3_text": {
        "final_logit_softcapping": 3.0,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": {
        "logits_scaling": 4.0,
        "residual_multiplier": 0.3,
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
    },
    "olmo2": {},
    "cohere": {"logit_scale": 0.3},
    "gpt_neox": {},
    "gpt2": {},
}
# For single tests.
MORE = {
    "deepseek_v3": {  # whose cache holds one shape of keys and another of values
        "num_key_value_heads": 4,
        "head_dim": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "first_k_dense_replace": 2,
    },
    "gemma3n_text": {  # whose last layers take keys and values of others
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "intermediate_size": [48] * 6,
        "activation_sparsity_pattern": [0.0] * 6,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "laurel_rank": 4,
    },
    "gemma4_text": {  # likewise; and heads of two sizes
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
    },
    "gpt_oss": {  # with sinks
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "cwm": {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "exaone4": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "ministral": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "sliding_window": 6},
    "nemotron": {},  # whose layers hand no keywords on, like stablelm's
    "olmo": {"clip_qkv": 0.5},
    "olmo3": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "opt": {},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    "starcoder2": {"sliding_window": 6},
}

# With states besides keys and values.
STATES = {
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "falcon_mamba": {"state_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}
MORE, STATES = ({name: kept[name] for name in kept if name in CONFIG_MAPPING} for kept in (MORE, STATES))

# What the decoders of this library know, and what of it they are to see.
KNOWN = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "granite", "gemma", "gemma2", "gemma3_text"), {}
    ),
    "olmo2": {},
    "gpt_neox": {},
    "gpt2": {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0},
    "opt": {"dropout": 0},
    **dict.fromkeys(("exaone4", "olmo", "olmo3", "smollm3", "stablelm", "starcoder2"), {}),
}
# What they know, too, of the same parts as some of these.
ALIKE = ("cwm", "ministral", "seed_oss")


def make_model(family: str = "llama", seed: int = 0, **changes):
    """A model with random weights, large enough that its distributions are not flat."""
    sizes = {**_SIZES, **{**FAMILIES, **MORE, **STATES}[family], **changes}
    if family == "gpt2":
        sizes = {
            "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
            "pad_token_id": 256, "bos_token_id": 258, "eos_token_id": 257, **changes,
        }  # fmt: skip
    if family == "opt":
        sizes |= {"ffn_dim": sizes["intermediate_size"], "word_embed_proj_dim": sizes["hidden_size"], **changes}
    if family in ("gpt_neox", "opt"):
        sizes.pop("num_key_value_heads"), sizes.pop("head_dim")
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    # transformers 5.17 would give Gemma 2 torch's attention, which knows no soft cap; later versions choose this one themselves.
    options = {"attn_implementation": "eager"} if family == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**sizes), dtype=torch.float32, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    torch.set_rng_state(generator_state)
    return model


def checkpoint_activations(model, *options) -> None:
    """By the method's name since transformers 5.24, or the one before, which goes with 6."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(*options)


def make_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, then <pad>, <end>, <start>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<end>", "<start>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<start>", padding_side="left"
    )
    if chat:
        fast.chat_template = (
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}\n"
            "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
        )
    return fast
