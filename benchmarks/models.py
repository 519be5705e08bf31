"""`python -m benchmarks models`: what pmc_fast makes of each kind of causal language model that transformers has."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks import results, tables
from pmc_fast.errors import UserError
from pmc_fast.outputs import check_file

SCHEMA = "pmc_fast.benchmarks.models/1"
MOST_LOGPROB_ERROR, MOST_GRADIENT_ERROR = 1e-3, 1e-2
_SECONDS = 120  # for a model
_PROMPTS = (9, 4, 14)  # tokens
_SAMPLES, _TOKENS = 3, 8
_MOST_PARAMETERS = 50_000_000
_RIGHT = "right"


@dataclass
class Row:
    """What became of a tiny random model of a kind; what is None was not reached.

    model: the kind. built, sampled, trained: "right", or what is wrong, or why it is not done. decoder: `Sampler.decoder`. layers:
    `LanguageModel.packed_by`. logprob_error: of draws, the largest difference from the model's own log-probability of each text alone,
    nats. gradient_error: of a packed batch's log-probabilities, the largest of a parameter, as a share of its size.
    """

    model: str
    parameters: int | None = None
    built: str | None = None
    sampled: str | None = None
    decoder: str | None = None
    logprob_error: float | None = None
    trained: str | None = None
    layers: str | None = None
    gradient_error: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `models`."""
    parser.add_argument("names", nargs="*", metavar="MODEL", help="kinds as transformers calls them (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples (default: 0)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result to this file")


def run(args: argparse.Namespace) -> None:
    """Print a line for each kind, then a table; raises Wrong if a model is sampled from or trained otherwise than it is by itself."""
    from benchmarks.bench import Wrong
    from benchmarks.measure import environment
    from benchmarks.tiny_models import names
    from pmc_fast.loading import choose_device

    device, known = choose_device(args.device), names()
    if strangers := [name for name in args.names if name not in known]:
        raise UserError(
            f"MODEL: got {strangers[0]!r}, want one of transformers' causal language models: {', '.join(known)}"
        )
    if args.json:
        check_file(args.json, "--json")
    rows = []
    for name in args.names or known:
        rows.append(_alone(name, str(device), args.seed))
        print(_line(rows[-1]), file=sys.stderr, flush=True)
    content = {
        "command": args.command_line,
        "environment": environment(device, args.seed),
        "rows": [*map(asdict, rows)],
    }
    if args.json:
        results.write(args.json, SCHEMA, content)
    print(tables.models(content))
    if wrong := [row.model for row in rows if is_wrong(asdict(row))]:
        raise Wrong(", ".join(wrong))


def is_wrong(row: dict) -> bool:
    """Whether a model was sampled from or trained, and not as it is by itself."""
    errors = ((row["logprob_error"], MOST_LOGPROB_ERROR), (row["gradient_error"], MOST_GRADIENT_ERROR))
    return any(error is not None and not error <= most for error, most in errors)


def _line(row: Row) -> str:
    if row.built != _RIGHT:
        return f"{row.model}: not built: {row.built}"
    return f"{row.model}: sampled by {row.decoder or row.sampled}, trained by {row.layers or row.trained}"


def _alone(name: str, device: str, seed: int) -> Row:
    """In a process of its own, which may hang or be killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "transformers", "pmc_fast.pmc", "benchmarks.tiny_models"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, name, device, seed), daemon=True)
    process.start()
    there.close()
    row = Row(name, built=f"no answer within {_SECONDS} s, or the process ended")
    with contextlib.suppress(EOFError):
        if here.poll(_SECONDS):
            row = here.recv()
    process.kill()
    process.join()
    return row


def _send(there: Connection, name: str, device: str, seed: int) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        there.send(judge(name, device, seed))


def judge(name: str, device: str, seed: int) -> Row:
    """Sample from a model of this kind, and train it."""
    import torch
    from transformers import logging

    from benchmarks.tiny_models import tiny_model
    from pmc_fast.models import LanguageModel
    from pmc_fast.packing import pad_left
    from pmc_fast.sampler import Sampler

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    row = Row(name)
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, 250, (length,), generator=generator).tolist() for length in _PROMPTS]
    answers = [torch.randint(0, 250, (_TOKENS,), generator=generator).tolist() for _ in prompts]
    try:
        model = tiny_model(name, seed)
        row.parameters = sum(parameter.numel() for parameter in model.parameters())
        if row.parameters > _MOST_PARAMETERS:
            raise ValueError(f"{row.parameters} parameters")
        model.to(device)
        exact, gradients = _alone_logprobs(model, prompts, answers, gradients=True)
        row.built = _RIGHT
    except Exception as error:  # transformers' own
        row.built = _reason(error)
        return row
    try:
        sampler = Sampler(model)
        ids, mask = pad_left(prompts, 0, device)
        drawn = sampler.sample(ids, mask, num_samples=_SAMPLES, max_new_tokens=_TOKENS, eos_token_id=-1, seed=seed)
        texts = [prompt for prompt in prompts for _ in range(_SAMPLES)]
        own, _ = _alone_logprobs(model, texts, drawn.tokens.flatten(0, 1).tolist(), gradients=False)
        row.logprob_error = float((drawn.logprobs.flatten() - own).abs().max())
        row.sampled, row.decoder = _RIGHT, sampler.decoder
    except Exception as error:
        row.sampled = _reason(error)
    try:
        lm = LanguageModel(model)
        row.gradient_error = _gradient_error(lm, prompts, answers, exact, gradients)
        row.trained, row.layers = _RIGHT, lm.packed_by
    except Exception as error:
        row.trained = _reason(error)
    return row


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def _alone_logprobs(model, prompts, answers, gradients):
    """Of the answers' tokens, [N], each text in a pass of its own; and the gradients of their sum."""
    import torch

    found = []
    with torch.set_grad_enabled(gradients):
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([prompt + answer], device=next(model.parameters()).device)
            logprobs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            found.append(logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0])
    found = torch.cat(found)
    return found.detach(), _gradients(model, found.sum()) if gradients else {}


def _gradients(model, total):
    model.zero_grad()
    total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _gradient_error(lm, prompts, answers, exact, gradients) -> float:
    """The largest error of a parameter's gradient, as a share of its size; of the log-probabilities, too."""
    from pmc_fast.packing import pack

    packed = pack(prompts, answers, lm.device)
    got = lm.head.logprob(packed.hidden(lm), packed.target)
    mine = _gradients(lm.model, got.sum())
    pairs = [(got.detach(), exact)]
    pairs += [(mine.get(name, 0 * own), own) for name, own in gradients.items()]
    return max(float((a - b).norm() / (b.norm() + 1e-3)) for a, b in pairs)
