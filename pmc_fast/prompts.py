"""Questions and answers as the token ids that a model is asked with and trained on."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pmc_fast.errors import UserError

STYLES = ("auto", "chat", "tags", "plain")

_QUESTION, _ANSWER = "\u2045question\u2046", "\u2045answer\u2046"  # stand-ins that no template contains


class Prompts:
    """How a model is asked: by its chat template, by question/answer tags, or with the bare question.

    tags: ``"Question: {question}\\nAnswer:"`` then ``" {answer}"``. plain: ``"{question}"`` then ``" {answer}"``. The
    space belongs to the answer, as byte-level tokenizers join it to the first word. chat: what
    ``tokenizer.apply_chat_template`` gives for the system prompt, the question and the answer.

    Args:
        tokenizer: a transformers tokenizer.
        style: "chat", "tags", "plain", or "auto": chat if the tokenizer has a template, else tags.
        system: the system prompt of a chat; "" leaves it out.

    Raises:
        UserError: an unknown style, chat without a template, or a tokenizer without an end token.
    """

    def __init__(self, tokenizer: Any, style: str = "auto", system: str = "You are a helpful assistant.") -> None:
        if style not in STYLES:
            raise UserError(f"style: got {style!r}, expected one of {', '.join(map(repr, STYLES))}")
        template = getattr(tokenizer, "chat_template", None)
        if style == "chat" and not template:
            raise UserError("style: got 'chat', but the tokenizer has no chat template; use 'tags' or 'plain'")
        if tokenizer.eos_token_id is None:
            raise UserError("tokenizer: it has no end token (eos_token), so answers could never end; set one")
        self.tokenizer = tokenizer
        self.style = style if style != "auto" else "chat" if template else "tags"
        self._system = system
        self.pad_id: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if self.style == "chat":
            self._frame_chat()
        else:
            self._before, self._between = {"tags": ("Question: ", "\nAnswer:"), "plain": ("", "")}[self.style]
            self._lead, self.end_ids = " ", (tokenizer.eos_token_id,)
        self._prompt_ids = lru_cache(maxsize=65536)(self._encode_prompt)
        self._answer_ids = lru_cache(maxsize=65536)(self._encode_answer)

    def prompt_ids(self, question: str, prefill: str = "") -> list[int]:
        """The tokens that ask a question; an answer that starts with `prefill` is then under way."""
        return list(self._prompt_ids(question, prefill))

    def answer_ids(self, answer: str) -> list[int]:
        """The tokens of an answer as they follow the prompt, the end token included."""
        return list(self._answer_ids(answer))

    def decode(self, ids: list[int]) -> str:
        """The text of an answer's tokens, without special tokens and surrounding space."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _encode_prompt(self, question: str, prefill: str) -> tuple[int, ...]:
        text = self._before + question + self._between
        if prefill:
            text += self._lead + prefill.rstrip()
        return tuple(self._encode(text, special=self.style != "chat"))

    def _encode_answer(self, answer: str) -> tuple[int, ...]:
        return (*self._encode(self._lead + answer, special=False), self.end_ids[0])

    def _encode(self, text: str, special: bool) -> list[int]:
        """Token ids; with `special`, what the tokenizer puts before a text (not after it)."""
        ids = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        if special and ids and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        return ids

    def _frame_chat(self) -> None:
        """Find what the template writes before the question, between it and the answer, and after the answer."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]

        def render(messages: list, **options) -> str:
            try:
                return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
            except Exception as error:  # templates raise what they like, such as for a system role they do not know
                raise UserError(f"tokenizer: its chat template refuses the conversation: {error}") from error

        asked = render([*system, turns[0]], add_generation_prompt=True)
        whole = render([*system, *turns])
        if asked.count(_QUESTION) != 1 or whole.count(_ANSWER) != 1:
            raise UserError("tokenizer: its chat template does not repeat the question and answer it is given")
        self._before, self._between = asked.split(_QUESTION)
        answered, after = whole.split(_ANSWER)
        # Text that the template writes between its generation prompt and the answer (a space, say) starts the answer.
        self._lead = answered[len(asked) :] if answered.startswith(asked) else ""
        ids = self._encode(after.strip(), special=False)
        special = set(self.tokenizer.all_special_ids) | {self.tokenizer.eos_token_id}
        turn_end = next((i for i in ids if i in special), self.tokenizer.eos_token_id)
        self.end_ids = tuple(dict.fromkeys((turn_end, self.tokenizer.eos_token_id)))
