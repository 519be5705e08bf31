"""PMC in a plain torch loop: python plain_torch.py MODEL FORGET.jsonl RETAIN.jsonl OUT"""

import random
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmc_fast import PMC, PMCConfig
from pmc_fast.data import read_jsonl

source, forget_file, retain_file, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source).to("cuda" if torch.cuda.is_available() else "cpu")
tokenizer = AutoTokenizer.from_pretrained(source)
questions, retain = [row.question for row in read_jsonl(forget_file)], read_jsonl(retain_file)

pmc = PMC(model, tokenizer, PMCConfig(num_samples=8, max_new_tokens=32, max_length=None))
pmc.initialise(questions)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
model.train()
for epoch in range(3):
    order = random.sample(range(len(questions)), len(questions))
    batches = [order[i : i + 2] for i in range(0, len(order), 2)]
    for step in (batches[i : i + 2] for i in range(0, len(batches), 2)):
        pmc.prepare(step)  # optional: samples for both micro-batches in one call
        for batch in step:
            loss = pmc.loss(batch, random.choices(retain, k=len(batch)))
            (loss / len(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"epoch {epoch}: loss {loss.item():.3f}, score {pmc.stats['score']:.3f}")

model.save_pretrained(out)
tokenizer.save_pretrained(out)
