"""Models of the families that unlearning is tried on: layers and vocabulary of real sizes, few layers, random weights."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.wording import amount
from pmc_fast.errors import UserError

if TYPE_CHECKING:
    import torch

    from benchmarks.step import Task


def _sizes(kind: str, vocabulary: int, hidden: int, inner: int, heads: int, layers: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        **more,
    }


# As the models' configurations have them, but for the numbers of layers and of Mixtral's experts, and Gemma's head.
FAMILIES = {
    "Llama-3.2-1B": _sizes(
        "llama", 128256, 2048, 8192, 32, 3, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True
    ),
    "Llama-3.2-3B": _sizes(
        "llama", 128256, 3072, 8192, 24, 2, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True
    ),
    "Qwen2.5-1.5B": _sizes("qwen2", 151936, 1536, 8960, 12, 3, num_key_value_heads=2, tie_word_embeddings=True),
    "Qwen3-1.7B": _sizes(
        "qwen3", 151936, 2048, 6144, 16, 3, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True
    ),
    "Phi-1.5": _sizes("phi", 51200, 2048, 8192, 32, 4, partial_rotary_factor=0.5),
    # Under a tied head its scaled embedding would find itself again: every answer would repeat one token.
    "Gemma-2-2B": _sizes(
        "gemma2", 256000, 2304, 9216, 8, 2, num_key_value_heads=4, head_dim=256, tie_word_embeddings=False
    ),
    "Pythia-1.4B": _sizes("gpt_neox", 50304, 2048, 8192, 16, 4, rotary_pct=0.25),
    "OLMo-1B": _sizes("olmo", 50304, 2048, 8192, 16, 4, tie_word_embeddings=True),
    "OLMo-7B": _sizes("olmo", 50304, 4096, 11008, 32, 1, clip_qkv=8.0),
    "SmolLM3-3B": _sizes("smollm3", 128256, 2048, 11008, 16, 4, num_key_value_heads=4, tie_word_embeddings=True),
    "StableLM-2-1.6B": _sizes("stablelm", 100352, 2048, 5632, 32, 4, use_qkv_bias=True, partial_rotary_factor=0.25),
    "GPT-2-medium": _sizes("gpt2", 50257, 1024, 4096, 16, 8),
    "GPT-2-large": _sizes("gpt2", 50257, 1280, 5120, 20, 8),
    "OPT-1.3B": {**_sizes("opt", 50272, 2048, 8192, 32, 4), "ffn_dim": 8192},
    "Mixtral-8x7B": _sizes("mixtral", 32000, 4096, 14336, 32, 1, num_key_value_heads=8, num_local_experts=4),
}


def add_argument(parser: argparse.ArgumentParser) -> None:
    """The option `--families`."""
    parser.add_argument(
        "--families",
        nargs="*",
        choices=FAMILIES,
        metavar="NAME",
        help=f"instead of --model, of {', '.join(FAMILIES)} (default: all of them),\n"
        "each cut to a few layers, with random weights",
    )


def tasks(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str | None, Task]]:
    """The task that the options name, or one after the other a title of each family and its task."""
    from benchmarks import step

    if args.families is None:
        yield None, step.load(args, device)
        return
    if args.model is not None:
        raise UserError("--families, --model: want one of them")
    for name in args.families or FAMILIES:
        task = step.load(args, device, partial(new_model, name))
        weights = sum(parameter.numel() for parameter in task.model.parameters())
        layers = FAMILIES[name]["num_hidden_layers"]
        yield f"{name}, {layers} layer{'s' * (layers > 1)}, {amount(weights)} parameters", task


def new_model(name: str, tokenizer: Any, seed: int) -> Any:
    """A family's model, which the tokenizer's few tokens are the first of."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = dict(FAMILIES[name])
    ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    config = CONFIG_MAPPING[sizes.pop("model_type")](**sizes, **ends)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
