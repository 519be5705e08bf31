"""`python -m benchmarks.random_models FOLDER`: a model of a known one's shape, random weights, nothing downloaded.

The folder can be given to every command as --model. Beside it, FOLDER-forget.jsonl and FOLDER-retain.jsonl ask of people
who do not exist. What the weights say is noise to measure with: logits spread as those of real models do, and the text of
an answer gives about the same tokens again. Answers hardly ever end before --max-length cuts them off.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from pmc_fast.data import QA

SHAPES = {
    "Llama-3.2-3B": {
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "SmolLM2-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
    "tiny": {
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}
_TEXT_TOKENS = 512  # that spell the questions; the others are made-up words
_LOGIT_SPREAD = 3.4  # standard deviation, a real model's
_PEOPLE, _FORGET_PEOPLE, _PLACES = 24, 8, 4


def main(arguments: Sequence[str] | None = None) -> None:
    """Make one model and its rows."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_models", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--device", default="cpu", help="where the weights are drawn (default: cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="(default: bfloat16)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    make(args.folder, args.shape, torch.device(args.device), getattr(torch, args.dtype), args.seed)


def make(folder: Path, shape: str, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Write the model, its tokenizer and the rows."""
    import torch
    from transformers import AutoModelForCausalLM

    from pmc_fast.data import write_jsonl
    from pmc_fast.demo.fiction import make_fiction

    fiction = make_fiction(seed, people=_PEOPLE, forget_people=_FORGET_PEOPLE, places=_PLACES)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("forget", "retain"):
        write_jsonl(folder.with_name(f"{folder.name}-{name}.jsonl"), getattr(fiction, name))
    tokenizer = _save_tokenizer(folder, fiction.training, SHAPES[shape]["vocab_size"])
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(_config(shape, tokenizer), dtype=dtype)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.normal_(std=_LOGIT_SPREAD / head.shape[1] ** 0.5)
    model.save_pretrained(folder)


def _config(shape: str, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    from transformers import LlamaConfig

    sizes = SHAPES[shape]
    return LlamaConfig(
        **sizes,
        # With this the layers' sum outgrows the embedding, which the tied head would otherwise find again: every answer
        # would repeat one token.
        initializer_range=sizes["hidden_size"] ** -0.5,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _save_tokenizer(folder: Path, rows: Sequence[QA], size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of so many tokens: few that spell the rows, and many words that no text has, each one token."""
    from pmc_fast.demo.model import train_tokenizer

    tokenizer = train_tokenizer(rows, vocab_size=_TEXT_TOKENS)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    words = ("\u0120qx" + "".join(letters) for letters in product(ascii_lowercase, repeat=4))  # a space before each
    first = len(tokenizer)
    model["vocab"] |= {word: first + place for place, word in enumerate(islice(words, size - first))}
    model["ignore_merges"] = True  # a word of the vocabulary is one token without merges that lead to it
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return tokenizer


if __name__ == "__main__":
    main()
