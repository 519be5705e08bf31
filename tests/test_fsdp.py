"""Models sharded by FSDP2 over two and three gloo processes, against one process with whole weights."""

import copy

import numpy as np
import pytest
import torch
from collectives import CountingGathers, on_ranks
from tiny import checkpoint_activations, make_model, make_tokenizer
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pmc_fast import PMC, PMCConfig, Sampler, UserError, parallel
from pmc_fast.data import QA
from pmc_fast.models import LanguageModel
from pmc_fast.packing import pad_left
from pmc_fast.sharding import gathered

QUESTIONS = [
    f"Who is {name}?" for name in ("Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus")
]  # 7: neither 2 nor 3 divide it
RETAIN = [QA("What is two?", "a number"), QA("Who sings?", "the bird in the old tree")]
LAYERS = 2
MODULES = LAYERS + 1  # that fully_shard is applied to: the layers, and the root with all other weights


@pytest.mark.parametrize(("ranks", "family"), [(2, "llama"), (3, "gemma2")])  # gemma2: the head is the embedding
def test_ranks_agree_with_one_process(ranks, family, rng_seed, tmp_path):
    checks = [_training, _training_without_whole_model, _sampling, _low_precision, _blocks, _refusals]
    on_ranks(ranks, checks, rng_seed, tmp_path / "store", family)


def _make_pmc(family, seed, shard=None, whole_model=True):
    """A PMC and its LossModule; `shard` is applied to each layer, to the whole model unless told not to, and to the latter."""
    model = make_model(family, seed)
    if shard is not None:
        for module in [*model.model.layers, model] if whole_model else model.model.layers:
            shard(module)
    config = PMCConfig(num_samples=3, max_new_tokens=9, max_length=None, retain_weight=0.5, seed=3)
    pmc = PMC(model, make_tokenizer(), config, reward=_Letters())
    loss_module = parallel.LossModule(pmc)
    return pmc, loss_module if shard is None else shard(loss_module)


class _Letters:
    """A reward that never is final, so that every visit to a question samples: the share of letters, and 1."""

    def score(self, references, candidates):
        return np.array([1 + sum(c.isalpha() for c in text) / (1 + len(text)) for text in candidates])


def _is_sharded(module):
    return all(isinstance(parameter, DTensor) for parameter in module.parameters())


def _training(rank, ranks, seed, family, whole_model=True):
    """Over a split forget set it ends as one process that accumulates the same micro-batches."""
    (single, _), (mine, loss_module) = _make_pmc(family, seed), _make_pmc(family, seed, fully_shard, whole_model)
    for pmc in () if whole_model else (single, mine):
        pmc.lm.model.train()
        checkpoint_activations(pmc.lm.model)
    single.initialise(QUESTIONS)
    with CountingGathers() as count:
        mine.initialise(QUESTIONS)
    assert count.gathers == MODULES and _is_sharded(loss_module)
    assert mine.ledger.initial_answers == single.ledger.initial_answers
    start = copy.deepcopy(single.lm.model.state_dict())
    optimizers = [torch.optim.SGD(pmc.lm.model.parameters(), lr=0.05) for pmc in (single, mine)]
    uneven = [list(part) for part in torch.arange(len(QUESTIONS)).tensor_split(ranks)]
    idle = [[6, 0, 3], [], [5]][:ranks]  # the second rank has nothing to sample
    for batches in (uneven, idle):
        batches = [list(map(int, batch)) for batch in batches]
        for batch in batches:
            (single.loss(batch, RETAIN) / ranks).backward()
        with CountingGathers() as count:
            loss_module(batches[rank], RETAIN).backward()
        # The root once, and each layer for the samples, the forward pass and the backward pass.
        assert count.gathers == 1 + 3 * LAYERS and _is_sharded(loss_module)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        parallel.merge_ledgers(mine)
        assert mine.ledger.visits == single.ledger.visits
        assert {q: (e.text, e.tokens) for q, e in mine.ledger.entries.items()} == {
            q: (e.text, e.tokens) for q, e in single.ledger.entries.items()
        }
    assert max(single.ledger.visits) == 2
    sharded, moved = dict(mine.lm.model.named_parameters()), 0.0
    for name, value in single.lm.model.named_parameters():
        torch.testing.assert_close(sharded[name].full_tensor(), value.detach(), rtol=1e-4, atol=1e-5)
        moved += float((value.detach() - start[name]).abs().sum())
    assert moved > 0.1


def _training_without_whole_model(*args):
    """The same with the embedding, the last norm and the head left to the LossModule, and activations computed again."""
    _training(*args, whole_model=False)


def _prompts(pmc, count):
    return pad_left([pmc.prompts.prompt_ids(question) for question in QUESTIONS[:count]], pmc.prompts.pad_id)


def _sampling(rank, ranks, seed, family):
    """The tokens of whole weights, from one gather however long the answers, and as many prompts as each rank likes."""
    (single, _), (mine, loss_module) = _make_pmc(family, seed), _make_pmc(family, seed, fully_shard)
    for tokens in (1, 3, 12):
        options = {"num_samples": 3, "max_new_tokens": tokens, "eos_token_id": [300], "seed": seed, "top_p": 0.95}
        inputs = _prompts(mine, rank + 1)
        with CountingGathers() as count:
            got = mine.sampler.sample(*inputs, **options)
        want = single.sampler.sample(*inputs, **options)
        assert got.tokens.shape[2] == tokens
        assert torch.equal(got.tokens, want.tokens)
        torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-4, atol=1e-4)
        assert count.gathers == MODULES and _is_sharded(loss_module)
    single.initialise(QUESTIONS)
    parallel.initialise(mine, QUESTIONS)
    assert mine.ledger.state_dict() == single.ledger.state_dict() and _is_sharded(loss_module)
    for pmc in (single, mine):
        with CountingGathers() as count:
            pmc.prepare([[rank], [3 + rank]] if rank else [[], []])
    assert count.gathers == MODULES and _is_sharded(loss_module)
    assert mine.ledger.state_dict() == single.ledger.state_dict()
    with CountingGathers() as count:
        loss_module([rank] if rank else [], RETAIN).backward()
    assert count.gathers == 1 + 2 * LAYERS  # nothing is left to sample


def _low_precision(rank, ranks, seed, family):
    """Under a policy of bfloat16 samples and loss are those of a model with bfloat16 weights."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    mine, loss_module = _make_pmc(family, seed, lambda module: fully_shard(module, mp_policy=policy))
    single, _ = _make_pmc(family, seed)
    for parameter in single.lm.model.parameters():
        parameter.data = parameter.data.bfloat16()  # but no buffer: the policy leaves them alone
    options = {"num_samples": 2, "max_new_tokens": 5, "eos_token_id": [300], "seed": seed}
    inputs = _prompts(mine, 3)
    assert torch.equal(mine.sampler.sample(*inputs, **options).tokens, single.sampler.sample(*inputs, **options).tokens)
    for pmc in (single, mine):
        pmc.initialise(QUESTIONS)
    loss = loss_module([0, 1], RETAIN)
    torch.testing.assert_close(loss, single.loss([0, 1], RETAIN), rtol=1e-3, atol=0)
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in mine.lm.model.parameters())


def _blocks(rank, ranks, seed, family):
    """Weights are whole within and shared out behind a block, whatever happens in it; other people's hooks stay on."""
    mine, loss_module = _make_pmc(family, seed, fully_shard, whole_model=False)
    layer, calls = mine.lm.model.model.layers[0], []
    layer.register_forward_hook(lambda *_: calls.append(1))
    whole = make_model(family, seed).state_dict()
    with pytest.raises(KeyError), gathered(loss_module):
        with gathered(mine.lm.model):
            pass
        for name, parameter in mine.lm.model.named_parameters():
            assert torch.equal(parameter, whole[name]), name
        with CountingGathers() as count:
            mine.lm.hidden(torch.tensor([[1, 2, 3]]))
        assert calls == [1] and not count.gathers
        raise KeyError
    assert _is_sharded(loss_module)
    mine.initialise(QUESTIONS)
    loss_module.set_reshard_after_forward(True)  # the root's too
    with CountingGathers() as count:
        loss_module([rank], RETAIN).backward()
    assert count.gathers == 2 + 3 * LAYERS and _is_sharded(loss_module)


def _refusals(rank, ranks, seed, family):
    parts = r"model: got weights in parts, .*fully_shard\(parallel.LossModule\(pmc\)\)"
    for whole_model in (True, False):
        mine, loss_module = _make_pmc(family, seed, fully_shard, whole_model)
        mine.initialise(QUESTIONS)
        for use in (
            lambda pmc: pmc.loss([0], RETAIN),
            lambda pmc: pmc.supervised_loss(RETAIN),
            lambda pmc: pmc.lm.head,
        ):
            with pytest.raises(UserError, match=parts):
                use(mine)
        assert not any(mine.ledger.visits)
        loss_module([0], RETAIN).backward()
    with pytest.raises(UserError, match=parts):
        LanguageModel(mine.lm.model)  # which does not know of the LossModule that holds the head
    assert _is_sharded(loss_module)
    with gathered(loss_module):
        assert len(Sampler(mine.lm.model).sample(*_prompts(mine, 2), max_new_tokens=2, eos_token_id=[300]).tokens) == 2
    with pytest.raises(
        UserError, match="LossModule: holds modules that fully_shard was applied to; expected it applied to"
    ):
        parallel.LossModule(mine)([0], RETAIN)
    model = make_model(family, seed)
    fully_shard(model.get_output_embeddings())
    with pytest.raises(UserError, match="nor is fully_shard of the head by itself"):
        LanguageModel(model)


def test_a_model_that_is_not_sharded_is_left_alone():
    module = nn.Linear(2, 2)
    hooks = module._forward_hooks
    with gathered(module):
        assert module._forward_hooks is hooks
