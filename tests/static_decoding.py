"""Sampling from fixed memory, on any device, and by the model's own modules instead."""

from types import SimpleNamespace

import decoder_kernels
import pytest
import torch
from tiny import VOCAB

from pmc_fast import backend, gpu, graph_rows, static_decoder
from pmc_fast.graph_rows import GraphRows
from pmc_fast.packing import pad_left
from pmc_fast.sampler import Sampler

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [20, 21]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def watch(monkeypatch, drawing="triton" if DEVICE == "cuda" else "native"):
    """What `static_decoder` will make, call by call, on any device; `drawing` is what draws."""
    made = []
    stand_in = SimpleNamespace(choose=lambda *args: "triton", load=lambda op, impl: _load(op, drawing))
    monkeypatch.setattr(static_decoder, "backend", stand_in)
    if DEVICE == "cpu":
        monkeypatch.setattr(gpu, "kernels", lambda name: decoder_kernels)
    monkeypatch.setattr(graph_rows, "LEAST_ROWS", 2)  # so that rows are brought together often
    if DEVICE == "cuda":
        monkeypatch.setattr(GraphRows, "of_graph", GraphRows.fewest)  # as without graphs
    monkeypatch.setattr(static_decoder, "LEAST_STEPS", 2)  # so that weights are copied for few tokens, too

    def watched(*args):
        made.append(static_decoder.static_decoder(*args))
        return made[-1]

    monkeypatch.setattr("pmc_fast.sampler.static_decoder", watched)
    return made


def _load(op, impl):
    """That a CPU's implementations take the seed that lies in fixed memory, too."""
    run = backend.load(op, impl)
    return run if impl in ("triton", "cuda") else lambda *args, seed, **options: run(*args, seed=int(seed), **options)


def sample(model, seed, prompts=PROMPTS, num_samples=4, **changes):
    ids, mask = (x.to(DEVICE) for x in pad_left(prompts, 256))
    options = {
        "num_samples": num_samples,
        "max_new_tokens": 7,
        "eos_token_id": list(range(0, VOCAB, 11)),  # rows finish all the time
        "seed": seed,
        "top_p": 0.95,
        "temperature": 0.9,
    }
    sampler = model if isinstance(model, Sampler) else Sampler(model)
    return sampler.sample(ids, mask, **{**options, **changes})


def by_modules(model, seed, monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setattr("pmc_fast.sampler.static_decoder", lambda *args: None)
        return sample(model, seed, **options)


def adapt(model, **options):
    """LoRA on every linear layer but the head, its adapters random instead of no-ops."""
    peft = pytest.importorskip("peft")
    options = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()
