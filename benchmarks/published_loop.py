"""The published PMC loop in our own words: the baseline that pmc_fast is measured against.

It is slow on purpose where the published code is slow, since that is what is being measured: `generate` over every
prompt repeated n times, answers decoded to text and scored one by one, training rows padded to a fixed length, the
head on every position of every row, and a forward pass on the true answers whose only use is a logged number.

Source: arXiv 2507.04219 and its authors' public code. Nothing here is imported from pmc_fast; `Prompts` is passed in, so
that both ask in the same words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from rouge_score import rouge_scorer
from transformers import GenerationConfig


class Prompts(Protocol):
    """How questions and answers become tokens; `pmc_fast.prompts.Prompts` is one."""

    end_ids: Sequence[int]
    pad_id: int

    def prompt_ids(self, question: str) -> list[int]: ...

    def answer_ids(self, answer: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Row(Protocol):
    """A question with its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class PublishedConfig:
    """The loop's settings; the defaults are those published for Llama-3.2-3B-Instruct.

    `top_k` is 50 because the transformers version that the published code pins applies 50 when none is set.
    `max_length` counts tokens of the left-padded prompt and the answer together; training rows are padded to it, and one
    that is longer, a sample cut off there and then given its end token, is not cut again.
    """

    num_samples: int = 20
    temperature: float = 0.9
    top_k: int = 50
    top_p: float = 0.95
    max_length: int = 200
    min_len: int = 0
    retain_weight: float = 1.25


@dataclass(frozen=True)
class Samples:
    """`ids[b][i]` are the tokens of sample i for question b, up to and including the end token."""

    ids: list[list[list[int]]]

    @property
    def count(self) -> int:
        """The number of sampled tokens; the padding behind an end token is none."""
        return sum(len(ids) for row in self.ids for ids in row)


@dataclass(frozen=True)
class Stored:
    """The best answer so far for a question, and its score: lower is better, 0 is final."""

    answer: str
    score: float


@dataclass(frozen=True)
class Losses:
    """Mean negative log-likelihoods per answer token; `truth` is the logged one and takes no part in training."""

    collapse: float
    retain: float
    truth: float


class PublishedLoop:
    """One micro-batch at a time, its phases apart so that each can be timed: `sample`, `score`, `train`.

    loop = PublishedLoop(model, prompts, PublishedConfig())
    loop.initialise(questions)
    pending = loop.pending(indices)
    loop.score(pending, loop.sample(pending))
    loop.train(indices, true_rows, retain_rows, optimizer)

    Samples are drawn from torch's global generator.
    """

    def __init__(self, model: Any, prompts: Prompts, config: PublishedConfig | None = None) -> None:
        self.model = model
        self.prompts = prompts
        self.config = config or PublishedConfig()
        self.questions: list[str] = []
        self.references: list[str] = []
        self.stored: dict[int, Stored] = {}
        self._scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)

    def initialise(self, questions: Sequence[str], batch_size: int = 8) -> None:
        """Store the model's greedy answer to every question, which samples are scored against from now on."""
        self.questions = list(questions)
        self.references = []
        self.stored = {}
        for start in range(0, len(self.questions), batch_size):
            greedy = self._generate(self.questions[start : start + batch_size], do_sample=False)
            self.references += [self.prompts.decode(ids) for [ids] in greedy.ids]

    def pending(self, indices: Sequence[int]) -> list[int]:
        """Those of `indices` that are to be sampled: no answer stored yet, or a stored score above 0."""
        return [index for index in indices if index not in self.stored or self.stored[index].score > 0]

    def sample(self, indices: Sequence[int]) -> Samples:
        """Draw `num_samples` answers to each of these questions: temperature, then top-k, then top-p."""
        config = self.config
        return self._generate(
            [self.questions[index] for index in indices],
            do_sample=True,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            num_return_sequences=config.num_samples,
        )

    def score(self, indices: Sequence[int], samples: Samples) -> None:
        """Keep each question's best sample, the first on ties, unless the stored answer is strictly better."""
        for index, ids in zip(indices, samples.ids, strict=True):
            answers = [self.prompts.decode(answer) for answer in ids]
            scores = [self.score_of(self.references[index], answer) for answer in answers]
            best = min(range(len(scores)), key=scores.__getitem__)
            if index not in self.stored or scores[best] <= self.stored[index].score:
                self.stored[index] = Stored(answers[best], scores[best])

    def score_of(self, reference: str, answer: str) -> float:
        """ROUGE-L recall of `answer` against `reference`, raised if the answer has fewer than `min_len` parts between spaces."""
        score = self._scorer.score(reference, answer)["rougeL"].recall
        words = len(answer.split(" "))
        if words < self.config.min_len:
            score = min(1.0, score + math.exp(-words))
        return score

    def train(
        self,
        indices: Sequence[int],
        truth: Sequence[Row],
        retain: Sequence[Row],
        optimizer: torch.optim.Optimizer | None,
    ) -> Losses:
        """One update on the stored answers to these questions and on the retain rows, the model in the mode it is in.

        `truth` holds the true forget answers, which are only logged. With `optimizer=None` the gradients are left.
        """
        collapse = self._loss([(self.questions[index], self.stored[index].answer) for index in indices])
        kept = self._loss([(row.question, row.answer) for row in retain])
        with torch.no_grad():
            logged = self._loss([(row.question, row.answer) for row in truth])
        (collapse + self.config.retain_weight * kept).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return Losses(collapse.item(), kept.item(), logged.item())

    def _generate(self, questions: Sequence[str], **options: Any) -> Samples:
        prompts = [self.prompts.prompt_ids(question) for question in questions]
        width = max(map(len, prompts))
        if width >= self.config.max_length:
            raise ValueError(f"max_length: got {self.config.max_length}, want more than the longest prompt ({width})")
        rows = [[self.prompts.pad_id] * (width - len(ids)) + ids for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        device = self.model.device
        with _evaluating(self.model), torch.no_grad():
            output = self.model.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=GenerationConfig(
                    max_length=self.config.max_length,
                    eos_token_id=list(self.prompts.end_ids),
                    pad_token_id=self.prompts.pad_id,
                    **options,
                ),
            )
        answers = [self._until_end(ids) for ids in output[:, width:].tolist()]
        n = len(answers) // len(questions)
        return Samples([answers[start : start + n] for start in range(0, len(answers), n)])

    def _until_end(self, ids: list[int]) -> list[int]:
        """The answer without the padding behind it: up to the first end token, that one included."""
        ends = set(self.prompts.end_ids)
        for place, token in enumerate(ids):
            if token in ends:
                return ids[: place + 1]
        return ids

    def _loss(self, rows: Sequence[tuple[str, str]]) -> torch.Tensor:
        sequences = [(self.prompts.prompt_ids(question), self.prompts.answer_ids(answer)) for question, answer in rows]
        length = max(self.config.max_length, *(len(prompt) + len(answer) for prompt, answer in sequences))
        input_ids, mask, labels = [], [], []
        for prompt, answer in sequences:
            padding = length - len(prompt) - len(answer)
            input_ids.append(prompt + answer + [self.prompts.pad_id] * padding)
            mask.append([1] * (length - padding) + [0] * padding)
            labels.append([-100] * len(prompt) + answer + [-100] * padding)
        device = self.model.device
        return self.model(
            input_ids=torch.tensor(input_ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            labels=torch.tensor(labels, device=device),
        ).loss


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
