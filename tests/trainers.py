"""Small runs of PMCTrainer, and of open-unlearning's PMC with stand-ins for its data."""

import inspect

import numpy as np
import torch
from tiny import make_model, make_tokenizer
from transformers import Trainer, TrainingArguments

from pmc_fast import PMCConfig
from pmc_fast.integrations.transformers import PMCTrainer

FORGET = [{"question": f"Who is {name}?"} for name in ("Ada", "Bo", "Cy", "Di", "Ed")]
RETAIN = [{"question": f"What is {c}?", "answer": f"the letter {c}", "topic": 3} for c in "uvwxyz"]
# Of activations; the second name, until 5.23, goes with transformers 6.
CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n))
CONFIG = PMCConfig(num_samples=3, max_new_tokens=6, max_length=None, seed=5)


class Length:
    """A reward that is never final, so that every visit samples again."""

    def score(self, references, candidates):
        return np.array([1.0 + len(candidate) for candidate in candidates])


def arguments(folder, **changes):
    """2 epochs of 2 optimizer steps: micro-batches of 2, 2 and then 1 questions, accumulated by two."""
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return TrainingArguments(str(folder), **options)


def make_trainer(folder, model=None, seed=0, **changes):
    names = inspect.signature(PMCTrainer).parameters
    options = {name: changes.pop(name) for name in list(changes) if name in names}
    if "args" not in options:
        options["args"] = arguments(folder, **changes)
    return PMCTrainer(
        make_model(seed=seed) if model is None else model,
        **{
            "forget_dataset": FORGET,
            "retain_dataset": RETAIN,
            "processing_class": make_tokenizer(),
            "pmc_config": CONFIG,
            "reward": Length(),
            **options,
        },
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


PAD, END = 256, 257


def make_row(prompt=None, answer=None):
    prompt = torch.randint(0, 256, (int(torch.randint(1, 6, ())),)) if prompt is None else torch.tensor(prompt)
    answer = torch.randint(0, 256, (int(torch.randint(1, 6, ())),)) if answer is None else torch.tensor(answer)
    ids = torch.cat([prompt, answer, torch.tensor([END])])
    labels = torch.where(torch.arange(len(ids)) < len(prompt), -100, ids)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "index": 0}


def collate(rows, side="right", pad=PAD):
    """Nested like the rows; padded, and masked wherever the padding token stands, even within a row."""
    if "input_ids" not in rows[0]:
        return {name: collate([row[name] for row in rows], side, pad) for name in rows[0]}
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name, value):
        fill = [torch.full((width - len(row[name]),), value) for row in rows]
        pairs = [(row[name], f) if side == "right" else (f, row[name]) for row, f in zip(rows, fill, strict=True)]
        return torch.stack([torch.cat(pair) for pair in pairs])

    ids = padded("input_ids", pad)
    return {"input_ids": ids, "attention_mask": ids.ne(pad), "labels": padded("labels", -100)}


class ForgetRetain:
    """Items like those of its ForgetRetainDataset."""

    def __init__(self, forget, retain):
        self.forget, self.retain = forget, retain

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, index):
        kept = {} if self.retain is None else {"retain": self.retain[index % len(self.retain)]}
        return {"forget": self.forget[index], **kept}


class FinetuneTrainer(Trainer):
    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        return {"own": self.evaluators}


def load_trainer(folder, registry, dataset, model=None, name="tokenizer", pad=PAD, training=None, **method):
    """As its load_trainer makes one from a configuration."""
    args = arguments(
        folder, **{"save_strategy": "steps", "save_steps": 1, "remove_unused_columns": False, **(training or {})}
    )
    return registry["PMC"](
        model=make_model() if model is None else model,
        train_dataset=dataset,
        eval_dataset=None,
        data_collator=lambda rows: collate(rows, pad=pad),
        args=args,
        evaluators="theirs",
        template_args={},
        **{name: make_tokenizer()},
        **{"num_samples": 3, "max_new_tokens": 5, "max_length": None, **method},
    )


def make_dataset(wrap=lambda row: row, count=5):
    forget = [wrap(make_row([10 + i, 11], [12, 13, i])) for i in range(count)]
    return ForgetRetain(forget, [make_row() for _ in range(3)])
