"""What a transformers Trainer does for PMC: sampling ahead, the loss, logs, the ledger in checkpoints."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, get_last_checkpoint

from pmc_fast.data import QA
from pmc_fast.errors import UserError
from pmc_fast.pmc import PMC
from pmc_fast.training import merge_stats

LEDGER = "pmc.json"  # in each checkpoint


class PMCMethods:
    """Methods for a class that inherits from it and then from Trainer.

    That class sets these before it calls Trainer's ``__init__``, to which it gives an ``Initialise`` as a callback.

    Attributes:
        pmc: the ``PMC``.
        forget_questions: what it is initialised with when training begins.
    """

    pmc: PMC
    forget_questions: list
    _since_log: tuple[dict[str, Any], ...] = ()  # the statistics of micro-batches

    def micro_batch(self, batch: Mapping[str, Any], number: int) -> tuple[list[int], list[QA]]:
        """The forget questions' indices and the retain rows of the batch of that number in its optimizer step."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As Trainer's; a ledger comes from the checkpoint, from an earlier call, or from the model as it is now."""
        if resume_from_checkpoint:
            last = resume_from_checkpoint is True
            folder = get_last_checkpoint(self.args.output_dir) if last else resume_from_checkpoint
            if folder is not None:  # else Trainer says what is wrong
                self._load_ledger(Path(folder) / LEDGER)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimizer step, their samples prepared in one call."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for number, batch in enumerate(batches):
            batch["pmc"] = self.micro_batch(batch, number)
        self.pmc.prepare([batch["pmc"][0] for batch in batches])
        return batches, count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if "pmc" not in inputs:  # an evaluation's
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.accelerator.autocast():
            loss = self.pmc.loss(*inputs["pmc"])
        self._since_log += (self.pmc.stats,)
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._since_log:
            logs.update(merge_stats(list(self._since_log)))
            seconds = sum((Counter(stats["seconds"]) for stats in self._since_log), Counter())
            logs.update({f"{name}_seconds": seconds[name] for name in ("sample", "score")})
            self._since_log = ()
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
                f"resume_from_checkpoint: {path} cannot be read ({error}); expected a checkpoint of a run of PMC, "
                "without save_only_model"
            ) from None
        if state["ledger"]["questions"] != self.forget_questions:
            raise UserError(
                f"resume_from_checkpoint: {path} holds other forget questions than forget_dataset; resume with the dataset "
                "that the run was started with"
            )
        self.pmc.load_state_dict(state)


class Initialise(TrainerCallback):
    """Notes the model's answers when training begins, unless a ledger came from elsewhere."""

    def __init__(self, pmc: PMC, forget_questions: list) -> None:
        self._pmc, self._questions = pmc, forget_questions

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self._pmc.ledger is None:
            self._pmc.initialise(self._questions)


def check_arguments(args: TrainingArguments) -> None:
    """Refuse what would publish the ledger or have no effect.

    Raises:
        UserError: as said.
    """
    if args.world_size > 1 or args.n_gpu > 1 or args.deepspeed or args.fsdp:
        raise UserError(
            f"args: got {args.world_size} processes and {args.n_gpu} GPUs in this one, expected one process with at most "
            "one GPU (CUDA_VISIBLE_DEVICES=0), without FSDP and DeepSpeed; several processes need a loop of your own, see "
            "docs/distributed.md"
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
