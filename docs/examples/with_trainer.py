"""PMC as a transformers Trainer: python with_trainer.py MODEL FORGET.jsonl RETAIN.jsonl OUT

In two processes: torchrun --nproc-per-node=2 with_trainer.py MODEL FORGET.jsonl RETAIN.jsonl OUT
"""

import gc
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from pmc_fast import PMCConfig
from pmc_fast.data import read_jsonl
from pmc_fast.integrations.transformers import PMCTrainer

source, forget_file, retain_file, out = sys.argv[1:]
trainer = PMCTrainer(
    AutoModelForCausalLM.from_pretrained(source),
    TrainingArguments(
        out,
        num_train_epochs=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,  # losses, score (0 is best) and counts after each step
        use_cpu=not torch.cuda.is_available(),  # without GPUs, Trainer finds other processes only if told so
    ),
    forget_dataset=read_jsonl(forget_file),  # or any dataset with a column "question"
    retain_dataset=read_jsonl(retain_file),  # "question" and "answer"
    processing_class=AutoTokenizer.from_pretrained(source),
    pmc_config=PMCConfig(num_samples=8, max_new_tokens=32, max_length=None),
)
trainer.train()
trainer.save_model()
if torch.distributed.is_initialized():  # ends its threads, once nothing refers to it: distributed.md
    del trainer
    gc.collect()
    torch.distributed.destroy_process_group()
