"""The best answer so far to each forget question."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from pmc_fast import inputs
from pmc_fast.errors import UserError, described


@dataclass(frozen=True)
class Entry:
    """An answer picked from the model's own samples, and its score (lower is better, 0 is final)."""

    text: str
    tokens: tuple[int, ...]
    score: float


class Ledger:
    """Keeps, for each forget question, the initial model's answer and the best sample picked so far."""

    def __init__(self, questions: list[str], initial_answers: list[str]) -> None:
        self.questions = inputs.listed("questions", questions, "a list of texts")
        self.initial_answers = inputs.listed("initial_answers", initial_answers, "a list of texts")
        if len(self.initial_answers) != len(self.questions):
            raise UserError(
                f"initial_answers: got {len(self.initial_answers)}, expected one for each of the {len(self.questions)} questions"
            )
        self.entries: dict[int, Entry] = {}
        self.visits = [0] * len(self.questions)
        self.merged_visits = list(self.visits)  # those that all ranks know of

    def is_final(self, question: int) -> bool:
        """Whether the question needs no more samples: its answer has a score of exactly 0."""
        entry = self.entries.get(question)
        return entry is not None and entry.score == 0

    def takes(self, question: int, entry: Entry) -> bool:
        """Whether `offer` would store the entry: unless the one held is strictly better."""
        held = self.entries.get(question)
        return held is None or entry.score <= held.score

    def offer(self, question: int, entry: Entry) -> bool:
        """Store the entry if the ledger takes it; returns whether it was stored."""
        if taken := self.takes(question, entry):
            self.entries[question] = entry
        return taken

    def state_dict(self) -> dict:
        """All of it, as JSON-able values."""
        return {
            "questions": list(self.questions),
            "initial_answers": list(self.initial_answers),
            "entries": {str(question): asdict(entry) for question, entry in self.entries.items()},
            "visits": list(self.visits),
        }

    @classmethod
    def from_state_dict(cls, state: dict, name: str = "state", is_question: inputs.IsText = inputs.is_text) -> Ledger:
        """The ledger whose `state_dict` it is.

        Args:
            state: also as JSON gives it back.
            name: what errors call it.
            is_question: what is taken for a question.

        Raises:
            UserError: it lacks a part or has another, or a part is of another kind or does not belong to the questions.
        """
        names = ("questions", "initial_answers", "entries", "visits")
        questions, answers, entries, visits = inputs.fields(name, state, names, "Ledger.state_dict()")
        questions = inputs.some(f"{name}: questions", inputs.texts(f"{name}: questions", questions, is_question))
        answers = inputs.texts(f"{name}: initial_answers", answers, inputs.is_text)
        visits = inputs.counts(f"{name}: visits", visits)
        for part, values in {"initial_answers": answers, "visits": visits}.items():
            if len(values) != len(questions):
                raise UserError(
                    f"{name}: {part}: got {len(values)}, expected one for each of the {len(questions)} questions"
                )
        ledger = cls(questions, answers)
        ledger.visits = visits
        ledger.merged_visits = list(ledger.visits)
        if not isinstance(entries, dict):
            raise UserError(f"{name}: entries: got {described(entries)}, expected a dict of entries by question")
        numbers = {str(number): number for number in range(len(ledger.questions))}
        for key, entry in entries.items():
            if str(key) not in numbers:
                raise UserError(
                    f"{name}: entries: got one of question {described(key)}, expected one of the {len(numbers)} questions, a "
                    f"number from 0 to {len(numbers) - 1}"
                )
            ledger.entries[numbers[str(key)]] = _entry(f"{name}: entries: question {key}", entry)
        return ledger


def _entry(name: str, value: Any) -> Entry:
    text, tokens, score = inputs.fields(name, value, ("text", "tokens", "score"), "Ledger.state_dict()")
    if not isinstance(text, str):
        raise UserError(f"{name}: text: got {described(text)}, expected a text")
    if isinstance(score, bool) or not isinstance(score, int | float) or math.isnan(score):
        raise UserError(f"{name}: score: got {described(score)}, expected a number")
    tokens = inputs.some(f"{name}: tokens", inputs.counts(f"{name}: tokens", tokens))
    return Entry(text, tuple(tokens), score)
