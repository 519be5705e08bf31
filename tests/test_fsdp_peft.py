"""LoRA adapters on a model sharded by FSDP2 over two gloo processes, against one process with whole weights."""

import copy

import pytest
import torch
import torch.distributed as dist
from collectives import CountingGathers, on_ranks
from draws import differ
from tiny import checkpoint_activations, make_model, make_tokenizer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pmc_fast import PMC, PMCConfig, parallel
from pmc_fast.data import QA
from pmc_fast.fast_linear import has_fast_bfloat16, rounds_inputs
from pmc_fast.packing import pad_left

peft = pytest.importorskip("peft")

QUESTIONS = [f"Who is {name}?" for name in ("Ada", "Bo", "Cy", "Di", "Ed")]  # 5: 2 does not divide it
RETAIN = [QA("What is two?", "a number"), QA("Who sings?", "the bird in the old tree")]


def test_two_ranks_agree_with_one_process(rng_seed, tmp_path):
    checks = [_training, _low_precision, _saving]
    on_ranks(2, checks, rng_seed, tmp_path / "store", str(tmp_path / "adapters"))


def _adapted(seed, family="llama"):
    """A model with LoRA on every linear layer but the head, its adapters random instead of no-ops; 2 does not divide r."""
    options = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(seed)
    model = peft.get_peft_model(make_model(family, seed), peft.LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def _shard(model, way, **options):
    """By layers, and with what is not in them in the hands of PEFT's model, of the model inside of it, or of the LossModule."""
    base = model.get_base_model()
    whole = {"outer": [model], "inner": [base], "neither": []}[way]
    for module in [*base.model.layers, *whole]:
        fully_shard(module, **options)


def _make_pmc(model):
    # min_words: no score is 0, so every visit to a question samples.
    return PMC(
        model, make_tokenizer(), PMCConfig(num_samples=3, max_new_tokens=9, max_length=None, seed=3, min_words=9)
    )


def _sample(pmc, seed):
    inputs = pad_left([pmc.prompts.prompt_ids(question) for question in QUESTIONS], pmc.prompts.pad_id)
    return pmc.sampler.sample(
        *inputs, num_samples=4, max_new_tokens=12, eos_token_id=list(range(0, 259, 11)), seed=seed
    )


def _is_sharded(module):
    return all(isinstance(parameter, DTensor) for parameter in module.parameters())


def _training(rank, ranks, seed, out):
    """Adapters end as in one process that accumulates the same micro-batches; nothing else moves; samples know of them."""
    for family, way, checkpoints in (("llama", "outer", False), ("phi", "inner", True), ("qwen3", "neither", False)):
        single, mine = _make_pmc(_adapted(seed, family)), _adapted(seed, family)
        _shard(mine, way)
        mine = _make_pmc(mine)
        loss_module = fully_shard(parallel.LossModule(mine))
        for pmc in (single, mine):
            pmc.lm.model.train()
            if checkpoints:
                checkpoint_activations(pmc.lm.model)
        start = copy.deepcopy(dict(single.lm.model.named_parameters()))
        optimizers = [
            torch.optim.SGD([p for p in pmc.lm.model.parameters() if p.requires_grad], lr=0.05)
            for pmc in (single, mine)
        ]
        for pmc in (single, mine):
            pmc.initialise(QUESTIONS)
        for batches in ([[0, 1, 2], [3, 4]], [[3], []]):
            for batch in batches:
                (single.loss(batch, RETAIN) / ranks).backward()
            with CountingGathers() as count:
                loss_module(batches[rank], RETAIN).backward()
            assert _is_sharded(loss_module)
            # What is around the layers once, and each layer for the samples, the forward pass and the backward pass.
            assert count.gathers == 1 + 3 * 2, way
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            parallel.merge_ledgers(mine)
            assert mine.ledger.state_dict() == single.ledger.state_dict()
        moved = set()
        with parallel.gathered(loss_module):
            for name, value in mine.lm.model.named_parameters():
                torch.testing.assert_close(value, single.lm.model.get_parameter(name), rtol=1e-4, atol=1e-5)
                if not torch.equal(value, start[name]):
                    moved.add(name)
        got, want = _sample(mine, seed), _sample(single, seed)
        assert torch.equal(got.tokens, want.tokens) and mine.sampler.decoder == single.sampler.decoder == "native"
        with mine.lm.model.disable_adapter(), single.lm.model.disable_adapter():
            without = _sample(mine, seed)
            assert torch.equal(without.tokens, _sample(single, seed).tokens)
        assert differ(without, got)


def _low_precision(rank, ranks, seed, out):
    """Under a policy of bfloat16 samples and loss are those of a model of bfloat16; adapters and gradients stay float32."""
    mine, single = _adapted(seed), _make_pmc(_adapted(seed))
    options = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    _shard(mine, "outer", **options)
    mine = _make_pmc(mine)
    loss_module = fully_shard(parallel.LossModule(mine), **options)
    for parameter in single.lm.model.parameters():
        parameter.data = parameter.data.bfloat16()
    assert torch.equal(_sample(mine, seed).tokens, _sample(single, seed).tokens)
    assert mine.sampler.decoder == ("modules" if has_fast_bfloat16() and not rounds_inputs() else "native")
    for pmc in (single, mine):
        pmc.initialise(QUESTIONS)
    loss = loss_module([0, 1], RETAIN)
    torch.testing.assert_close(loss, single.loss([0, 1], RETAIN), rtol=1e-3, atol=0)
    loss.backward()
    trained = {
        name for name, p in mine.lm.model.named_parameters() if p.grad is not None and p.grad.dtype == torch.float32
    }
    assert trained == {name for name, _ in mine.lm.model.named_parameters() if "lora_" in name}


def _saving(rank, ranks, seed, out):
    """The adapters alone, gathered, are what PEFT saves of a model that is whole."""
    model = _adapted(seed)
    _shard(model, "outer")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    if rank == 0:
        assert all("lora_" in name for name in state)
        model.save_pretrained(out, state_dict=state)
    dist.barrier()
    loaded = peft.PeftModel.from_pretrained(make_model(seed=seed), out)
    for name, value in _adapted(seed).named_parameters():
        assert torch.equal(loaded.get_parameter(name), value), name
