"""PMC as a transformers Trainer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, get_last_checkpoint

from pmc_fast.config import PMCConfig
from pmc_fast.data import QA
from pmc_fast.errors import UserError
from pmc_fast.integrations import columns
from pmc_fast.pmc import PMC
from pmc_fast.rewards import Reward
from pmc_fast.training import merge_stats

LEDGER = "pmc.json"  # in each checkpoint


class PMCTrainer(Trainer):
    """A transformers Trainer that makes the model forget, by PMC.

    Equivalent to a Trainer whose loss is ``pmc.loss(questions, as many random retain rows)``. Its train set are the
    forget questions: ``per_device_train_batch_size`` of them make a micro-batch, an optimizer step samples for all of
    its micro-batches in one call, and their gradients are averaged as any Trainer's are. When training begins, the model's
    answers are noted that samples are scored against; they are kept in the checkpoints' ``pmc.json`` and in no other
    file. The retain rows of a step depend on (``args.seed``, step) alone.

    Logged beside the loss: collapse_loss, retain_loss, score (means), sampled_tokens, trained_tokens, pruned_samples,
    pruned_tokens, empty_picks, truncated_picks (sums since the last log; see ``PMC.loss``), sample_seconds,
    score_seconds. An evaluation's loss is the mean negative log-likelihood of its rows' answer tokens.

    Args:
        model: a transformers causal language model, with PEFT adapters on its layers or without.
        args: as for any Trainer. Sampling runs outside of autocast: load a model in bfloat16 to sample in it.
        forget_dataset: rows with "question"; "answer" is not read.
        retain_dataset: rows with "question" and "answer".
        processing_class: the tokenizer.
        pmc_config: hyperparameters of PMC; those of the training loop are `args`'s business.
        reward: see ``PMC``.
        eval_dataset: rows with "question" and "answer", or a dict of such datasets.
        callbacks, optimizers, optimizer_cls_and_kwargs: as for any Trainer.

    Attributes:
        pmc: the ``PMC``.

    Raises:
        UserError: a dataset without those columns, a model without a head this library knows, several processes or GPUs,
            or an argument that would publish the ledger or have no effect.

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
        eval_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
    ) -> None:
        if args is not None:
            _check(args)
        self._questions = columns.questions("forget_dataset", forget_dataset)
        self._retain = columns.rows("retain_dataset", retain_dataset)
        self._stats: list[dict[str, Any]] = []  # of the micro-batches since the last log
        self.pmc = PMC(model, processing_class, pmc_config, reward)
        super().__init__(
            model=model,
            args=args,
            data_collator=_collate,
            train_dataset=range(len(self._questions)),
            eval_dataset=_evaluated(eval_dataset),
            processing_class=processing_class,
            callbacks=[*(callbacks or []), _Initialise(self)],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As Trainer's; a ledger comes from the checkpoint, from an earlier call, or from the model as it is now."""
        if resume_from_checkpoint:
            folder = (
                get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
            )
            if folder is not None:  # else Trainer says what is wrong
                self._load_ledger(Path(folder) / LEDGER)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimizer step, with their retain rows drawn and their samples prepared."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for number, batch in enumerate(batches):
            draw = np.random.default_rng((self.args.seed, self.state.global_step, number))
            size = len(batch["forget"])
            chosen = draw.choice(len(self._retain), size, replace=len(self._retain) < size)
            batch["retain"] = [self._retain[row] for row in chosen]
        self.pmc.prepare([batch["forget"] for batch in batches])
        return batches, count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        with self.accelerator.autocast():
            loss = self.pmc.loss(inputs["forget"], inputs["retain"])
        self._stats.append(self.pmc.stats)
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad(), self.accelerator.autocast():
            return self.pmc.supervised_loss(inputs["rows"]), None, None

    def get_eval_dataloader(self, eval_dataset: Any = None):
        """As Trainer's, of rows with "question" and "answer"."""
        named = eval_dataset is None or isinstance(eval_dataset, str)
        return super().get_eval_dataloader(eval_dataset if named else _evaluated(eval_dataset))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._stats:
            logs.update(merge_stats(self._stats))
            seconds = sum((Counter(stats["seconds"]) for stats in self._stats), Counter())
            logs.update({f"{name}_seconds": seconds[name] for name in ("sample", "score")})
            self._stats = []
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save and not self.args.save_only_model:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / LEDGER).write_text(json.dumps(self.pmc.state_dict()), encoding="utf-8")
        super()._save_checkpoint(model, trial)

    def _load_ledger(self, path: Path) -> None:
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"resume_from_checkpoint: {path} cannot be read ({error}); expected a checkpoint that a PMCTrainer saved, "
                "without save_only_model"
            ) from None
        if state["ledger"]["questions"] != self._questions:
            raise UserError(
                f"resume_from_checkpoint: {path} holds other forget questions than forget_dataset; resume with the dataset "
                "that the run was started with"
            )
        self.pmc.load_state_dict(state)


class _Initialise(TrainerCallback):
    """Notes the model's answers when training begins, unless a ledger came from elsewhere."""

    def __init__(self, trainer: PMCTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self._trainer.pmc.ledger is None:
            self._trainer.pmc.initialise(self._trainer._questions)


def _collate(items: Sequence[int | QA]) -> dict[str, list]:
    return {"rows" if isinstance(items[0], QA) else "forget": list(items)}


def _evaluated(dataset: Any) -> Any:
    if dataset is None:
        return None
    if isinstance(dataset, Mapping):
        return {name: columns.rows(f"eval_dataset[{name!r}]", one) for name, one in dataset.items()}
    return columns.rows("eval_dataset", dataset)


def _check(args: TrainingArguments) -> None:
    if args.world_size > 1 or args.n_gpu > 1 or args.deepspeed or args.fsdp:
        raise UserError(
            f"args: got {args.world_size} processes and {args.n_gpu} GPUs in this one, expected one process with at most "
            "one GPU (CUDA_VISIBLE_DEVICES=0), without FSDP and DeepSpeed"
        )
    if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise UserError(
            f"args.hub_strategy: got {args.hub_strategy.value!r}, which would publish checkpoints and in them {LEDGER}, the "
            "model's answers before it forgot; expected 'end' or 'every_save'"
        )
    if args.label_smoothing_factor:
        raise UserError(
            f"args.label_smoothing_factor: got {args.label_smoothing_factor}, expected 0: PMC has no use for it"
        )
