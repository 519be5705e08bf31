"""Models sharded by DeepSpeed ZeRO-3 over two and three gloo processes, against one process with whole weights."""

import os

import pytest
import torch
from collectives import CountingGathers, on_ranks
from tiny import make_model, make_tokenizer

from pmc_fast import PMC, PMCConfig, UserError, parallel
from pmc_fast.data import QA
from pmc_fast.packing import pad_left

os.environ["DS_ACCELERATOR"] = "cpu"  # before it is imported, here and on each rank
deepspeed = pytest.importorskip("deepspeed")

QUESTIONS = [
    f"Who is {name}?" for name in ("Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus")
]  # 7: neither 2 nor 3 divide it
RETAIN = [QA("What is two?", "a number"), QA("Who sings?", "the bird in the old tree")]


@pytest.mark.parametrize(("ranks", "family"), [(2, "llama"), (3, "gemma2")])  # gemma2: the head is the embedding
def test_ranks_agree_with_one_process(ranks, family, rng_seed, tmp_path):
    on_ranks(ranks, [_training], rng_seed, tmp_path / "store", family)


def _make_pmc(family, seed):
    # min_words: no score is 0, so every visit to a question samples.
    config = PMCConfig(num_samples=3, max_new_tokens=9, max_length=None, retain_weight=0.5, seed=3, min_words=9)
    return PMC(make_model(family, seed), make_tokenizer(), config)


def _shard(pmc, ranks):
    config = {
        "train_batch_size": ranks,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # by default 1
    }
    parameters = pmc.lm.model.parameters()
    return deepspeed.initialize(model=parallel.LossModule(pmc), model_parameters=parameters, config=config)[0]


def _is_sharded(pmc):
    return not any(parameter.numel() for parameter in pmc.lm.model.parameters())


def _training(rank, ranks, seed, family):
    os.environ["LOCAL_SIZE"] = str(ranks)  # DeepSpeed's name for LOCAL_WORLD_SIZE
    single, mine = _make_pmc(family, seed), _make_pmc(family, seed)
    engine = _shard(mine, ranks)
    for pmc in (single, mine):
        pmc.initialise(QUESTIONS)
        assert pmc is single or _is_sharded(pmc)
    assert mine.ledger.initial_answers == single.ledger.initial_answers
    with pytest.raises(UserError, match="model: got weights in parts"):
        mine.loss([0], RETAIN)
    with pytest.raises(UserError, match=r"call pmc.prepare\(\[forget\]\) before"):
        engine.module.forward([0], RETAIN)

    start = {name: value.clone() for name, value in single.lm.model.state_dict().items()}
    optimizer = torch.optim.SGD(single.lm.model.parameters(), lr=0.05)
    uneven = [part.tolist() for part in torch.arange(len(QUESTIONS)).tensor_split(ranks)]
    idle = [[6, 0, 3], [], [5]][:ranks]  # the second rank has nothing to sample
    for batches in (uneven, idle, uneven):
        for batch in batches:
            (single.loss(batch, RETAIN) / ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
        mine.prepare([batches[rank]])
        assert _is_sharded(mine)
        engine.backward(engine(batches[rank], RETAIN))
        engine.step()
        assert _is_sharded(mine)
        parallel.merge_ledgers(mine)
        assert mine.ledger.state_dict() == single.ledger.state_dict()
    moved = 0.0
    with parallel.gathered(engine.module):
        for name, value in single.lm.model.state_dict().items():
            torch.testing.assert_close(mine.lm.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
            moved += float((value - start[name]).abs().sum())
    assert moved > 0.1
    inputs = pad_left([mine.prompts.prompt_ids(question) for question in QUESTIONS], mine.prompts.pad_id)
    gathers = []
    for tokens in (1, 12):
        options = {"num_samples": 3, "max_new_tokens": tokens, "eos_token_id": [300], "seed": seed}
        with CountingGathers() as count:
            samples = mine.sampler.sample(*inputs, **options)
        assert torch.equal(samples.tokens, single.sampler.sample(*inputs, **options).tokens)
        gathers.append(count.gathers)
    assert gathers[0] == gathers[1] > 0
