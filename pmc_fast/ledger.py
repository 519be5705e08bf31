"""The best answer so far to each forget question."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pmc_fast.inputs import listed


@dataclass(frozen=True)
class Entry:
    """An answer picked from the model's own samples, and its score (lower is better, 0 is final)."""

    text: str
    tokens: tuple[int, ...]
    score: float


class Ledger:
    """Keeps, for each forget question, the initial model's answer and the best sample picked so far."""

    def __init__(self, questions: list[str], initial_answers: list[str]) -> None:
        self.questions = listed("questions", questions, "a list of texts")
        self.initial_answers = listed("initial_answers", initial_answers, "a list of texts")
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
            "questions": self.questions,
            "initial_answers": self.initial_answers,
            "entries": {str(question): asdict(entry) for question, entry in self.entries.items()},
            "visits": self.visits,
        }

    @classmethod
    def from_state_dict(cls, state: dict) -> Ledger:
        ledger = cls(list(state["questions"]), list(state["initial_answers"]))
        ledger.visits = list(state["visits"])
        ledger.merged_visits = list(ledger.visits)
        ledger.entries = {
            int(question): Entry(entry["text"], tuple(entry["tokens"]), entry["score"])
            for question, entry in state["entries"].items()
        }
        return ledger
