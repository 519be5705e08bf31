"""Data-parallel PMC: every rank has the whole model and a part of the forget set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from pmc_fast.data import QA
from pmc_fast.errors import UserError
from pmc_fast.inputs import check_pmc, texts
from pmc_fast.ledger import Ledger
from pmc_fast.pmc import PMC
from pmc_fast.sharding import begin_forward, is_tensor_parallel, is_zero3


class LossModule(nn.Module):
    """``PMC.loss`` as a module's forward, for ``DistributedDataParallel``, ``fully_shard`` and ``deepspeed.initialize``.

    Args:
        pmc: the model it holds is this module's only submodule; its weights are from now on gathered from this module.

    Raises:
        UserError: it is no PMC.
    """

    def __init__(self, pmc: PMC) -> None:
        check_pmc(pmc)
        super().__init__()
        self.model = pmc.lm.model
        self.pmc = pmc
        pmc.lm.root = self

    def forward(self, forget: Sequence[int], retain: Sequence[QA]) -> Tensor:
        if not self.pmc.prepared_batches and any(map(is_zero3, self.model.parameters())):
            raise UserError(
                "forget: got a batch that is not prepared, while ZeRO-3 has begun to gather weights for the forward pass; "
                "call pmc.prepare([forget]) before"
            )
        begin_forward(self, self.pmc.lm.backbone)
        return self.pmc.loss(forget, retain)


def initialise(
    pmc: PMC,
    forget_questions: Sequence[str],
    progress: Callable[[int], object] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """As ``pmc.initialise(forget_questions)`` on every rank; each rank answers a part of the questions.

    The batches are those of one process, dealt out in turn. All ranks of the group call it.

    Args:
        pmc: with the same model on every rank.
        forget_questions: the same on every rank.
        progress: called with the number of questions answered after each of this rank's batches.
        group: the process group; None is the default one.

    Raises:
        UserError: on every rank: `pmc` is none, there is no question, one that is no text, the questions differ between ranks, an answer
            has no room after its prompt, or the model is tensor-parallel.
    """
    check_pmc(pmc)
    if is_tensor_parallel(pmc.lm.model):
        raise UserError(
            "pmc: got a tensor-parallel model, of which all ranks answer the same questions together; expected "
            "pmc.initialise(forget_questions) on every rank"
        )
    size, rank, ranks = pmc.config.batch_size, dist.get_rank(group), dist.get_world_size(group)
    every = _made_on_all_ranks(lambda: texts("forget_questions", forget_questions, pmc.prompts.is_text), group)
    questions = every[rank]
    for other, theirs in enumerate(every):
        if theirs != questions:
            raise UserError(
                f"forget_questions: rank {rank} got others than rank {other}, expected the same on every rank"
            )
    order = sorted(range(len(questions)), key=lambda question: len(pmc.prompts.prompt_ids(questions[question])))
    mine = [question for begin in range(rank * size, len(order), ranks * size) for question in order[begin:][:size]]

    def answered() -> dict[int, str]:
        return dict(zip(mine, pmc.greedy_answers([questions[question] for question in mine], progress), strict=True))

    found = {question: answer for part in _made_on_all_ranks(answered, group) for question, answer in part.items()}
    pmc.initialise(questions, answers=[found[question] for question in range(len(questions))])


def _made_on_all_ranks(make: Callable[[], Any], group: dist.ProcessGroup | None) -> list:
    """Each rank's value; where one cannot be made, a UserError on every rank, since the others wait for it."""
    try:
        value, failure = make(), None
    except ValueError as error:
        value, failure = None, error
    every = from_all_ranks((value, failure and str(failure)), group)
    for other, (_, message) in enumerate(every):
        if message is not None:
            raise UserError(message if other == dist.get_rank(group) else f"rank {other}: {message}") from failure
    return [theirs for theirs, _ in every]


def from_all_ranks(value: Any, group: dist.ProcessGroup | None = None) -> list:
    """Each rank's value, a picklable object, in the order of ranks."""
    values: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def merge_ledgers(pmc: PMC, group: dist.ProcessGroup | None = None) -> None:
    """Give every rank what all ranks found since the last merge: each question's best answer, and all visits.

    All ranks of the group call it. Of equally good answers, those of ranks that visited the question since the last merge
    come first, then the lower rank's. If no question was visited by two ranks, the result is the ledger of one process.

    Args:
        pmc: initialised with the same questions on every rank.
        group: the process group; None is the default one.

    Raises:
        UserError: `pmc` is none, a ledger that is empty on some rank, or ledgers that did not start from the same one.
    """
    check_pmc(pmc)
    ledgers = from_all_ranks(pmc.ledger, group)
    if any(ledger is None for ledger in ledgers):
        raise UserError(
            "pmc: the ledger is empty on some rank; call initialise(forget_questions) or load it on every rank"
        )
    pmc.ledger = _merged(ledgers)


def _merged(ledgers: list[Ledger]) -> Ledger:
    first = ledgers[0]
    for rank, ledger in enumerate(ledgers):
        for name in ("questions", "initial_answers", "merged_visits"):
            if getattr(ledger, name) != getattr(first, name):
                raise UserError(
                    f"pmc: the ledger's {name} on rank {rank} differ from rank 0's; start every rank from the same questions "
                    "and the same state, saved after merge_ledgers"
                )
    merged = Ledger(first.questions, first.initial_answers)
    for question, before in enumerate(first.merged_visits):
        added = [ledger.visits[question] - before for ledger in ledgers]
        merged.visits[question] = merged.merged_visits[question] = before + sum(added)
        held = [
            (ledger.entries[question].score, not added[rank], rank)
            for rank, ledger in enumerate(ledgers)
            if question in ledger.entries
        ]
        if held:
            merged.entries[question] = ledgers[min(held)[2]].entries[question]
    return merged
