"""What a transformers Trainer does for PMC: sampling ahead, the loss, logs, the ledger in checkpoints, several processes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, get_last_checkpoint
from transformers.training_args import ParallelMode

from pmc_fast import parallel
from pmc_fast.data import QA
from pmc_fast.errors import UserError
from pmc_fast.parallel.data import from_all_ranks
from pmc_fast.pmc import PMC
from pmc_fast.sharding import refuse_shared_out
from pmc_fast.training import merge_stats

LEDGER = "pmc.json"  # in each checkpoint

# The arguments that share a model out over processes, and how accelerate's launcher says the same.
_SHARING = {
    "deepspeed": "ACCELERATE_USE_DEEPSPEED",
    "fsdp": "ACCELERATE_USE_FSDP",
    "parallelism_config": "ACCELERATE_USE_PARALLELISM_CONFIG",
}


class PMCMethods:
    """Methods for a class that inherits from it and then from Trainer.

    That class sets these before it calls Trainer's ``__init__``, to which it gives a ``KeepLedger`` as a callback.

    In several processes a step is that of one process which accumulates all ranks' micro-batches, first each rank's first
    one, then each one's second. What the dataloader repeats so that all ranks have as many full batches is left out: a
    question is met once in an epoch, and a rank may have nothing in the last micro-batch. The gradients are averaged over
    those micro-batches of the step, on any rank, that hold something.

    Attributes:
        pmc: the ``PMC``.
        forget_questions: what it is initialised with when training begins, the same on every rank.
        repeats: whether an epoch may meet a question twice, so on two ranks; ledgers are then merged before every step.
    """

    pmc: PMC
    forget_questions: list
    repeats = False
    _since_log: tuple[dict[str, Any], ...] = ()  # the statistics of micro-batches

    def forget_indices(self, batch: Mapping[str, Any]) -> list[int]:
        """The forget questions of a batch."""
        raise NotImplementedError

    def retain_rows(self, batch: Mapping[str, Any], number: int, count: int) -> list[QA]:
        """The retain rows that come with a batch's first `count` questions; its number is that in its optimizer step."""
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
        if self.repeats and is_distributed(self.args):
            parallel.merge_ledgers(self.pmc)
        rank, ranks = self.args.process_index, self.args.world_size
        forget = [self.forget_indices(batch) for batch in batches]
        if batches:
            mine, busy = self._unrepeated(len(forget[-1]))
            forget[-1] = forget[-1][:mine]
            # Trainer and DDP divide by the number of all micro-batches.
            scale = len(batches) * ranks / ((len(batches) - 1) * ranks + busy)
        for number, (batch, asked) in enumerate(zip(batches, forget, strict=True)):
            batch["pmc"] = asked, self.retain_rows(batch, number * ranks + rank, len(asked)), scale
        self.pmc.prepare([asked for asked in forget if asked])
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
        forget, retain, scale = inputs["pmc"]
        with self.accelerator.autocast():
            loss = scale * (model if is_distributed(self.args) else self.pmc.loss)(forget, retain)
        if forget:
            self._since_log += (self.pmc.stats,)
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            parts = from_all_ranks(self._since_log) if is_distributed(self.args) else [self._since_log]
            if every := [stats for part in parts for stats in part]:
                logs.update(merge_stats(every))
                seconds = sum((Counter(stats["seconds"]) for stats in every), Counter())
                logs.update({f"{name}_seconds": seconds[name] for name in ("sample", "score")})
            self._since_log = ()
        super().log(logs, *args, **kwargs)

    def _finalize_training(self, *args: Any):
        if is_distributed(self.args):  # what was not logged: Trainer would take this rank's for all
            self._tr_loss = self.accelerator.reduce(self._tr_loss, "mean")
        return super()._finalize_training(*args)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """In several processes, DDP around the loss: around the model it would see no forward pass."""
        if not (training and is_distributed(self.args) and model is self.model):
            return super()._wrap_model(model, training, dataloader)
        self.accelerator.prepare_model(model, evaluation_mode=True)  # its own forward is that of evaluations
        return self.accelerator.prepare_model(_Loss(self.pmc))

    def _unrepeated(self, size: int) -> tuple[int, int]:
        """Of this rank's batch of that size: how many rows the dataloader does not repeat; and how many ranks have any.

        In its last round, accelerate fills the ranks' batches with rows that came before.
        """
        rank, ranks, state = self.args.process_index, self.args.world_size, self.accelerator.gradient_state
        if ranks == 1 or not state.end_of_dataloader or self.args.dataloader_drop_last:
            return size, ranks
        left = state.active_dataloader.total_dataset_length % (size * ranks) or size * ranks
        return min(max(left - rank * size, 0), size), -(-left // size)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if is_distributed(self.args):
            parallel.merge_ledgers(self.pmc)
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
        try:
            ledger, _ = self.pmc.read_state(state)
        except UserError as error:
            raise UserError(f"resume_from_checkpoint: {path}: {error}") from None
        if ledger is None or ledger.questions != self.forget_questions:
            raise UserError(
                f"resume_from_checkpoint: {path} holds other forget questions than forget_dataset; resume with the dataset "
                "that the run was started with"
            )
        self.pmc.load_state_dict(state)


class KeepLedger(TrainerCallback):
    """Notes the model's answers when training begins, unless a ledger came from elsewhere; merges ranks' ledgers."""

    def __init__(self, pmc: PMC, forget_questions: list) -> None:
        self._pmc, self._questions = pmc, forget_questions

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not is_distributed(args):
            if self._pmc.ledger is None:
                self._pmc.initialise(self._questions)
            return
        if all(from_all_ranks(self._pmc.ledger is None)):
            parallel.initialise(self._pmc, self._questions)
        parallel.merge_ledgers(self._pmc)  # refuses ledgers that differ

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if is_distributed(args):
            parallel.merge_ledgers(self._pmc)


class _Loss(parallel.LossModule):
    """With a forward also for ranks that have nothing in a micro-batch."""

    def forward(self, forget: Sequence[int], retain: Sequence[QA]) -> Tensor:
        if forget:
            return super().forward(forget, retain)
        # 0, from all parameters: DDP waits for the gradient of each.
        return sum(parameter.flatten()[:0].sum() for parameter in self.parameters() if parameter.requires_grad)


def is_distributed(args: TrainingArguments) -> bool:
    """Whether there is a process group, be it of one process."""
    return args.parallel_mode == ParallelMode.DISTRIBUTED


def check_arguments(args: TrainingArguments, model: nn.Module) -> None:
    """Refuse what would publish the ledger, have no effect, or does not work with PMC.

    Raises:
        UserError: as said.
    """
    from accelerate.utils import parse_flag_from_env

    refuse_shared_out(model)
    if args.n_gpu > 1:
        raise UserError(
            f"args: got {args.n_gpu} GPUs in one process, which Trainer would use through nn.DataParallel, expected one; "
            f"start a process for each (torchrun --nproc-per-node={args.n_gpu} train.py), or show one only "
            "(CUDA_VISIBLE_DEVICES=0)"
        )
    for name, variable in _SHARING.items():
        if getattr(args, name) or parse_flag_from_env(variable):
            given = f"{getattr(args, name)!r}" if getattr(args, name) else f"{os.environ[variable]} through {variable}"
            raise UserError(
                f"args.{name}: got {given}, expected none: the Trainer holds the whole model in every process; for one "
                "that is shared out over processes write the loop yourself, see docs/distributed.md"
            )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > args.world_size:
        raise UserError(
            f"args.use_cpu: got {args.use_cpu} in one of {launched} processes that have no GPU, each of which Trainer would "
            "take for the only one; expected True"
        )
    if args.world_size > 1:
        if not args.accelerator_config.even_batches or args.accelerator_config.dispatch_batches:
            raise UserError(
                "args.accelerator_config: got even_batches=False or dispatch_batches=True, expected neither: ranks must take "
                "as many steps, each with batches of its own"
            )
        if args.torch_compile:
            raise UserError(
                "args.torch_compile: got True, expected False with several processes: it would compile sampling"
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
