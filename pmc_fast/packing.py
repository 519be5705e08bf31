"""Ragged sequences as one batch: packed without padding for training, padded on the left for sampling."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pmc_fast import attention, packed_layers
from pmc_fast.cache import SampleCache
from pmc_fast.errors import UserError, described
from pmc_fast.models import LanguageModel
from pmc_fast.vocabulary import check_ids, vocabulary_size
from pmc_fast.wide_linear import wide_linear

# A beginning that is shorter is not worth the longer way of attention.
LEAST_SHARED = 8


@dataclass(frozen=True)
class Packed:
    """Sequences end to end; T tokens in all, N of them predict a label.

    input_ids: int64 [1, T], the beginning that all have in common first, once. position_ids: int64 [1, T], from 0 in each
    sequence. lengths: tokens of the common beginning (0 if there is none that is held once) and of each sequence beyond it.
    rows: int64 [N], the positions in [0, T) whose next token is a label. target: int64 [N], those labels.
    sequence: int64 [N], the sequence that each label belongs to.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: attention.PackedLengths
    rows: Tensor
    target: Tensor
    sequence: Tensor

    @property
    def count(self) -> int:
        """The number of sequences."""
        return len(self.lengths.own)

    def hidden(self, lm: LanguageModel, cache: SampleCache | None = None) -> Tensor:
        """The hidden states that predict the labels, [N, D]; the same as each sequence would give on its own.

        Unless the longest goes beyond what "dynamic" or "longrope" rotary embeddings were made for: they then turn all otherwise. Of a
        model that cannot run packed batches (`LanguageModel.unpackable`) each sequence is a row, padded behind its end.

        Args:
            cache: an empty one of T positions, which then holds the keys and values of all tokens.

        Raises:
            UserError: a sequence does not fit in the model's table of positions, or in a chunk of its attention; the model sees later
                tokens, or cannot run packed batches of so many; or it is to fill a cache, and cannot run packed batches.
            ValueError: a token is none of the model's (on a CPU alone: a GPU would have to be waited for).
        """
        for number, own in enumerate(self.lengths.own):
            lm.positions.check_sequence(f"sequence {number}", self.lengths.shared + own)
        lm.check_causal()
        check_ids(self.input_ids, vocabulary_size(lm.model))
        if lm.unpackable:
            if cache is not None:
                raise UserError(f"cache: got one, but {lm.unpackable}; expected None")
            return self._hidden_of_rows(lm)
        attention.install(lm.model)
        lm.positions.check_packed(self.input_ids.shape[1])
        hidden = packed_layers.hidden_of(lm, self.input_ids, self.position_ids, self.lengths, self.rows, cache)
        lm.packed_by = "modules" if hidden is None else packed_layers.KERNELS[lm.device.type]
        if hidden is not None:
            return hidden
        try:
            with attention.packed(self.lengths), wide_linear(lm):
                options = {"attention_mask": None, "packed_lengths": self.lengths}
                hidden = lm.hidden(self.input_ids, cache, position_ids=self.position_ids, **options)
        except attention.LengthsLost:
            if cache is not None:
                raise
            return self._hidden_of_rows(lm)  # of a model that was not to be tried
        return hidden[0, self.rows]

    def _hidden_of_rows(self, lm: LanguageModel) -> Tensor:
        lm.packed_by = "padded rows"
        shared, own = self.lengths
        begin, tokens = self.input_ids[0].split([shared, sum(own)])
        sequences = [torch.cat([begin, rest]) for rest in tokens.split(own)]
        mask = pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True)
        with wide_linear(lm):
            hidden = lm.hidden(pad_sequence(sequences, batch_first=True), attention_mask=mask)
        # Of the tokens behind the beginning, in which no label is: the sequence, and the place in it.
        number = torch.cat([torch.full_like(ids, row) for row, ids in enumerate(tokens.split(own))])
        return hidden[number[self.rows - shared], self.position_ids[0, self.rows]]


def pack(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> Packed:
    """Pack prompt + answer pairs; the answers' tokens are the labels.

    The last token of an answer predicts nothing, so it is a label but no input. On a CPU the tokens that all prompts begin
    with, such as a chat template's and its system prompt's, are held once, if there are LEAST_SHARED of them.

    Raises:
        ValueError: there are none, the numbers of prompts and answers differ, or one is empty.
        TypeError: either is no list of lists of integers.
    """
    for name, rows in (("prompts", prompts), ("answers", answers)):
        _check_tokens(name, rows)
    if len(prompts) != len(answers):
        raise ValueError(f"answers: got {len(answers)}, expected {len(prompts)}, as many as prompts")
    if not prompts:
        raise ValueError("prompts: got none, expected at least one")
    shared = _common(prompts) if torch.device(device).type == "cpu" else 0
    tokens = list(prompts[0][:shared]) if shared else []
    positions = list(range(shared))
    lengths, rows, target, sequence = [], [], [], []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if not prompt or not answer:
            raise ValueError(f"prompts, answers: sequence {number} is empty, expected at least one token in each")
        inputs = [*prompt[shared:], *answer[:-1]]
        first = len(tokens) + len(prompt) - shared - 1
        rows.extend(range(first, first + len(answer)))
        target.extend(answer)
        sequence.extend([number] * len(answer))
        tokens.extend(inputs)
        positions.extend(range(shared, shared + len(inputs)))
        lengths.append(len(inputs))

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Packed(
        tensor(tokens)[None],
        tensor(positions)[None],
        attention.PackedLengths(shared, tuple(lengths)),
        tensor(rows),
        tensor(target),
        tensor(sequence),
    )


def _check_tokens(name: str, rows: Sequence[Sequence[int]]) -> None:
    if not _is_list(rows):
        raise TypeError(f"{name}: got {described(rows)}, expected a list of lists of token ids")
    for number, row in enumerate(rows):
        if not _is_list(row):
            raise TypeError(
                f"{name}: row {number} is {described(row)}, expected a list of token ids (of a tensor, its tolist())"
            )
        try:
            list(map(operator.index, row))
        except TypeError:
            raise TypeError(f"{name}: row {number} is {reprlib.repr(row)}, expected integers") from None


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; their last tokens, which predict labels, left out."""
    if len(prompts) < 2:
        return 0
    same = 0
    for tokens in zip(*(prompt[:-1] for prompt in prompts), strict=False):
        if len(set(tokens)) > 1:
            break
        same += 1
    return same if same >= LEAST_SHARED else 0


def pad_left(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Prompts as one padded batch: input_ids and attention_mask, int64 [B, T], padding on the left.

    Raises ValueError for no sequences, TypeError for others than lists of integers, or a `pad_id` that is none.
    """
    sequences = sequences.tolist() if isinstance(sequences, Tensor) else sequences
    _check_tokens("sequences", sequences)
    if not sequences:
        raise ValueError("sequences: got none, expected at least one")
    if isinstance(pad_id, bool) or not isinstance(pad_id, int):
        raise TypeError(f"pad_id: got {described(pad_id)}, expected a token id")
    width = max(len(ids) for ids in sequences)
    input_ids = [[pad_id] * (width - len(ids)) + list(ids) for ids in sequences]
    attention_mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences]
    return tuple(torch.tensor(rows, dtype=torch.int64, device=device) for rows in (input_ids, attention_mask))
