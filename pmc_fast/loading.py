"""Models and tokenizers from a folder or the hub, from safetensors alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmc_fast.errors import UserError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is the first CUDA device, or the CPU where there is none.

    Raises:
        UserError: it is not available, or no such name.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        built = "sees no device" if torch.version.cuda else "was built without CUDA"
        raise UserError(f"device: got {name!r}, but torch {torch.__version__} {built}; use --device cpu")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(f"device: got {name!r}, but there are {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N")
    return device


def load_model(
    source: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A causal language model, in evaluation mode, and its tokenizer.

    Args:
        source: a transformers folder, or a hub name.
        dtype: "float32", "bfloat16" or "float16".
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UserError: the folder is missing, has no configuration, no safetensors weights, weights that do not fit, or no
            tokenizer; the hub has no such model; the device or dtype is not available.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    device = choose_device(str(device))
    source = str(source)
    folder = Path(source)
    if os.path.exists(folder) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        _check_folder(folder)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # at damaged files transformers raises what it likes
        where = "" if os.path.exists(folder) else " (there is no such folder, so it was looked for on the hub)"
        raise UserError(f"{source}: the tokenizer cannot be loaded: {_first_line(error)}{where}") from error
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:
        raise UserError(f"{source}: the model cannot be loaded: {_first_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{source}: the weights lack {len(missing)} tensors that the model has, such as {missing[0]}")
    return model.to(device).eval(), tokenizer


def _check_folder(folder: Path) -> None:
    if os.path.isfile(folder):
        raise UserError(f"{folder}: it is a file; want a transformers model folder or a hub name")
    if not os.path.isdir(folder):  # which takes names that are too long
        raise UserError(f"{folder}: no such folder; want a transformers model folder or a hub name")
    inner = folder / "model"  # of a run's --out
    elsewhere = f"; did you mean {inner}?" if (inner / "config.json").exists() else ""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no config.json; want a transformers model folder{elsewhere}")
    if not list(folder.glob("*.safetensors")):
        other = next((path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)), None)
        hint = f"; {other} is not read, save the model with save_pretrained to convert it" if other else ""
        raise UserError(f"{folder}: no weights (*.safetensors){hint}{elsewhere}")
    # Other tokenizer files are too many to name: the tokenizer itself says what it lacks.
    if not list(folder.glob("*token*")) and not list(folder.glob("vocab*")):
        raise UserError(f"{folder}: no tokenizer (tokenizer.json, tokenizer_config.json); save it into the folder")


def _first_line(error: Exception) -> str:
    """And the second one, where the first only announces it."""
    first, *rest = str(error).strip().split("\n")
    return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first or type(error).__name__
