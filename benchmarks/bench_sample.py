"""Drawing one token per row of logits: pmc_fast, transformers' processors with multinomial, and plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from inspect import signature
from typing import Any

import torch

from benchmarks.bench import Bench, CannotRun, Verdict, each_implementation
from benchmarks.compiled import COMPILED, compiled
from benchmarks.oracle import Truncated, surprise_of_counts, truncated
from benchmarks.shapes import DECODE_ROWS, LARGE_DECODE_ROWS, LARGE_HEAD, LLAMA_3B, SMOLLM2_135M, Head


@dataclass(frozen=True)
class Settings:
    """How the distribution is cut; no top-k where it is None. At temperature 0 there is nothing to cut."""

    temperature: float = 0.9
    top_k: int | None = None
    top_p: float = 0.95
    min_p: float = 0.0

    def __str__(self) -> str:
        cuts = [f"temperature {self.temperature}", f"top-k {self.top_k}" if self.top_k else "", f"top-p {self.top_p}"]
        return ", ".join(filter(None, [*cuts, f"min-p {self.min_p}" if self.min_p else ""]))

    def cuts(self) -> dict[str, Any]:
        """As keyword arguments of `truncated` and of the op."""
        return asdict(self)

    def preferred(self, device_type: str) -> str | None:
        from pmc_fast.ops.sample import preferred

        return preferred(device_type, self.temperature, self.top_k, self.top_p, self.min_p)


def real_looking_logits(rows: int, vocab: int, generator: torch.Generator) -> torch.Tensor:
    """float32 [rows, vocab] on the generator's device: power laws, from rows sure of their token to rows that leave thousands open.

    Top-p 0.95 at temperature 0.9 keeps 2, 9 and 200 of 49152 tokens at the 10th, 50th and 90th percentile of rows;
    SmolLM2-135M, answering TOFU's questions, 1, 10 and 325.
    """
    device = generator.device
    rank = torch.randint(vocab, (rows, vocab), generator=generator, device=device) + 1.0
    steepness = 1.2 + 1.8 * torch.rand(rows, 1, generator=generator, device=device)
    return torch.randn(rows, vocab, generator=generator, device=device).mul_(0.5).sub_(rank.log_() * steepness)


def draw_with_transformers(logits: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Token per row as `generate` draws it."""
    from transformers.generation import logits_process as processors

    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    scores = processors.TemperatureLogitsWarper(settings.temperature)(None, logits.float())
    if settings.top_k is not None:
        scores = processors.TopKLogitsWarper(settings.top_k)(None, scores)
    if settings.top_p < 1:
        scores = processors.TopPLogitsWarper(settings.top_p)(None, scores)
    if settings.min_p > 0:
        scores = processors.MinPLogitsWarper(settings.min_p)(None, scores)
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)


def draw_with_torch_topk(logits: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Token per row, the vocabulary left behind after `topk`."""
    values, tokens = (logits.float() / settings.temperature).topk(settings.top_k)
    probability = values.softmax(dim=-1)
    probability[probability.cumsum(dim=-1) - probability >= settings.top_p] = 0
    return tokens.gather(1, torch.multinomial(probability, num_samples=1)).squeeze(1)


def draw_with_flashinfer(logits: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Token per row by rejection sampling on a GPU; the temperature is applied before it.

    The seed is given, since a generator cannot be asked for one while a CUDA graph is captured.
    """
    if logits.device.type != "cuda":
        raise CannotRun("its kernels need a GPU")
    cut = settings.top_k is not None or settings.top_p < 1
    if settings.temperature == 0 or (cut and settings.min_p > 0):
        raise CannotRun("it has no draw with these options")
    from flashinfer import sampling

    scaled = logits / settings.temperature
    if settings.top_k is not None:
        draw, cuts = sampling.top_k_top_p_sampling_from_logits, (scaled, settings.top_k, settings.top_p)
    elif cut:
        draw, cuts = sampling.top_p_sampling_from_probs, (scaled.softmax(dim=-1), settings.top_p)
    elif settings.min_p > 0:
        draw, cuts = sampling.min_p_sampling_from_probs, (scaled.softmax(dim=-1), settings.min_p)
    else:
        draw, cuts = sampling.sampling_from_logits, (scaled,)
    if "seed" not in signature(draw).parameters:
        raise CannotRun("this version of it takes no seed")
    return draw(*cuts, seed=1, offset=0).long()


def judge_draws(
    draw: Callable[[], torch.Tensor], tokens: torch.Tensor, truth: Truncated, same_row: Truncated
) -> Verdict:
    """Right when every token is allowed, and many draws from one row come as often as `same_row` [1, V] says."""
    outside = int((~truth.allowed.gather(1, tokens[:, None])).sum())
    drawn = draw()
    counts = torch.bincount(drawn, minlength=same_row.probability.shape[1])
    surprise = surprise_of_counts(counts, same_row.probability[0], same_row.allowed[0])
    evidence = (
        f"{outside} of {len(tokens)} outside the kept set, chi-squared at {surprise:+.1f} sd of {len(drawn)} draws"
    )
    return Verdict(outside == 0 and surprise < 5, evidence)


class SampleBench(Bench):
    """`rows` rows of `head`'s logits."""

    op = "sample"
    dtype = torch.float32

    def __init__(self, rows: int, head: Head, settings: Settings, large: bool = False) -> None:
        self.rows = rows
        self.large = large
        self.moved_bytes = rows * head.vocab * self.dtype.itemsize
        self.head = head
        self.settings = settings
        self.title = f"{rows} x {head.vocab}, {settings}"

    def make_inputs(self, seed: int, device: torch.device) -> torch.Tensor:
        return real_looking_logits(self.rows, self.head.vocab, torch.Generator(device).manual_seed(seed))

    def contestants(self) -> Mapping[str, Callable[[torch.Tensor], Any]]:
        from pmc_fast.ops.sample import sample

        def ours(logits: torch.Tensor, impl: str | None = None) -> torch.Tensor:
            return sample(logits, **self.settings.cuts(), seed=1, impl=impl).token

        runs = each_implementation(self.op, ours)
        runs["transformers"] = lambda logits: draw_with_transformers(logits, self.settings)
        runs[COMPILED] = compiled(runs["transformers"])
        if self.settings.top_k is not None:
            runs["torch topk"] = lambda logits: draw_with_torch_topk(logits, self.settings)
        runs["flashinfer"] = lambda logits: draw_with_flashinfer(logits, self.settings)
        return runs

    def preferred(self, device_type: str) -> str | None:
        return self.settings.preferred(device_type)

    def oracle(self, inputs: torch.Tensor) -> Truncated:
        return truncated(inputs, **self.settings.cuts())

    def judge(self, run, result, inputs, oracle, budget) -> Verdict:
        one_row = 2 * torch.randn(1, 997, generator=torch.Generator().manual_seed(0)).to(inputs.device)
        want = truncated(one_row, **self.settings.cuts())
        return judge_draws(lambda: run(one_row.expand(8192, -1).contiguous()), result, oracle, want)


BENCHES = [
    SampleBench(DECODE_ROWS, SMOLLM2_135M, Settings()),
    SampleBench(DECODE_ROWS, SMOLLM2_135M, Settings(top_k=50)),
    SampleBench(DECODE_ROWS, LLAMA_3B, Settings()),
    SampleBench(LARGE_DECODE_ROWS, LARGE_HEAD, Settings(top_k=50), large=True),
]


def test_sample(benchmark, contest) -> None:
    contest(benchmark)
