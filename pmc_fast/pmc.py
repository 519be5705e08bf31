"""Partial Model Collapse: sample, score, select, and one fused loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pmc_fast import inputs
from pmc_fast.config import PMCConfig
from pmc_fast.data import QA
from pmc_fast.errors import UserError, described
from pmc_fast.ledger import Entry, Ledger
from pmc_fast.models import LanguageModel
from pmc_fast.packing import pack, pad_left
from pmc_fast.phases import phase
from pmc_fast.philox import SELECTION_STREAM, gumbel
from pmc_fast.prompts import Prompts
from pmc_fast.pruning import Pruner, has_lower_bound
from pmc_fast.rewards import Reward, RougeRecall, asked
from pmc_fast.sampler import Sampler, SampleSource
from pmc_fast.sharding import gathered
from pmc_fast.vocabulary import check_tokens, vocabulary_size
from pmc_fast.warning import warn

__all__ = ["PMC", "PMCConfig"]


class PMC:
    """The PMC objective on a transformers causal language model, for any torch training loop.

        pmc = PMC(model, tokenizer, PMCConfig.published("llama-3.2-3b"))
        pmc.initialise(forget_questions)
        for forget in DataLoader(range(len(forget_questions)), batch_size=8, shuffle=True):  # their indices
            loss = pmc.loss(forget, random.choices(retain_rows, k=len(forget)))
            loss.backward(); optimizer.step(); optimizer.zero_grad()

    Equivalent to ``CE(picked answers) + retain_weight * CE(retain answers)``, each a mean over its own answer tokens,
    where an answer is picked from ``num_samples`` samples of the model as it is now. The true answers to the forget
    questions are never needed.

    Args:
        model: a transformers causal language model; the parameters that are trained are the ones sampled from.
        tokenizer: its tokenizer, or a ``Prompts``.
        config: hyperparameters.
        reward: scores samples against the initial model's answers, lower is better and 0 final;
            default ``RougeRecall(config.min_words)``.
        sampler: draws the answers, see ``SampleSource``; default a ``Sampler`` of the model. It must sample from the
            parameters as they are at each call.

    Raises:
        UserError: an argument is of another kind, the model has no head this library knows or sees later tokens, or the
            tokenizer has no end token that the model has.

    Source: arXiv 2507.04219, equation 1 and algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: PMCConfig | None = None,
        reward: Reward | None = None,
        sampler: SampleSource | None = None,
    ) -> None:
        inputs.has_method("sampler", sampler, "sample", "an object with Sampler's sample method")
        inputs.has_method("reward", reward, "score", "an object with a score method, such as RougeRecall()")
        self.config = config = PMCConfig() if config is None else config
        if not isinstance(config, PMCConfig):
            raise UserError(
                f'config: got {described(config)}, expected a PMCConfig, such as PMCConfig.published("llama-3.2-3b")'
            )
        self.lm = LanguageModel(model)
        self.sampler = Sampler(self.lm) if sampler is None else sampler
        self.prompts = (
            tokenizer
            if isinstance(tokenizer, Prompts)
            else Prompts(tokenizer, style=config.prompt_style, system=config.system_prompt)
        )
        self.lm.try_packing()
        check_tokens("tokenizer: its end token", self.prompts.end_ids[:1], vocabulary_size(self.lm.model))
        self.reward = RougeRecall(min_words=config.min_words) if reward is None else reward
        self.ledger: Ledger | None = None
        self.stats: dict[str, Any] = {}
        self.prepared_batches = 0  # that `prepare` sampled for and `loss` has not met
        self._prepared: set[int] = set()
        self._ahead = _no_samples()  # what `prepare` did since the last loss

    def initialise(
        self,
        forget_questions: Sequence[str],
        progress: Callable[[int], object] | None = None,
        answers: Sequence[str] | None = None,
    ) -> None:
        """Remember what the model answers to the forget questions now (greedily): what samples are scored against.

        Warns if the reward can see no word in some of the answers: every sample would be perfect.

        Args:
            forget_questions: at least one.
            progress: called with the number of questions answered after each batch.
            answers: one for each question, if they are known; default ``greedy_answers(forget_questions)``.

        Raises:
            UserError: there is no question, one that is no text or blank or has tokens that the model has not, or another
                number of answers.
        """
        questions = inputs.texts("forget_questions", forget_questions, self.prompts.is_text)
        inputs.some("forget_questions", questions)
        self._check_questions("forget_questions", questions)
        if answers is None:
            answers = self.greedy_answers(questions, progress)
        else:
            answers = inputs.texts("answers", answers, inputs.is_text)
        if len(answers) != len(questions):
            raise UserError(
                f"answers: got {len(answers)}, expected one for each of the {len(questions)} forget_questions"
            )
        words = getattr(self.reward, "words", None)
        blank = [q for q, a in zip(questions, answers, strict=True) if words(a) == 0] if words else []
        self._begin(Ledger(questions, answers), set())
        if blank:
            warn(
                f"the model's answers to {len(blank)} of {len(questions)} forget questions (the first: {blank[0]!r}) "
                "hold no word that the reward can see, so any sample scores 0, the best there is, for them; for text "
                "outside a-z and 0-9 give PMC a reward with a fitting tokenizer, RougeRecall(tokenizer=...)"
            )

    def greedy_answers(self, questions: Sequence[str], progress: Callable[[int], object] | None = None) -> list[str]:
        """What the model answers now, token by token the most probable, in batches of ``config.batch_size``."""
        from pmc_fast.evaluation import greedy_answers

        return greedy_answers(
            self.lm,
            self.prompts,
            questions,
            max_new_tokens=self.config.max_new_tokens,
            max_length=self.config.max_length if self.config.max_new_tokens is None else None,
            batch_size=self.config.batch_size,
            progress=progress,
            sampler=self.sampler,
        )

    def prepare(self, batches: Iterable[Iterable[int]]) -> None:
        """Sample for the coming micro-batches of an optimizer step in one call: they share the weights.

        The calls of ``loss`` for these batches, in this order, then give what they would have given without it, unless a
        question is in two of them and ``max_length`` limits answers by what their batch is padded to.

        Args:
            batches: for each micro-batch, its indices into the questions given to ``initialise``.

        Raises:
            UserError: ``initialise`` was not called, or an index is no integer or out of range.
        """
        ledger = self._initialised()
        batches = [inputs.indices("forget", batch, len(ledger.questions)) for batch in inputs.batches(batches)]
        self.stats = self._ahead
        groups, prepared = [], set(self._prepared)
        for batch in batches:
            fresh = [q for q in dict.fromkeys(batch) if not ledger.is_final(q) and q not in prepared]
            prepared.update(fresh)
            groups.append(fresh)
        self._resample(groups)
        self._prepared = prepared
        self.prepared_batches += len(groups)

    def loss(self, forget: Iterable[int], retain: Iterable[QA | Mapping[str, str]]) -> Tensor:
        """Sample, score and select answers to the forget questions, then the loss of one micro-batch.

        Args:
            forget: indices into the questions given to ``initialise``: a list, or a tensor as a DataLoader gives it.
            retain: rows to keep answering right, ``QA`` or others with question and answer, as attributes or as keys.

        Returns:
            float32 scalar (float64 if the model is); backward() reaches every parameter that requires a gradient. ``stats``
            then holds collapse_loss, retain_loss (nats per token), score (mean of the selected), sampled_tokens, decoded_tokens (those
            that went through the model: what a question's answers begin with in common does once), trained_tokens,
            pruned_samples (stopped early, since they could not be picked), pruned_tokens (that these could still have
            had at most), empty_picks (selected answers without a scorable word), truncated_picks, seconds (sample,
            score, train). What ``prepare`` did is counted in the first loss after it.

        Raises:
            UserError: ``initialise`` was not called, an index is no integer or out of range, a row lacks a text, is longer
                than the model has positions or of tokens that it has not, or both batches are empty; before anything is sampled.
            ValueError: the reward gave another number of scores than of candidates, or nan.
        """
        self.lm.check_whole()
        ledger = self._initialised()
        forget = inputs.indices("forget", forget, len(ledger.questions))
        kept = self._encoded("retain", retain)
        if not forget and not kept:
            raise UserError("forget, retain: both are empty, expected at least one row")
        self.stats, self._ahead = self._ahead, _no_samples()
        fresh = [q for q in dict.fromkeys(forget) if q not in self._prepared and not ledger.is_final(q)]
        if fresh or not self.prepared_batches:
            self._resample([fresh])
        self._prepared.difference_update(forget)
        self.prepared_batches = max(0, self.prepared_batches - 1)
        with self._timed("train"):
            entries = [ledger.entries[question] for question in forget]
            answers = [self._trained(entry) for entry in entries]
            prompts = [self.prompts.prompt_ids(ledger.questions[question]) for question in forget]
            loss, parts = self._packed_loss([*zip(prompts, answers, strict=True), *kept], collapse=len(forget))
        self.stats.update(zip(("collapse_loss", "retain_loss"), parts, strict=True))
        scores = [entry.score for entry in entries]
        self.stats["score"] = float(np.mean(scores)) if scores else 0.0
        self.stats["empty_picks"] = sum(
            words(entry.text) == 0 for entry in entries if (words := getattr(self.reward, "words", None))
        )
        return loss

    def supervised_loss(self, rows: Iterable[QA | Mapping[str, str]]) -> Tensor:
        """The mean negative log-likelihood of the rows' answer tokens: ordinary fine-tuning, packed.

        Returns:
            float32 scalar (float64 if the model is), nats per token. ``stats`` then holds trained_tokens and seconds (train).

        Raises:
            UserError: there is no row, or one without question and answer, longer than the model has positions or of tokens
                that it has not.
        """
        self.stats = {"seconds": {"train": 0.0}}
        with self._timed("train"):
            encoded = inputs.some("rows", self._encoded("rows", rows))
            return self._packed_loss(encoded, collapse=len(encoded))[0]

    def state_dict(self) -> dict:
        """The ledger, as JSON-able values: a run that loads it continues as if it had never stopped."""
        return {"ledger": None if self.ledger is None else self.ledger.state_dict(), "prepared": sorted(self._prepared)}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what ``state_dict`` returned, also under another ``reencode`` than its answers were picked with.

        Raises:
            UserError: it is none of these, or one of other texts, numbers or lengths than go together; or an answer in it, as it
                would be trained on now, is longer than the model has positions or of tokens that it has not. What was held
                before stays.
        """
        self._begin(*self.read_state(state))

    def read_state(self, state: dict) -> tuple[Ledger | None, set[int]]:
        """What `load_state_dict` would hold from now on: the ledger, and the questions sampled for ahead."""
        ledger, prepared = inputs.fields("state", state, ("ledger", "prepared"), "PMC.state_dict()")
        if ledger is not None:
            ledger = Ledger.from_state_dict(ledger, "state: ledger", self.prompts.is_text)
            self._check_questions("state: ledger: questions", ledger.questions)
            for question, entry in ledger.entries.items():
                self._check_trained(ledger, question, entry)
        elif prepared != []:
            raise UserError(f"state: prepared: got {described(prepared)}, expected [] beside a ledger of None")
        count, entries = (len(ledger.questions), ledger.entries) if ledger else (0, {})
        prepared = set(inputs.indices("state: prepared", prepared, count))
        if missing := sorted(prepared - entries.keys()):
            raise UserError(
                f"state: prepared: got question {missing[0]}, expected questions of which the ledger holds an entry"
            )
        return ledger, prepared

    def _begin(self, ledger: Ledger | None, prepared: set[int]) -> None:
        self.ledger, self._prepared = ledger, prepared
        self.prepared_batches, self._ahead = 0, _no_samples()

    def _initialised(self) -> Ledger:
        if self.ledger is None:
            raise UserError("PMC.loss: the ledger is empty; call initialise(forget_questions) first")
        return self.ledger

    def _check_questions(self, name: str, questions: Sequence[str]) -> None:
        size = vocabulary_size(self.lm.model)
        for number, question in enumerate(questions):
            check_tokens(f"{name}: number {number}", self.prompts.prompt_ids(question), size)

    def _encoded(self, name: str, rows: Iterable[Any]) -> list[tuple[list[int], list[int]]]:
        """The tokens of each row's prompt and answer."""
        rows = inputs.rows(name, rows, self.prompts.is_text)
        encoded = [(self.prompts.prompt_ids(row.question), self.prompts.answer_ids(row.answer)) for row in rows]
        size = vocabulary_size(self.lm.model)
        for number, (prompt, answer) in enumerate(encoded):  # whose last token predicts nothing
            self.lm.positions.check_sequence(f"{name}: row {number}", len(prompt) + len(answer) - 1)
            check_tokens(f"{name}: row {number}", [*prompt, *answer], size)
        return encoded

    def _resample(self, batches: Sequence[Sequence[int]]) -> None:
        """Draw new answers to the questions of some batches and offer the picked ones to the ledger."""
        with gathered(self.lm.root):  # also without questions: other ranks may have some
            if questions := [question for batch in batches for question in batch]:
                self._draw(questions, batches)

    def _draw(self, questions: list[int], batches: Sequence[Sequence[int]]) -> None:
        ledger, config = self.ledger, self.config
        references = [ledger.initial_answers[q] for q in questions]
        with self._timed("sample"):
            prompts = [self.prompts.prompt_ids(ledger.questions[q]) for q in questions]
            input_ids, attention_mask = pad_left(prompts, self.prompts.pad_id, self.lm.device)
            # Every visit to a question draws from random streams of its own, whoever else is in the batch.
            streams = _on_host([ledger.visits[q] * len(ledger.questions) + q for q in questions])
            limits = self._limits(batches)
            max_length = config.max_length if config.max_new_tokens is None else None
            if self.lm.positions.fixed:  # else the sampler warns
                # An answer that is cut off is trained on with an end token.
                self.lm.positions.check_answers(_on_host([len(ids) for ids in prompts]), limits, max_length, more=1)
            samples = self.sampler.sample(
                input_ids,
                attention_mask,
                num_samples=config.num_samples,
                max_new_tokens=limits,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                min_p=config.min_p,
                eos_token_id=self.prompts.end_ids,
                seed=config.seed,
                sequence_ids=streams.to(self.lm.device),
                prune=self._pruner(questions, references),
            )
        with self._timed("score"):
            tokens, lengths = samples.tokens.cpu().tolist(), samples.lengths.cpu().tolist()
            finished, pruned = samples.finished.cpu().numpy(), samples.pruned.cpu().numpy()
            answers = [[t[:n] for t, n in zip(*row, strict=True)] for row in zip(tokens, lengths, strict=True)]
            kept = np.argwhere(~pruned).tolist()
            with phase("detokenise"):
                texts = {(row, i): self.prompts.decode(answers[row][i]) for row, i in kept}
            scores = np.full(pruned.shape, np.inf)
            with phase("score"):
                scores[~pruned] = asked(
                    self.reward, "score", [references[row] for row, _ in kept], list(texts.values())
                )
            picks = self._select(scores, finished, streams)
            picked = []
            for row, (question, pick) in enumerate(zip(questions, picks, strict=True)):
                if pruned[row, pick]:
                    continue  # they all are, or the others score inf: each is worse than the answer held
                ids, whole = answers[row][pick], bool(finished[row, pick])
                ended = ids if whole else [*ids, self.prompts.end_ids[0]]
                entry = Entry(texts[row, pick], tuple(ended), float(scores[row, pick]))
                if ledger.takes(question, entry):
                    self._check_trained(ledger, question, entry)
                    picked.append((question, entry, whole))
        self.stats["sampled_tokens"] += samples.count
        self.stats["decoded_tokens"] += samples.count if samples.decoded is None else samples.decoded
        self.stats["pruned_samples"] += int(pruned.sum())
        self.stats["pruned_tokens"] += int(((limits[:, None] - samples.lengths.cpu()) * samples.pruned.cpu()).sum())
        for question in questions:
            ledger.visits[question] += 1
        for question, entry, whole in picked:
            ledger.offer(question, entry)
            self.stats["truncated_picks"] += not whole

    def _trained(self, entry: Entry) -> list[int]:
        """The tokens that an answer is trained on as."""
        return self.prompts.answer_ids(entry.text) if self.config.reencode else list(entry.tokens)

    def _check_trained(self, ledger: Ledger, question: int, entry: Entry) -> None:
        """That the model can train on it: encoded again, a text may have more tokens than were drawn, and others."""
        what, hint = f"the answer picked for question {question}", ""
        if self.config.reencode:
            what = f"reencode: {what}, encoded again,"
            hint = "; give reencode=False, which trains on the tokens as drawn, or a lower max_length or max_new_tokens"
        prompt, answer = self.prompts.prompt_ids(ledger.questions[question]), self._trained(entry)
        self.lm.positions.check_sequence(what, len(prompt) + len(answer) - 1, hint)
        check_tokens(what, answer, vocabulary_size(self.lm.model))

    def _limits(self, batches: Sequence[Sequence[int]]) -> Tensor:
        """Tokens per answer at most, for each question; max_length counts the prompts of a batch as padded together."""
        limits = []
        for batch in batches:
            limit = self.config.max_new_tokens
            if limit is None and batch:
                width = max(len(self.prompts.prompt_ids(self.ledger.questions[q])) for q in batch)
                limit = self.config.max_length - width
                if limit < 1:
                    raise UserError(
                        f"max_length: got {self.config.max_length}, which leaves no room for an answer after prompts "
                        f"of up to {width} tokens"
                    )
            limits += [limit] * len(batch)
        return _on_host(limits)

    def _pruner(self, questions: Sequence[int], references: Sequence[str]) -> Pruner | None:
        if not (self.config.prune and self.config.selection == "best" and has_lower_bound(self.reward)):
            return None
        held = [self.ledger.entries[q].score if q in self.ledger.entries else math.inf for q in questions]
        options = {"keep_truncated": self.config.keep_truncated}
        return Pruner(self.reward, self.prompts, references, held, self.config.num_samples, **options)

    def _select(self, scores: np.ndarray, finished: np.ndarray, streams: Tensor) -> np.ndarray:
        """The sample to take for each question: the best, the first on ties; or one drawn by Bradley-Terry."""
        if not self.config.keep_truncated:
            scores = np.where(finished | ~finished.any(1, keepdims=True), scores, np.inf)
        if self.config.selection == "best":
            return scores.argmin(1)
        noise = gumbel(self.config.seed, streams, torch.zeros_like(streams), scores.shape[1], SELECTION_STREAM)
        return (-scores / self.config.tau + noise.numpy()).argmax(1)

    def _packed_loss(
        self, sequences: list[tuple[list[int], list[int]]], collapse: int
    ) -> tuple[Tensor, tuple[float, float]]:
        """CE over the first `collapse` sequences + retain_weight * CE over the others, in one forward pass; and either CE."""
        prompts, answers = zip(*sequences, strict=True)
        with phase("pack"):
            packed = pack(prompts, answers, self.lm.device)
        # Counted on the host: a GPU would have to be waited for.
        counts = [sum(map(len, part)) for part in (answers[:collapse], answers[collapse:])]
        is_collapse = packed.sequence < collapse
        with phase("forward"):
            hidden = packed.hidden(self.lm)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        token_weight = torch.full_like(packed.target, self.config.retain_weight / max(1, counts[1]), dtype=wide)
        token_weight.masked_fill_(is_collapse, 1 / max(1, counts[0]))
        with phase("loss"):
            loss, token_nll = self.lm.head.collapse_loss(hidden, packed.target, token_weight, ignore_index=None)
        totals = torch.stack([(token_nll * part).sum() for part in (is_collapse, ~is_collapse)]).tolist()
        self.stats["trained_tokens"] = packed.input_ids.numel()
        return loss, tuple(total / max(1, count) for total, count in zip(totals, counts, strict=True))

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.stats["seconds"][part] += time.perf_counter() - start


def _on_host(values: list[int]) -> Tensor:
    """int64, on the CPU whatever torch's default device is."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _no_samples() -> dict[str, Any]:
    """The part of ``PMC.stats`` that sampling adds to."""
    names = ("sampled_tokens", "decoded_tokens", "pruned_samples", "pruned_tokens", "truncated_picks")
    counts = dict.fromkeys(names, 0)
    return {"seconds": {"sample": 0.0, "score": 0.0, "train": 0.0}, **counts}
