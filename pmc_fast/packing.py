"""Ragged sequences as one batch: packed without padding for training, padded on the left for sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pmc_fast import attention
from pmc_fast.models import LanguageModel


@dataclass(frozen=True)
class Packed:
    """Sequences end to end; T tokens in all, N of them predict a label.

    input_ids: int64 [1, T]. position_ids: int64 [1, T], from 0 in each sequence. lengths: tokens of each sequence.
    rows: int64 [N], the positions in [0, T) whose next token is a label. target: int64 [N], those labels.
    sequence: int64 [N], the sequence that each label belongs to.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    rows: Tensor
    target: Tensor
    sequence: Tensor

    def hidden(self, lm: LanguageModel) -> Tensor:
        """The hidden states that predict the labels, [N, D]; the same as each sequence would give on its own."""
        attention.install(lm.model)
        with attention.packed():
            hidden = lm.hidden(
                self.input_ids,
                position_ids=self.position_ids,
                attention_mask=None,
                packed_lengths=self.lengths,
                use_cache=False,
            )
        return hidden[0, self.rows]


def pack(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> Packed:
    """Pack prompt + answer pairs; the answers' tokens are the labels.

    The last token of an answer predicts nothing, so it is a label but no input.

    Raises:
        ValueError: the numbers of prompts and answers differ, or one is empty.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"answers: got {len(answers)}, expected {len(prompts)}, as many as prompts")
    tokens: list[int] = []
    positions: list[int] = []
    lengths, rows, target, sequence = [], [], [], []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if not prompt or not answer:
            raise ValueError(f"prompts, answers: sequence {number} is empty, expected at least one token in each")
        inputs = [*prompt, *answer[:-1]]
        first = len(tokens) + len(prompt) - 1
        rows.extend(range(first, first + len(answer)))
        target.extend(answer)
        sequence.extend([number] * len(answer))
        tokens.extend(inputs)
        positions.extend(range(len(inputs)))
        lengths.append(len(inputs))

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Packed(
        tensor(tokens)[None], tensor(positions)[None], tuple(lengths), tensor(rows), tensor(target), tensor(sequence)
    )


def pad_left(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Prompts as one padded batch: input_ids and attention_mask, int64 [B, T], padding on the left."""
    width = max(len(ids) for ids in sequences)
    input_ids = torch.tensor([[pad_id] * (width - len(ids)) + list(ids) for ids in sequences], device=device)
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences], device=device)
    return input_ids, attention_mask
