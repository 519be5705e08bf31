"""PMC with accelerate, on one device: python with_accelerate.py MODEL FORGET.jsonl RETAIN.jsonl OUT"""

import random
import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmc_fast import PMC, PMCConfig
from pmc_fast.data import read_jsonl

source, forget_file, retain_file, out = sys.argv[1:]
accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision="bf16")
model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
questions, retain = [row.question for row in read_jsonl(forget_file)], read_jsonl(retain_file)

pmc = PMC(model, tokenizer, PMCConfig(num_samples=8, max_new_tokens=32, max_length=None))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
loader = DataLoader(range(len(questions)), batch_size=2, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
pmc.initialise(questions)
model.train()
for epoch in range(3):
    for batch in loader:
        with accelerator.accumulate(model):
            with accelerator.autocast():  # for the loss; sampling leaves it
                loss = pmc.loss(batch, random.choices(retain, k=len(batch)))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}, score {pmc.stats['score']:.3f}")

accelerator.unwrap_model(model).save_pretrained(out)
tokenizer.save_pretrained(out)
