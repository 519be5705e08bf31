"""Which row each answer goes on in: those of a row that drew the same token stay together. torch alone, no value is waited for."""

from __future__ import annotations

import torch
from torch import Tensor

_TOKEN_BITS = 32


def regroup(
    token: Tensor,
    running: Tensor,
    *,
    row: Tensor,
    row_token: Tensor,
    inherited: Tensor,
    source: Tensor,
    destination: Tensor,
    counts: Tensor,
) -> None:
    """Give each text that goes on, a row and a token drawn there, a row of its own: texts lie in the first rows.

    The text of a row's first running answer stays in that row if so many texts there are; the others go where nobody stays,
    in the order of their first answers, so as few rows as possible are to be copied. None is both copied and copied onto.
    `pmc_fast.running_rows` does the same with sizes that depend on values, which a CUDA graph cannot have.

    Args:
        token: int64 [A], what each answer drew.
        running: bool [A], which answers go on.
        row: int64 [A], each answer's row; becomes its new row, 0 of an answer that does not go on.
        row_token: int64 [A]; of each text becomes what it drew.
        inherited: int64 [K, A], what rows hand on; of each text becomes what the row had that it comes from.
        source, destination: int64 [A]; become rows to copy and the rows that become copies, as many as counts says.
        counts: int64 [3]; becomes the number of texts, of running answers, of copies.
    """
    answers = len(token)
    index = torch.arange(answers, device=token.device)

    def scattered(place: Tensor, value: Tensor, where: Tensor) -> Tensor:
        """`value` at `place`, but only where `where` says so."""
        out = index.new_zeros(answers + 1)
        return out.scatter_(0, torch.where(where, place, answers), value)[:answers]

    text, order = torch.where(running, row << _TOKEN_BITS | token, -1).sort(stable=True)
    begins = torch.cat([index[:1] == 0, text[1:] != text[:-1]])
    first_of_text = torch.empty_like(index)
    first_of_text[order] = order[torch.where(begins, index, 0).cummax(0).values]
    first_of_row = torch.full_like(index, answers)
    first_of_row.scatter_reduce_(0, row, torch.where(running, index, answers), "amin")

    leads = running & (first_of_text == index)
    texts = leads.sum()
    stays = leads & (first_of_row[row] == index) & (row < texts)
    moves = leads & ~stays
    free = (index < texts) & (scattered(row, index + 1, stays) == 0)
    nth = moves.cumsum(0) - 1
    destination.copy_(scattered(free.cumsum(0) - 1, index, free))
    source.copy_(scattered(nth, row, moves))
    place = torch.where(stays, row, destination[nth.clamp(min=0)])

    leader = scattered(place, index, leads)  # of the text in each row
    row_token.copy_(torch.where(index < texts, token[leader], row_token))
    inherited.copy_(torch.where(index < texts, inherited[:, row[leader]], inherited))
    row.copy_(torch.where(running, place[first_of_text], 0))
    counts.copy_(torch.stack([texts, running.sum(), moves.sum()]))
