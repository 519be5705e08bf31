"""Questions and answers as the token ids that a model is asked with and trained on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

from pmc_fast.data import is_utf8
from pmc_fast.errors import UserError, described

STYLES = ("auto", "chat", "tags", "plain")

_QUESTION, _ANSWER = "\u2045question\u2046", "\u2045answer\u2046"  # stand-ins that no template contains

# Without these, a reasoning model's template opens a thought that its finished conversations leave out, and Llama 3.2's
# writes today's date, so that a run resumed after midnight would ask differently; this date is that template's fallback.
_TEMPLATE_OPTIONS = {"enable_thinking": False, "date_string": "26 Jul 2024"}


def check_tokenizer(tokenizer: Any) -> None:
    """That it has what is used of a transformers tokenizer."""
    if not callable(tokenizer) or not all(hasattr(tokenizer, name) for name in ("decode", "eos_token_id")):
        raise UserError(f"tokenizer: got {described(tokenizer)}, expected a transformers tokenizer")


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name}: got {described(value)}, expected a text")
    if not is_utf8(value):
        raise UserError(f"{name}: got {described(value)}, expected UTF-8 text, without half of a surrogate pair")
    return value


class Prompts:
    """How a model is asked: by its chat template, by question/answer tags, or with the bare question.

    tags: ``"Question: {question}\\nAnswer:"`` then ``" {answer}"``. plain: ``"{question}"`` then ``" {answer}"``. The
    space belongs to the answer, as tokenizers join it to the first word. chat: what ``tokenizer.apply_chat_template``
    gives for the system prompt, the question and the answer; if the template refuses a system role, the system prompt
    opens the user's turn. Space around questions and answers is dropped. Tokens are cached.

    Args:
        tokenizer: a transformers tokenizer.
        style: "chat", "tags", "plain", or "auto": chat if the tokenizer has a template, else tags.
        system: the system prompt of a chat; "" leaves it out.

    Attributes:
        style: the style in use, never "auto".
        end_ids: the tokens that end an answer; the first one ends those of ``answer_ids``.
        pad_id: the token to fill up a batch with.

    Raises:
        UserError: no tokenizer, or one without an end token; an unknown style, chat without a template, a template that
            fails.
    """

    def __init__(self, tokenizer: Any, style: str = "auto", system: str = "You are a helpful assistant.") -> None:
        check_tokenizer(tokenizer)
        if style not in STYLES:
            raise UserError(f"style: got {style!r}, expected one of {', '.join(map(repr, STYLES))}")
        template = getattr(tokenizer, "chat_template", None)
        if style == "chat" and not template:
            raise UserError("style: got 'chat', but the tokenizer has no chat template; use 'tags' or 'plain'")
        self.tokenizer = tokenizer
        self.style = style if style != "auto" else "chat" if template else "tags"
        end = None
        if self.style == "chat":
            after = self._frame_chat(system)
            end = self._turn_end(after)
        else:
            self._before, self._between = {"tags": ("Question: ", "\nAnswer:"), "plain": ("", "")}[self.style]
            self._lead = " "
        ends = [i for i in (end, tokenizer.eos_token_id) if i is not None]
        if not ends:
            raise UserError(
                "tokenizer: it has no end token, so answers could never end; set eos_token, in tokenizer_config.json or "
                "on the tokenizer, to the token that ended answers in the model's training"
            )
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))
        self.pad_id: int = self.end_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._context_ids = self._encode("?" + self._between)
        self._remember()

    def _remember(self) -> None:
        self._prompt_ids = lru_cache(maxsize=65536)(self._encode_prompt)
        self._answer_ids = lru_cache(maxsize=65536)(self._encode_answer)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: without what is remembered, which belongs to this object."""
        return {name: held for name, held in vars(self).items() if name not in ("_prompt_ids", "_answer_ids")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember()

    def prompt_ids(self, question: str, prefill: str = "") -> list[int]:
        """The tokens that ask a question; an answer that starts with `prefill` is then under way.

        Space at the end of `prefill` is left to the answer, whose first token brings its own.
        """
        return list(self._prompt_ids(_text("question", question).strip(), _text("prefill", prefill).rstrip()))

    def answer_ids(self, answer: str) -> list[int]:
        """The tokens of an answer as they follow the prompt, the end token included."""
        return list(self._answer_ids(_text("answer", answer).strip()))

    @staticmethod
    def is_text(value: object) -> bool:
        """Whether it can be a question or an answer."""
        return isinstance(value, str) and bool(value.strip()) and is_utf8(value)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens, without special tokens, end tokens and surrounding space."""
        kept = [i for i in ids if i not in self.end_ids]
        return self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def _encode_prompt(self, question: str, prefill: str) -> tuple[int, ...]:
        text = self._before + question + self._between + (self._lead + prefill if prefill else "")
        if self.style == "chat":  # the template has written what starts a text
            return tuple(self._encode(text))
        ids = self.tokenizer(text)["input_ids"]
        return tuple(ids[:-1] if ids and ids[-1] in self.end_ids else ids)

    def _encode_answer(self, answer: str) -> tuple[int, ...]:
        if not answer:
            return self.end_ids[:1]
        # Some tokenizers put a space before a text, so the answer is encoded behind what precedes it in a conversation.
        ids, before = self._encode("?" + self._between + self._lead + answer), len(self._context_ids)
        ids = ids[before:] if ids[:before] == self._context_ids else self._encode(self._lead + answer)
        return (*ids, self.end_ids[0])

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _frame_chat(self, system: str) -> str:
        """Find what the template writes before the question, between it and the answer; returns what follows."""
        question, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
        try:
            opening = [{"role": "system", "content": system}] if system else []
            asked, whole = self._render([*opening, question], answer)
        except Exception:  # a template raises what it likes, such as for a system role it does not know
            question["content"] = f"{system}\n\n{_QUESTION}".strip()
            try:
                asked, whole = self._render([question], answer)
            except Exception as error:
                raise UserError(f"tokenizer: its chat template refuses the conversation: {error}") from error
        if asked.count(_QUESTION) != 1 or whole.count(_ANSWER) != 1:
            raise UserError("tokenizer: its chat template does not repeat the question and answer it is given")
        self._before, self._between = asked.split(_QUESTION)
        self._lead = ""
        answered, after = whole.split(_ANSWER)
        if answered.startswith(asked):
            # What the template writes between its generation prompt and the answer (the turn's header, if it ignores
            # add_generation_prompt) is not for the model to say; a space is, with the answer's first word.
            rest = answered[len(asked) :]
            header = rest.rstrip(" ")
            self._between += header
            self._lead = rest[len(header) :]
        return after

    def _render(self, chat: list[dict[str, str]], answer: dict[str, str]) -> tuple[str, str]:
        """The text that asks for an answer, and the text of the conversation with the answer."""
        template = partial(self.tokenizer.apply_chat_template, tokenize=False, **_TEMPLATE_OPTIONS)
        return template(chat, add_generation_prompt=True), template([*chat, answer])

    def _turn_end(self, after: str) -> int | None:
        """The token that ends a turn: the first special one after an answer, or else the first that is not plain text."""
        ids = self._encode(after.strip())
        special = {*self.tokenizer.all_special_ids, self.tokenizer.eos_token_id}
        added = set(getattr(self.tokenizer, "added_tokens_decoder", {}))
        return next((i for kind in (special, added) for i in ids if i in kind), None)
