"""Tensor-parallel models over two and three gloo processes, against one process with the whole model."""

import copy

import pytest
import torch
import torch.distributed as dist
from collectives import on_ranks
from tiny import make_model, make_tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.distributed import DistributedConfig

from pmc_fast import PMC, PMCConfig, Sampler, UserError, losses, parallel
from pmc_fast.backend import BackendUnavailable
from pmc_fast.data import QA
from pmc_fast.evaluation import evaluate
from pmc_fast.integrations.transformers import PMCTrainer
from pmc_fast.models import LanguageModel
from pmc_fast.packing import pack, pad_left
from pmc_fast.sharding import smallest

QUESTIONS = [f"Who is {name}?" for name in ("Ada", "Bo", "Cy")]
RETAIN = [QA("What is two?", "a number"), QA("Who sings?", "the bird in the old tree")]
SHARES = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6}  # that 2 and 3 ranks can share


def weight_alone(model, mesh, folder):
    """Nothing but the head's weight is a DTensor."""
    head = model.lm_head
    head.weight = torch.nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
    return model


def head(model, mesh, folder):
    """What torch makes of a head, its bias included."""
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel()})
    return model


def layers(model, mesh, folder):
    """What torch makes of embedding, layers and head."""
    plan = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        plan[f"model.layers.*.{part}"] = ColwiseParallel()
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{part}"] = RowwiseParallel()
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, plan)
    return model


def loaded(model, mesh, folder):
    """What transformers makes of a model by its own plan."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=mesh.size()))


# gemma2: the head is the embedding, capped logits; phi: a bias.
KINDS = {
    2: [("phi", head), ("llama", layers), ("gemma2", loaded)],
    3: [("llama", weight_alone), ("llama", loaded)],
}


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_agree_with_one_process(ranks, rng_seed, tmp_path):
    on_ranks(ranks, [_checks], rng_seed, tmp_path / "store", tmp_path)


def _checks(rank, ranks, seed, folder):
    mesh = init_device_mesh("cpu", (ranks,))
    for number, (family, split) in enumerate(KINDS[ranks]):
        whole = make_model(family, seed, **SHARES)
        parts = split(copy.deepcopy(whole), mesh, folder / str(number))
        assert isinstance(parts.lm_head.weight, DTensor)
        for check in (_samples, _losses, _evaluation, _training):
            torch.manual_seed(seed)
            check(whole, parts)
    for check in (_refusals, _budget):
        torch.manual_seed(seed)
        check(rank, ranks, mesh, seed)
    _not_for_trainers(mesh, seed, folder)


def _not_for_trainers(mesh, seed, folder):
    """In which each rank holds the whole model, and has questions of its own."""
    model = weight_alone(make_model(seed=seed), mesh, folder)
    with pytest.raises(UserError, match="pmc: got a tensor-parallel model"):
        parallel.initialise(PMC(model, make_tokenizer()), QUESTIONS)
    datasets = {"forget_dataset": [{"question": q} for q in QUESTIONS], "retain_dataset": [vars(r) for r in RETAIN]}
    with pytest.raises(UserError, match="model: got weights that processes share out"):
        PMCTrainer(model, TrainingArguments(folder, use_cpu=True), processing_class=make_tokenizer(), **datasets)


def _samples(whole, parts):
    """The same tokens, whatever the truncation, in one wave or one for each prompt; decoded by what is right for the layers."""
    prompts = [torch.randint(0, 256, (size,)).tolist() for size in (3, 7, 5)]
    tokens, mask = pad_left(prompts, 256)
    single, ours = Sampler(whole), Sampler(parts)
    for options in ({"temperature": 0.7}, {"top_k": 9, "top_p": 0.8}, {"min_p": 0.1}):  # greedy: see _evaluation
        options |= {"num_samples": 3, "max_new_tokens": 6, "eos_token_id": [257, 65], "seed": 5}
        want = single.sample(tokens, mask, **options)
        for budget in (None, ours.cache_bytes(3, 13)) if "top_k" in options else (None,):
            got = ours.sample(tokens, mask, cache_budget=budget, **options)
            for name in ("tokens", "lengths", "finished"):
                assert torch.equal(getattr(got, name), getattr(want, name)), (name, options)
            torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-3, atol=1e-4)
    in_parts = any(isinstance(p, DTensor) for p in parts.model.parameters())
    assert ours.decoder == ("modules" if in_parts else single.decoder)
    with pytest.raises(BackendUnavailable, match=r"linear_sample\(impl='native'\): .*shared out among ranks"):
        ours.sample(tokens, mask, impl="native", **options)


def _losses(whole, parts):
    batch = pack([[1, 2, 3], [4, 5], [6]], [[7, 8], [9, 10, 11], [12]])
    reference = torch.tensor([-3.0])
    values = []
    for model in (whole, parts):
        lm = LanguageModel(model)
        value = losses.npo(lm, batch, 1, reference)
        value.backward()
        values.append((value.detach(), losses.sequence_logprob(lm, batch)))
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    _compare_gradients(whole, parts)


def _evaluation(whole, parts):
    sets = {"forget": [QA(q, "a poet of the north") for q in QUESTIONS], "retain": RETAIN}
    prompts = PMC(whole, make_tokenizer()).prompts
    one, other = (evaluate(model, prompts, **sets, max_new_tokens=5) for model in (whole, parts))
    assert one == other


def _training(whole, parts):
    """Two steps of PMC: losses, answers, gradients and weights."""
    # min_words: no score is 0, so every visit to a question samples.
    config = PMCConfig(num_samples=3, max_new_tokens=5, max_length=None, retain_weight=0.5, seed=3, min_words=9)
    start = copy.deepcopy(whole.state_dict())
    pmcs = [PMC(model, make_tokenizer(), config) for model in (whole, parts)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2) for model in (whole, parts)]
    for pmc in pmcs:
        pmc.initialise(QUESTIONS)
    for batch in ([0, 1], [2, 0]):
        one, other = (pmc.loss(batch, RETAIN) for pmc in pmcs)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert pmcs[0].state_dict() == pmcs[1].state_dict()
        one.backward(), other.backward()
        _compare_gradients(whole, parts, clear=False)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    moved = 0.0
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(_whole(parts.state_dict()[name]), value, rtol=1e-3, atol=1e-3, msg=name)
        moved += float((value - start[name]).abs().sum())
    assert moved > 0.1


def _compare_gradients(whole, parts, clear=True):
    """They are equal, and placed as the parameters are (torch replicates that of an embedding which is not the head)."""
    mine = dict(parts.named_parameters())
    for name, parameter in whole.named_parameters():
        got, want = mine[name].grad, parameter.grad
        if isinstance(mine[name], DTensor):
            assert got.placements == mine[name].placements or name == "model.embed_tokens.weight", name
        torch.testing.assert_close(_whole(got), want, rtol=1e-3, atol=1e-5 * float(want.abs().max() + 1), msg=name)
    if clear:
        whole.zero_grad(), parts.zero_grad()


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _budget(rank, ranks, mesh, seed):
    """Ranks with unequal memory take their waves together."""
    model = make_model(seed=seed)
    assert smallest(model, 5 + rank) == 5 + rank
    assert smallest(weight_alone(model, mesh, None), 5 + rank) == 5


def _refusals(rank, ranks, mesh, seed):
    def with_head(placement, mesh=mesh):
        model = make_model(seed=seed)
        weight = DTensor.from_local(model.lm_head.weight.detach(), mesh, placement, run_check=False)
        model.lm_head.weight = torch.nn.Parameter(weight)
        return model

    for placement in (Shard(1), Partial(), Replicate()):
        with pytest.raises(UserError, match=r"model: the weight of its head: got a DTensor placed .*expected \(Shard"):
            LanguageModel(with_head([placement]))
    square = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("data", "tp"))
    with pytest.raises(UserError, match=r"on a mesh of 2 dimensions, expected .*mesh\['tp'\]"):
        LanguageModel(with_head([Replicate(), Shard(0)], square))
    LanguageModel(weight_alone(make_model(seed=seed), square["tp"], None))

    phi = weight_alone(make_model("phi", seed), mesh, None)
    with pytest.raises(ValueError, match="model: the bias of its head: got 259 rows, expected"):
        LanguageModel(phi)
    tied = make_model("gemma2", seed)
    tied.model.embed_tokens.weight = weight_alone(tied, mesh, None).lm_head.weight
    with pytest.raises(UserError, match="model: got layers that cannot run.*expected parallelize_module on them"):
        LanguageModel(tied)
    for got, in_parts in (
        (r"shape \[\d+, \d+, \d+\] for \[\d+, \d+\] tokens", lambda hidden: hidden[:, :1]),
        ("a DTensor", lambda hidden: DTensor.from_local(hidden, mesh, [Replicate()])),
    ):
        model = weight_alone(make_model(seed=seed), mesh, None)
        model.model.norm.register_forward_hook(lambda module, inputs, hidden, in_parts=in_parts: in_parts(hidden))
        with pytest.raises(
            UserError, match=rf"model: got last hidden states in parts \({got}\), expected plain tensors"
        ):
            LanguageModel(model)
    scaled = weight_alone(make_model(seed=seed), mesh, None)
    scaled.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits * (1 + module.weight.device_mesh.get_rank())
    )
    with pytest.raises(UserError, match="computes its logits in a way this version does not know"):
        LanguageModel(scaled)  # on every rank, though rank 0's are right

    late = PMC(make_model(seed=seed), make_tokenizer())
    late.initialise(QUESTIONS)
    weight_alone(late.lm.model, mesh, None)
    with pytest.raises(UserError, match="a tensor-parallel model must be one before PMC"):
        late.loss([0], RETAIN)
    assert parallel.LossModule(PMC(weight_alone(make_model(seed=seed), mesh, None), make_tokenizer())).pmc.lm.shards
