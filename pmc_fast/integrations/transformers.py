"""PMC as a transformers Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from pmc_fast.config import PMCConfig
from pmc_fast.data import QA
from pmc_fast.errors import UserError, described
from pmc_fast.integrations import columns
from pmc_fast.integrations.trainer_methods import KeepLedger, PMCMethods, check_arguments
from pmc_fast.pmc import PMC
from pmc_fast.rewards import Reward
from pmc_fast.sampler import SampleSource


class PMCTrainer(PMCMethods, Trainer):
    """A transformers Trainer that makes the model forget, by PMC.

    Equivalent to a Trainer whose loss is ``pmc.loss(questions, as many random retain rows)``. Its train set are the
    forget questions: ``per_device_train_batch_size`` of them make a micro-batch, an optimizer step samples for all of
    its micro-batches in one call, and their gradients are averaged as any Trainer's are. When training begins, the model's
    answers are noted that samples are scored against; they are kept in the checkpoints' ``pmc.json`` and in no other
    file.

    Under torchrun the questions are split over the processes (DDP: each holds the whole model). A step
    then is that of one process with as many times ``gradient_accumulation_steps``, but for floating point and dropout. No
    question is repeated to fill the last batches of an epoch. The retain rows of a micro-batch depend on (``args.seed``,
    step, its number in the step) alone; of n processes the r-th has the numbers r, r + n, r + 2n and so on.

    Logged beside the loss: collapse_loss, retain_loss, score (means), sampled_tokens, decoded_tokens, trained_tokens,
    pruned_samples, pruned_tokens, empty_picks, truncated_picks (sums since the last log; see ``PMC.loss``), sample_seconds,
    score_seconds (sums), each over all processes' micro-batches. An evaluation's loss is the mean negative log-likelihood of
    its rows' answer tokens.

    Args:
        model: a transformers causal language model, with PEFT adapters on its layers or without.
        args: as for any Trainer. Sampling runs outside of autocast: load a model in bfloat16 to sample in it.
        forget_dataset: rows with "question"; "answer" is not read.
        retain_dataset: rows with "question" and "answer".
        processing_class: the tokenizer.
        pmc_config: hyperparameters of PMC; those of the training loop are `args`'s business.
        reward, sampler: see ``PMC``.
        eval_dataset: rows with "question" and "answer", or a dict of such datasets.
        callbacks, optimizers, optimizer_cls_and_kwargs: as for any Trainer.

    Attributes:
        pmc: the ``PMC``.

    Raises:
        UserError: a dataset without those columns, a model without a head this library knows, several GPUs in one process,
            DeepSpeed, FSDP, or another argument that would publish the ledger, have no effect or does not work with PMC.

    Source: arXiv 2507.04219, equation 1 and algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        forget_dataset: Any,
        retain_dataset: Any,
        processing_class: Any,
        pmc_config: PMCConfig | None = None,
        reward: Reward | None = None,
        sampler: SampleSource | None = None,
        eval_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
    ) -> None:
        args = TrainingArguments("tmp_trainer") if args is None else args  # Trainer's default
        if not isinstance(args, TrainingArguments):
            raise UserError(f"args: got {described(args)}, expected TrainingArguments or None")
        check_arguments(args, model)
        self.forget_questions = columns.questions("forget_dataset", forget_dataset)
        self._retain = columns.rows("retain_dataset", retain_dataset)
        self.pmc = PMC(model, processing_class, pmc_config, reward, sampler)
        super().__init__(
            model=model,
            args=args,
            data_collator=_collate,
            train_dataset=range(len(self.forget_questions)),
            eval_dataset=_evaluated(eval_dataset),
            processing_class=processing_class,
            callbacks=[*(callbacks or []), KeepLedger(self.pmc, self.forget_questions)],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )

    def forget_indices(self, batch: Mapping[str, Any]) -> list[int]:
        return batch["forget"]

    def retain_rows(self, batch: Mapping[str, Any], number: int, count: int) -> list[QA]:
        draw = np.random.default_rng((self.args.seed, self.state.global_step, number))
        chosen = draw.choice(len(self._retain), count, replace=len(self._retain) < count)
        return [self._retain[row] for row in chosen]

    def prediction_step(
        self, model: nn.Module, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        rows = inputs["rows"]
        mine, _ = self._unrepeated(len(rows))
        with torch.no_grad(), self.accelerator.autocast():
            # Trainer drops the losses of ranks that only have repeated rows.
            return self.pmc.supervised_loss(rows[:mine] or rows), None, None

    def get_eval_dataloader(self, eval_dataset: Any = None):
        """As Trainer's, of rows with "question" and "answer"."""
        named = eval_dataset is None or isinstance(eval_dataset, str)
        return super().get_eval_dataloader(eval_dataset if named else _evaluated(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any):
        """As Trainer's, of rows with "question" and "answer"."""
        return super().get_test_dataloader(columns.rows("test_dataset", test_dataset))


def _collate(items: Sequence[int | QA]) -> dict[str, list]:
    return {"rows" if isinstance(items[0], QA) else "forget": list(items)}


def _evaluated(dataset: Any) -> Any:
    if dataset is None:
        return None
    if isinstance(dataset, Mapping):
        return {name: columns.rows(f"eval_dataset[{name!r}]", one) for name, one in dataset.items()}
    return columns.rows("eval_dataset", dataset)
