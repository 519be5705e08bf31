"""PMC on a model sharded by FSDP2: torchrun --nproc-per-node 2 fsdp.py MODEL FORGET.jsonl RETAIN.jsonl OUT"""

import os
import random
import sys

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmc_fast import PMC, PMCConfig, parallel
from pmc_fast.data import read_jsonl

source, forget_file, retain_file, out = sys.argv[1:]
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
if torch.cuda.is_available():
    torch.cuda.set_device(rank % torch.cuda.device_count())
model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
questions, retain = [row.question for row in read_jsonl(forget_file)], read_jsonl(retain_file)

for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
pmc = PMC(model, tokenizer, PMCConfig(num_samples=8, max_new_tokens=32, max_length=None))
loss_module = fully_shard(parallel.LossModule(pmc))
pmc.initialise(questions)  # all ranks together, as whatever samples
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
model.train()
common, own = random.Random(0), random.Random(rank)  # the order of questions must be the same on every rank
for epoch in range(3):
    order = common.sample(range(len(questions)), len(questions))
    for begin in range(
        0, len(order), 2 * ranks
    ):  # as many steps on every rank; the last may leave some without questions
        batch = order[begin : begin + 2 * ranks][rank::ranks]
        loss = loss_module(batch, own.choices(retain, k=2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    parallel.merge_ledgers(pmc)
    if rank == 0:
        print(f"epoch {epoch}: loss {loss.item():.3f}, score {pmc.stats['score']:.3f}")

state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    model.save_pretrained(out, state_dict=state)
    tokenizer.save_pretrained(out)
dist.destroy_process_group()
if not torch.cuda.is_available():  # gloo's threads may outlive that, and abort while Python ends: distributed.md
    sys.stdout.flush()
    os._exit(0)
