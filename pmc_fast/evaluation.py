"""Unlearn quality, utility and leakage, by ROUGE-L recall against the true answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pmc_fast import inputs
from pmc_fast.data import QA
from pmc_fast.errors import UserError, described
from pmc_fast.models import LanguageModel
from pmc_fast.ops import rouge_l_recall
from pmc_fast.packing import pad_left
from pmc_fast.prompts import Prompts
from pmc_fast.rewards import RougeRecall
from pmc_fast.sampler import Sampler, SampleSource
from pmc_fast.sampling_inputs import whole
from pmc_fast.sharding import gathered
from pmc_fast.warning import warn

Progress = Callable[[int], object]


def sampled_answers(
    model: nn.Module | LanguageModel,
    prompts: Prompts,
    questions: Sequence[str],
    *,
    prefill: str = "",
    batch_size: int = 8,
    progress: Progress | None = None,
    sampler: SampleSource | None = None,
    **sampling,
) -> list[list[str]]:
    """Answers to each question, in batches of questions of about equal length.

    Args:
        model, prompts: the model and how it is asked.
        questions: B questions.
        prefill: text that every answer starts with; it is not part of what is returned.
        batch_size: questions at a time.
        progress: called with the number of questions answered after each batch.
        sampler: what to draw from; default a ``Sampler`` of the model.
        sampling: the options of ``Sampler.sample`` but for what is made of prompts and questions here: eos_token_id, sequence_ids (a
            question's number) and prune.

    Returns:
        For each question, ``num_samples`` answers.

    Raises:
        UserError: an argument is of another kind or one of these, or a question is no text or blank.
        ValueError, TypeError: as ``Sampler.sample``.
    """
    _check_prompts(prompts)
    inputs.has_method("sampler", sampler, "sample", "an object with Sampler's sample method")
    inputs.positive("batch_size", batch_size)
    questions = inputs.texts("questions", questions, prompts.is_text)
    if made := [name for name in ("eos_token_id", "sequence_ids", "prune") if name in sampling]:
        raise UserError(f"{made[0]}: it is made of the prompts and the questions' numbers here; expected none")
    limit = sampling.pop("max_new_tokens", None)
    limits = _limits(limit, len(questions))
    lm = model if isinstance(model, LanguageModel) else LanguageModel(model)
    sampler = Sampler(lm) if sampler is None else sampler
    encoded = [prompts.prompt_ids(question, prefill=prefill) for question in questions]
    order = sorted(range(len(questions)), key=lambda i: len(encoded[i]))
    answers: list[list[str]] = [[] for _ in questions]

    with gathered(lm.root):
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            input_ids, attention_mask = pad_left([encoded[i] for i in batch], prompts.pad_id, lm.device)
            samples = sampler.sample(
                input_ids,
                attention_mask,
                eos_token_id=prompts.end_ids,
                sequence_ids=torch.tensor(batch, device=lm.device),
                max_new_tokens=limit if limits is None else limits[batch],
                **sampling,
            )
            tokens, lengths = samples.tokens.tolist(), samples.lengths.tolist()
            for i, row_tokens, row_lengths in zip(batch, tokens, lengths, strict=True):
                answers[i] = [prompts.decode(t[:n]) for t, n in zip(row_tokens, row_lengths, strict=True)]
            if progress:
                progress(len(batch))
    return answers


def _limits(given: object, questions: int) -> Tensor | None:
    """Each question's tokens at most, of what may be one number for all (None, then)."""
    wanted = f"an integer or int64 [{questions}], one for each question"
    limits = None if given is None else whole("max_new_tokens", given, wanted)
    if limits is None or limits.dim() == 0:
        return None
    if limits.shape != (questions,):
        raise ValueError(f"max_new_tokens: got {limits.dtype} of shape {list(limits.shape)}, expected {wanted}")
    return limits


def greedy_answers(
    model: nn.Module | LanguageModel,
    prompts: Prompts,
    questions: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
    sampler: SampleSource | None = None,
) -> list[str]:
    """The most probable answer to each question, token by token; raises as ``sampled_answers``.

    It ends after ``max_new_tokens``, or where it and its padded prompt have ``max_length``: at most one of both, by default 128 new tokens.
    """
    if max_length is None and max_new_tokens is None:
        max_new_tokens = 128
    limit = {"max_new_tokens": max_new_tokens, "max_length": max_length}
    options = {"batch_size": batch_size, "progress": progress, "sampler": sampler}
    answers = sampled_answers(model, prompts, questions, temperature=0.0, **options, **limit)
    return [answer for (answer,) in answers]


def evaluate(
    model: nn.Module | LanguageModel,
    prompts: Prompts,
    *,
    forget: Sequence[QA],
    retain: Sequence[QA],
    paraphrased: Sequence[QA] | None = None,
    utility: Mapping[str, Sequence[QA]] | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> dict:
    """How well the forget set is forgotten and everything else remembered.

    With R the mean ROUGE-L recall of greedy answers against the true ones: unlearn_quality is
    ``100 * (1 - mean of R_forget and R_paraphrased)``, utility ``100 * mean(R_retain, R of each utility set)``. Warns of
    true answers without a word in a-z and 0-9, whose recall is 0.

    Args:
        model, prompts: the model and how it is asked.
        forget, retain: question/answer rows.
        paraphrased: the forget questions asked otherwise, or None.
        utility: further sets by name, such as world facts.
        max_new_tokens: tokens per answer at most.
        batch_size: questions at a time.
        progress: called with the number of questions answered after each batch.

    Returns:
        forget_rouge_l and, if given, paraphrased_rouge_l (both in [0, 1]), unlearn_quality and utility (percent),
        retain_rouge_l, and utility_sets, the R of each utility set by name.

    Raises:
        UserError: an argument is of another kind, a set is empty, or one of its rows has no question or answer.

    Source: arXiv 2507.04219, section 5 (metrics).
    """

    def recall(rows: Sequence[QA]) -> float:
        answers = greedy_answers(
            model,
            prompts,
            [row.question for row in rows],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
        return float(rouge_l_recall(answers, [row.answer for row in rows]).mean())

    _check_prompts(prompts)
    forget, retain = _rows("forget", forget, prompts), _rows("retain", retain, prompts)
    if paraphrased is not None:
        paraphrased = _rows("paraphrased", paraphrased, prompts)
    if not isinstance(utility, Mapping | None):
        raise UserError(f"utility: got {described(utility)}, expected a dict of sets by name, or None")
    utility = {name: _rows(f"utility[{name!r}]", rows, prompts) for name, rows in (utility or {}).items()}
    model = model if isinstance(model, LanguageModel) else LanguageModel(model)
    result = {"forget_rouge_l": recall(forget)}
    forgotten = [result["forget_rouge_l"]]
    if paraphrased is not None:
        result["paraphrased_rouge_l"] = recall(paraphrased)
        forgotten.append(result["paraphrased_rouge_l"])
    result["unlearn_quality"] = 100 * (1 - float(np.mean(forgotten)))
    result["retain_rouge_l"] = recall(retain)
    sets = {name: recall(rows) for name, rows in utility.items()}
    result["utility"] = 100 * float(np.mean([result["retain_rouge_l"], *sets.values()]))
    result["utility_sets"] = sets
    return result


def leakage(
    model: nn.Module | LanguageModel,
    prompts: Prompts,
    forget: Sequence[QA],
    *,
    num_samples: int = 100,
    prefill: str = "",
    temperature: float = 1.0,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    """The worst sample's ROUGE-L recall against the true answer, averaged over the forget questions.

    Args:
        model, prompts: the model and how it is asked.
        forget: question/answer rows.
        num_samples: answers per question.
        prefill: text that every answer starts with, such as "The answer is: ".
        temperature: of sampling.
        max_new_tokens: tokens per answer at most.
        batch_size: questions at a time.
        seed: of the samples, which do not depend on batch_size.
        progress: called with the number of questions answered after each batch.

    Returns:
        In [0, 1].

    Raises:
        UserError: as ``evaluate``.

    Source: arXiv 2507.04219, section 5 (leakage).
    """
    _check_prompts(prompts)
    forget = _rows("forget", forget, prompts)
    answers = sampled_answers(
        model,
        prompts,
        [row.question for row in forget],
        prefill=prefill,
        batch_size=batch_size,
        progress=progress,
        num_samples=num_samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    references = [row.answer for row in forget for _ in range(num_samples)]
    scores = rouge_l_recall([text for row in answers for text in row], references)
    return float(scores.reshape(len(forget), num_samples).max(1).mean())


def _check_prompts(prompts: Prompts) -> None:
    if not isinstance(prompts, Prompts):
        raise UserError(f"prompts: got {described(prompts)}, expected a Prompts: pmc_fast.Prompts(tokenizer)")


def _rows(name: str, rows: Iterable[QA], prompts: Prompts) -> list[QA]:
    rows = inputs.some(name, inputs.rows(name, rows, prompts.is_text))
    words = RougeRecall().words
    if blank := [row.question for row in rows if not words(row.answer)]:
        warn(
            f"{name}: the answers to {len(blank)} of {len(rows)} questions (the first: {blank[0]!r}) hold no word that ROUGE-L can "
            "see, none in a-z and 0-9, so the model's recall of them is 0 whatever it says"
        )
    return rows
