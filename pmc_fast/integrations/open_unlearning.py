"""PMC as a trainer of open-unlearning, and its batches' negative log-likelihoods without logits held."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.modeling_outputs import BaseModelOutput

from pmc_fast.config import PMCConfig
from pmc_fast.data import QA
from pmc_fast.errors import UserError
from pmc_fast.integrations.trainer_methods import KeepLedger, PMCMethods, check_arguments
from pmc_fast.models import LanguageModel
from pmc_fast.pmc import PMC as Objective
from pmc_fast.prompts import Prompts, check_tokenizer
from pmc_fast.rewards import Reward

IGNORE_INDEX = -100

# configs/trainer/PMC.yaml, the published settings for Llama-3.2-3B-Instruct.
CONFIG = """\
defaults:
  - finetune

handler: PMC

args:
  num_train_epochs: 30
  per_device_train_batch_size: 8
  gradient_accumulation_steps: 2
  learning_rate: 1e-5
  weight_decay: 0.01
  warmup_epochs: 1.0

method_args:
  retain_weight: 1.25
  num_samples: 20
  temperature: 0.9
  top_k: 50
  top_p: 0.95
  max_length: 200
"""

# The fields of PMCConfig that are not this trainer's business: the training loop's, and how text becomes tokens.
_OTHERS = {
    *("epochs", "batch_size", "accumulation", "learning_rate", "weight_decay", "warmup_epochs"),
    *("reencode", "prompt_style", "system_prompt"),
}
_METHOD = set(PMCConfig.__dataclass_fields__) - _OTHERS

_checked: WeakSet[nn.Module] = WeakSet()


def fused_batch_nll(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, BaseModelOutput]:
    """open-unlearning's ``compute_batch_nll``: the negative log-likelihood of each sequence's labels.

    Equivalent to ``cross_entropy(logits[:, :-1].mT, labels[:, 1:], ignore_index=-100, reduction="none").sum(-1)`` with
    ``logits = model(**inputs).logits``, which are not held: the head sees the label positions only. Under accelerate's
    mixed precision the model runs as it would there.

    Args:
        model: a causal language model, prepared by accelerate or not; not wrapped for several processes.
        inputs: what its collator makes: input_ids, attention_mask and labels, int64 or bool [B, T]; -100 is no label.

    Returns:
        float32 [B], nats; and the outputs, whose last_hidden_state is [B, T, D] and which hold no logits.

    Raises:
        UserError: the model has no head this library knows, or there are no labels.

    Source: open-unlearning, src/trainer/utils.py; with it NPO (arXiv 2404.05868), SimNPO (2410.07163), DPO (2305.18290).
    """
    if inputs.get("labels") is None:
        raise UserError(f'inputs: got {", ".join(inputs) or "nothing"}, expected "input_ids" and "labels" among them')
    options = {name: value for name, value in inputs.items() if name != "labels"}
    with _mixed_precision(model, inputs["labels"].device):
        lm = LanguageModel(model, check=model not in _checked)
        _checked.add(model)
        hidden = lm.hidden(**options)
        labels = inputs["labels"][:, 1:]
        scored = labels != IGNORE_INDEX
        logprob = lm.head.logprob(hidden[:, :-1][scored], labels[scored], ignore_index=None)
    nll = logprob.new_zeros(len(labels)).index_add(0, scored.nonzero()[:, 0], -logprob)
    return nll, BaseModelOutput(last_hidden_state=hidden)


def pmc_trainer(base: type[Trainer]) -> type[Trainer]:
    """The trainer class ``PMC``, for open-unlearning's registry; evaluates as its base does.

        _register_trainer(pmc_trainer(FinetuneTrainer))

    The prompts are those of its forget set, token by token; the answers there are not trained on. What it picks is trained
    on as the tokens that were sampled. Logs, checkpoints and the use of several processes are those of ``PMCTrainer``; there,
    the rows that its dataset draws at random differ between processes, and are drawn from (``args.seed``, step, process) one
    batch ahead: a run resumed within an epoch draws others.

    Its arguments: those that ``load_trainer`` gives, and as method_args the fields of ``PMCConfig`` that concern sampling,
    selection and loss, and ``reward``.

    Args:
        base: its ``FinetuneTrainer``.

    Raises:
        UserError (the class, when it is made): train_dataset is no forget/retain set of prompts and answers, the model has no
            head this library knows, or arguments that ``PMCTrainer`` refuses.

    Source: arXiv 2507.04219, equation 1 and algorithm 1.
    """

    class PMC(PMCMethods, base):
        def __init__(
            self,
            model: nn.Module,
            train_dataset: Any,
            *args: Any,
            tokenizer: Any = None,
            processing_class: Any = None,
            reward: Reward | None = None,
            callbacks: list | None = None,
            **options: Any,
        ) -> None:
            if options.get("args") is not None:
                check_arguments(options["args"], model)
            tokenizer = processing_class if tokenizer is None else tokenizer
            method = {name: options.pop(name) for name in _METHOD & options.keys()}
            self.forget_questions = _prompts_of(train_dataset)
            anchored = getattr(train_dataset, "anchor", "forget") == "forget"
            self.repeats = not anchored or len(train_dataset) != len(self.forget_questions)
            self._index = {tuple(prompt): index for index, prompt in enumerate(self.forget_questions)}
            config = PMCConfig(**method, reencode=False)
            self.pmc = Objective(model, _TokenPrompts(tokenizer, model), config, reward)
            super().__init__(
                *args,
                model=model,
                train_dataset=train_dataset,
                processing_class=tokenizer,
                callbacks=[*(callbacks or []), KeepLedger(self.pmc, self.forget_questions)],
                **options,
            )

        def get_batch_samples(self, *args: Any):
            several = self.args.world_size > 1
            with torch.random.fork_rng(devices=[], enabled=several):
                if several:  # the dataset draws rows from the generator, which Trainer seeds alike on all ranks
                    seed = (self.args.seed, self.state.global_step, self.args.process_index)
                    torch.default_generator.manual_seed(int(np.random.default_rng(seed).integers(2**63)))
                return super().get_batch_samples(*args)

        def forget_indices(self, batch: Mapping[str, Any]) -> list[int]:
            return [self._index[prompt] for prompt, _ in _rows(_original(batch["forget"]))]

        def retain_rows(self, batch: Mapping[str, Any], number: int, count: int) -> list[QA]:
            return [QA(*row) for row in _rows(batch["retain"])[:count]] if "retain" in batch else []

    return PMC


class _TokenPrompts(Prompts):
    """Questions and answers that are token ids already, instead of texts."""

    def __init__(self, tokenizer: Any, model: nn.Module) -> None:
        check_tokenizer(tokenizer)
        self.tokenizer, self.style = tokenizer, "tokens"
        more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = [tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])]
        self.end_ids = tuple(dict.fromkeys(end for end in ends if end is not None))
        if not self.end_ids:
            raise UserError("tokenizer: it has no end token, so answers could never end; set its eos_token")
        self.pad_id = self.end_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def prompt_ids(self, question: Any, prefill: str = "") -> list[int]:
        return list(question)

    def answer_ids(self, answer: Any) -> list[int]:
        return list(answer)

    @staticmethod
    def is_text(value: object) -> bool:
        return isinstance(value, list | tuple) and bool(value)


def _prompts_of(dataset: Any) -> list[list[int]]:
    """The distinct prompts of a forget set, in its order."""
    forget = getattr(dataset, "forget", None)
    if forget is None:
        raise UserError(
            f"train_dataset: got {type(dataset).__name__} without a forget set, expected open-unlearning's "
            "ForgetRetainDataset (mode=unlearn)"
        )
    prompts = {}
    for number in range(len(forget)):
        row = _original(forget[number])
        if "input_ids" not in row or "labels" not in row:
            raise UserError(
                f'train_dataset.forget: row {number} has {", ".join(map(str, row))}, expected "input_ids" and "labels", '
                "one answer to each question"
            )
        prompt, _ = _row(row["input_ids"], row["labels"], f"train_dataset.forget: row {number}")
        prompts[prompt] = None
    return [list(prompt) for prompt in prompts]


def _original(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the alternative answers of sets made for DPO."""
    return row.get("original", row)


def _rows(batch: Mapping[str, Tensor]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and answer of each row of a padded batch."""
    rows = []
    for ids, mask, labels in zip(
        *(batch[name].cpu() for name in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        # A padding token that is also an end token is masked inside of a row too.
        held = (mask.bool() | (labels != IGNORE_INDEX)).nonzero()[:, 0]
        span = slice(int(held[0]), int(held[-1]) + 1)
        rows.append(_row(ids[span], labels[span], "batch"))
    return rows


def _row(ids: Tensor, labels: Tensor, where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    start = int((labels == IGNORE_INDEX).sum())
    prompt, answer = tuple(ids[:start].tolist()), tuple(labels[start:].tolist())
    if not prompt or not answer or IGNORE_INDEX in answer:
        raise UserError(
            f"{where}: got {len(labels) - start} labels in {len(labels)} tokens, expected a prompt without labels and then "
            "an answer with labels: PMC needs questions and answers (QADataset), not running text"
        )
    return prompt, answer


def _mixed_precision(model: nn.Module, device: torch.device) -> AbstractContextManager:
    """The autocast that accelerate puts around the forward pass of a model that it has prepared."""
    if not hasattr(model, "_original_forward"):
        return nullcontext()
    from accelerate.state import AcceleratorState

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(AcceleratorState().mixed_precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
