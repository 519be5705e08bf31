"""Two and three gloo processes against one: sharded heads, ledgers, gradients."""

import copy
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from collectives import on_ranks
from tiny import make_model, make_tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import pmc_fast
from pmc_fast import PMC, PMCConfig, UserError, backend, parallel
from pmc_fast.data import QA
from pmc_fast.ledger import Entry
from pmc_fast.parallel import VocabShards

chunks, sampling = (import_module(f"pmc_fast.parallel_head.{op}") for op in ("linear_logprob", "linear_sample"))
VOCAB, WIDTH, ROWS = 85, 19, 9  # odd: no rank's share begins at a multiple of 4
IGNORED = -100
QUESTIONS = [f"Who is {name}?" for name in ("Ada", "Bo", "Cy", "Di", "Ed", "Flo")]
RETAIN = [QA("What is two?", "a number"), QA("Who sings?", "the bird in the old tree")]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_agree_with_one_process(ranks, rng_seed, tmp_path):
    on_ranks(ranks, [_checks], rng_seed, tmp_path / "store")


def _checks(rank, ranks, seed):
    for check in (
        _losses,
        _samples,
        _ties_and_bad_rows,
        _dtensors,
        _groups_side_by_side,
        _bad_shards,
        _merging,
        _data_parallel,
        _accelerated,
    ):
        check(rank, ranks)


def _share(rank, ranks, tensor):
    return tensor.tensor_split(ranks)[rank].clone()


def _head(dtype=torch.float64):
    hidden, weight, bias = torch.randn(ROWS, WIDTH), torch.randn(VOCAB, WIDTH), torch.randn(VOCAB)
    target = torch.randint(0, VOCAB, (ROWS,))
    target[::4] = IGNORED
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), target


def _losses(rank, ranks):
    """Values and gradients, in float64 against the reference and in float32."""
    for dtype, options, chunk in (
        (torch.float64, {"softcap": 3.0, "temperature": 0.7}, 2 * VOCAB),
        (torch.float32, {"logit_scale": 0.5}, chunks.CHUNK),
        (torch.float64, {"ignore_index": None}, 1),
        (torch.bfloat16, {}, chunks.CHUNK),
    ):
        hidden, weight, bias, target = _head(dtype)
        if "ignore_index" in options:
            target, bias = target.abs() % VOCAB, bias + 1000  # whose exponential is no number
        wide = torch.promote_types(dtype, torch.float32)
        upstream = torch.randn(ROWS, dtype=wide)
        whole = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        part = [t.requires_grad_() for t in (hidden.clone(), *(_share(rank, ranks, t) for t in (weight, bias)))]
        shards = VocabShards.of(part[1], vocab=VOCAB)
        # Of bfloat16, gradients are rounded once: to neighbours at most, where sums in another order differ.
        close = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-4, 1e-5), torch.bfloat16: (2**-7, 1e-5)}[dtype]
        close = dict(zip(("rtol", "atol"), close, strict=True))
        chunks.CHUNK, default = chunk, chunks.CHUNK

        _compare(
            parallel.linear_logprob(part[0], part[1], target, shards=shards, bias=part[2], **options),
            pmc_fast.linear_logprob(whole[0], whole[1], target, bias=whole[2], impl="reference", **options),
            *(upstream, part, whole, close),
        )
        options.pop("temperature", None)
        token_weight = torch.rand(ROWS, dtype=wide)
        got = parallel.collapse_loss(part[0], part[1], target, token_weight, shards=shards, bias=part[2], **options)
        want = pmc_fast.collapse_loss(
            whole[0], whole[1], target, token_weight, bias=whole[2], impl="reference", **options
        )
        torch.testing.assert_close(got.token_nll, want.token_nll, **close)
        assert not got.token_nll.requires_grad
        _compare(got.loss, want.loss, upstream[0], part, whole, close)
        chunks.CHUNK = default

    nothing, shard = torch.randn(0, WIDTH, requires_grad=True), torch.randn(3, WIDTH, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.int64)
    loss = parallel.linear_logprob(nothing, shard, empty, shards=VocabShards.of(shard)).sum()
    assert [g.abs().sum() for g in torch.autograd.grad(loss, [nothing, shard])] == [0, 0]
    assert not len(parallel.linear_sample(nothing.detach(), shard, shards=VocabShards.of(shard), top_k=2).token)


def _compare(got, want, upstream, part, whole, close):
    """Values, and the gradients of hidden, weight and bias that they lead to."""
    torch.testing.assert_close(got.detach(), want.detach(), **close)
    mine = torch.autograd.grad(got, part, upstream)
    hidden, *sharded = torch.autograd.grad(want, whole, upstream)
    wanted = [hidden, *(_share(dist.get_rank(), dist.get_world_size(), t) for t in sharded)]
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other, **close)


def _samples(rank, ranks):
    """The tokens of the whole head, whatever the truncation."""
    hidden, weight, bias, _ = _head(torch.float32)
    weight[7] = weight[60]  # equal logits on two ranks
    bias[7] = bias[60]
    bias[11] = -torch.inf
    shard, shard_bias = _share(rank, ranks, weight), _share(rank, ranks, bias)
    shards = VocabShards.of(shard)
    sequence, position = torch.randint(0, 2**32, (ROWS,)), torch.randint(0, 2**32, (ROWS,))
    for truncation in (
        {},
        {"temperature": 0.0},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 5, "temperature": 4.0},
        {"top_k": 1000},
        {"top_k": 40, "temperature": 9.0},
        {"top_p": 0.9, "temperature": 4.0},
        {"top_p": 0.3, "temperature": 9.0},
        {"min_p": 0.2, "temperature": 5.0},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.7, "min_p": 0.1, "temperature": 6.0},
    ):
        options = {"seed": 12345, "sequence": sequence, "position": position, "softcap": 20.0} | truncation
        got = parallel.linear_sample(hidden, shard, shards=shards, bias=shard_bias, **options)
        want = pmc_fast.linear_sample(hidden, weight, bias=bias, impl="reference", **options)
        _same_draw(got, want, truncation)
    row = torch.randint(ROWS, (5,))
    options = {"shards": shards, "bias": shard_bias, "temperature": 4.0, "top_k": 9}
    got = parallel.linear_sample(hidden, shard, hidden_row=row, **options)
    assert torch.equal(got.token, parallel.linear_sample(hidden[row], shard, **options).token)
    bias = bias.clone()
    bias[: VOCAB // ranks + 1] = -torch.inf  # all that rank 0 holds
    shard, shard_bias = _share(rank, ranks, weight), _share(rank, ranks, bias)
    for truncation in ({}, {"temperature": 0.0}, {"top_k": 70}, {"top_p": 0.9, "temperature": 4.0}):
        got = parallel.linear_sample(hidden, shard, shards=shards, bias=shard_bias, **truncation)
        with pytest.MonkeyPatch.context() as patch:  # as without the compiled module
            patch.setattr(backend, "choose", lambda *_: "reference")
            plain = parallel.linear_sample(hidden, shard, shards=shards, bias=shard_bias, **truncation)
            patch.setattr(sampling, "_FEW", 0)  # candidates are counted, not exchanged
            counted = parallel.linear_sample(hidden, shard, shards=shards, bias=shard_bias, **truncation)
        assert torch.equal(got.token, plain.token) and torch.equal(got.token, counted.token)
        _same_draw(got, pmc_fast.linear_sample(hidden, weight, bias=bias, impl="reference", **truncation), truncation)


def _same_draw(got, want, options):
    assert torch.equal(got.token, want.token) and (got.kept_mass <= 1).all(), options
    for name in ("logprob", "sampling_logprob", "kept_mass"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-5, msg=name)


def test_keys_are_in_the_order_of_floats(rng_seed):
    values = torch.cat([torch.randn(50), torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, torch.inf, -torch.inf])])
    key = sampling._ordered(values)
    assert torch.equal(key[:, None] < key, values[:, None] < values) and key.min() >= 0 and key.max() < 2**32


def _ties_and_bad_rows(rank, ranks):
    """All logits equal: the edge of the kept set cuts through ties that lie on several ranks. No number: all raise."""
    hidden, weight = torch.zeros(ROWS, WIDTH), torch.randn(VOCAB, WIDTH)
    shard = _share(rank, ranks, weight)
    shards = VocabShards.of(shard)
    for truncation in (
        {"temperature": 0.0},
        {"top_k": 60},
        {"top_p": 0.505},
        {"top_k": 50, "top_p": 0.81},
        {"top_p": 1e-6},
    ):
        want = pmc_fast.linear_sample(hidden, weight, impl="reference", **truncation)
        for few in (sampling._FEW, 0):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sampling, "_FEW", few)
                found = [
                    parallel.linear_sample(hidden.to(dtype), shard.to(dtype), shards=shards, **truncation)
                    for dtype in (torch.float32, torch.float64)
                ]
            for got in found:
                assert torch.equal(got.token, want.token), truncation
                torch.testing.assert_close(got.kept_mass, want.kept_mass)
    large = torch.full((ROWS, WIDTH), 1e30)
    with pytest.raises(
        ValueError, match="linear_sample: the logits of row 0 .* overflow when divided by the temperature"
    ):
        parallel.linear_sample(large, shard, shards=shards, temperature=1e-9, top_k=3)
    if rank == 0:
        shard[3] = torch.nan
    hidden[2] = 1
    with pytest.raises(ValueError, match="linear_sample: the logits of row"):
        parallel.linear_sample(hidden, shard, shards=shards)
    target = torch.zeros(ROWS, dtype=torch.int64)
    target[0] = -100  # rows are numbered as they are given
    with pytest.raises(ValueError, match="linear_logprob: the logits of row 1 "):
        parallel.linear_logprob(hidden, shard, target, shards=shards)
    with pytest.raises(ValueError, match="collapse_loss: the logits of row 1 "):
        parallel.collapse_loss(hidden, shard, target, torch.ones(ROWS), shards=shards)


def _dtensors(rank, ranks):
    mesh = init_device_mesh("cpu", (ranks,))
    hidden, weight, bias, target = _head()
    whole, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    sharded, sharded_b = (distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (weight, bias))
    got = parallel.linear_logprob(hidden, sharded, target, bias=sharded_b)
    want = pmc_fast.linear_logprob(hidden, whole, target, bias=b)
    torch.testing.assert_close(got, want)
    got.sum().backward(), want.sum().backward()
    torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad)
    torch.testing.assert_close(sharded_b.grad.full_tensor(), b.grad)
    token = parallel.linear_sample(hidden.float(), sharded.detach().float()).token
    assert torch.equal(token, pmc_fast.linear_sample(hidden.float(), weight.float(), impl="reference").token)
    with pytest.raises(UserError, match=r"weight: got a DTensor placed .*expected \(Shard\(dim=0\),\)"):
        parallel.linear_sample(hidden, distribute_tensor(weight, mesh, [Shard(1)]))
    with pytest.raises(UserError, match="weight: got .* in shares of 1: the last rank has none"):
        parallel.linear_sample(hidden, distribute_tensor(weight[: ranks - 1], mesh, [Shard(0)]))
    shards = VocabShards.of(_share(rank, ranks, weight), dist.new_group())
    with pytest.raises(ValueError, match="weight: got a DTensor of another process group than the shards'"):
        parallel.linear_sample(hidden, sharded.detach(), shards=shards)


def test_no_group():
    with pytest.raises(UserError, match="group: got None without a default process group"):
        VocabShards.of(torch.zeros(3, 2))


def _groups_side_by_side(rank, ranks):
    """The first rank has a head of its own, which the others share."""
    alone, others = dist.new_group([0]), dist.new_group(range(1, ranks))
    group, number, size = (others, rank - 1, ranks - 1) if rank else (alone, 0, 1)
    hidden, weight, bias, target = _head()
    whole, part = ([hidden.clone().requires_grad_(), w.clone()] for w in (weight, _share(number, size, weight)))
    shards = VocabShards.of(part[1], group)
    got = parallel.linear_logprob(*part, target, shards=shards, bias=_share(number, size, bias))
    want = pmc_fast.linear_logprob(*whole, target, bias=bias, impl="reference")
    torch.testing.assert_close(got, want)
    got.sum().backward(), want.sum().backward()
    torch.testing.assert_close(part[0].grad, whole[0].grad)
    token = parallel.linear_sample(hidden, part[1], shards=shards, top_k=9).token
    assert torch.equal(token, pmc_fast.linear_sample(hidden, weight, top_k=9, impl="reference").token)


def _bad_shards(rank, ranks):
    hidden, weight, _, target = _head()
    shard = _share(rank, ranks, weight)
    with pytest.raises(UserError, match=f"expected at least one row on each, one width and {VOCAB + 1} rows in all"):
        VocabShards.of(shard, vocab=VOCAB + 1)
    with pytest.raises(UserError, match="expected at least one row on each"):
        VocabShards.of(shard if rank else shard[:0])
    with pytest.raises(UserError, match="expected at least one row on each, one width$"):
        VocabShards.of(shard if rank else shard[:, 1:])
    for odd, complaint in (
        (shard.to("meta"), "the devices (cpu, )+meta"),
        (shard.float(), "the dtypes (torch.float64, )+torch.float32"),
        (shard[0], r"the shapes .*expected 2 dimensions"),
    ):
        with pytest.raises(UserError, match=f"weight: got {complaint}"):
            VocabShards.of(odd if rank == ranks - 1 else shard)
    first = dist.new_group([0])
    if rank:
        with pytest.raises(UserError, match=f"group: got one that rank {rank} is not of"):
            VocabShards.of(shard, first)
    else:  # a group of fewer ranks than share the head
        with pytest.raises(UserError, match=f"and {VOCAB} rows in all"):
            VocabShards.of(shard, first, VOCAB)
        with pytest.raises(ValueError, match=f"weight: got {VOCAB} rows, expected {len(shard)}, .* the 1 ranks of"):
            parallel.linear_logprob(hidden, weight, target, shards=VocabShards.of(shard, first))
    for call in (parallel.linear_logprob, parallel.linear_sample):
        options = {"target": target} if call is parallel.linear_logprob else {}
        with pytest.raises(ValueError, match="weight: got device cpu, expected meta, that of hidden"):
            call(hidden.to("meta"), shard, **options, shards=VocabShards.of(shard))
    with pytest.raises(UserError, match="shards: got None with a plain weight"):
        parallel.linear_logprob(hidden, shard, target)
    with pytest.raises(ValueError, match=f"weight: got {VOCAB} rows, expected"):
        parallel.linear_logprob(hidden, weight, target, shards=VocabShards.of(shard))
    shards = VocabShards.of(shard)
    with pytest.raises(ValueError, match="temperature: got 0"):
        parallel.linear_logprob(hidden, shard, target, shards=shards, temperature=0)
    with pytest.raises(ValueError, match="token_weight: got inf at row 3"):
        token_weight = torch.ones(ROWS, dtype=shard.dtype).index_fill_(0, torch.tensor(3), torch.inf)
        parallel.collapse_loss(hidden, shard, target, token_weight, shards=shards)
    with pytest.raises(ValueError, match=f"hidden_row: got {ROWS} at row 1"):
        parallel.linear_sample(hidden, shard, shards=shards, hidden_row=torch.tensor([0, ROWS]))
    with pytest.raises(ValueError, match=f"target: got {VOCAB} at row 0"):
        parallel.linear_logprob(hidden, shard, torch.full_like(target, VOCAB), shards=VocabShards.of(shard))


def _make_pmc():
    # min_words: no score is 0, so every visit to a question samples.
    config = PMCConfig(num_samples=3, max_new_tokens=5, max_length=None, retain_weight=0.5, seed=3, min_words=9)
    return PMC(make_model(), make_tokenizer(), config)


def _merging(rank, ranks):
    pmc = _make_pmc()
    with pytest.raises(UserError, match="the ledger is empty on some rank"):
        parallel.merge_ledgers(pmc)
    pmc.initialise(QUESTIONS)
    ledger = pmc.ledger
    ledger.offer(0, Entry("tie", (rank,), 0.5))
    ledger.offer(1, Entry("best", (rank,), 1.0 - 0.1 * rank))
    ledger.visits[0] += rank
    parallel.merge_ledgers(pmc)
    assert pmc.ledger.entries[0].tokens == (1,)  # rank 0 did not visit the question
    assert pmc.ledger.entries[1].tokens == (ranks - 1,)
    assert pmc.ledger.visits == [ranks * (ranks - 1) // 2, 0, 0, 0, 0, 0]
    parallel.merge_ledgers(pmc)
    assert pmc.ledger.visits[0] == ranks * (ranks - 1) // 2
    pmc.ledger.merged_visits[2] += rank
    with pytest.raises(UserError, match="the ledger's merged_visits on rank 1 differ from rank 0's"):
        parallel.merge_ledgers(pmc)


def _accelerated(rank, ranks):
    """The same DDP as accelerate makes it."""
    if find_spec("accelerate"):
        from accelerate import Accelerator

        _data_parallel(rank, ranks, Accelerator(cpu=True).prepare)


def _data_parallel(rank, ranks, wrap=DistributedDataParallel):
    """DDP over a split forget set ends as one process that accumulates the same micro-batches."""
    single, mine = _make_pmc(), _make_pmc()
    for pmc in (single, mine):
        pmc.initialise(QUESTIONS)
    start = copy.deepcopy(single.lm.model.state_dict())
    ddp = wrap(parallel.LossModule(mine))
    assert isinstance(ddp, DistributedDataParallel)
    optimizers = [torch.optim.SGD(pmc.lm.model.parameters(), lr=0.05) for pmc in (single, mine)]
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4]):  # each rank meets other questions in the second epoch
        batches = torch.tensor(order).tensor_split(ranks)
        for batch in batches:
            (single.loss(batch.tolist(), RETAIN) / ranks).backward()
        ddp(batches[rank].tolist(), RETAIN).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        parallel.merge_ledgers(mine)
        assert mine.ledger.visits == single.ledger.visits
        assert {q: (e.text, e.tokens) for q, e in mine.ledger.entries.items()} == {
            q: (e.text, e.tokens) for q, e in single.ledger.entries.items()
        }
    moved = 0.0
    for name, value in single.lm.model.state_dict().items():
        torch.testing.assert_close(mine.lm.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
        moved += float((value - start[name]).abs().sum())
    assert moved > 0.1


def test_what_is_no_pmc(rng_seed):
    model = make_model(seed=rng_seed)
    for call in (parallel.LossModule, parallel.merge_ledgers, lambda pmc: parallel.initialise(pmc, ["a?"])):
        with pytest.raises(UserError, match="^pmc: got a value of type LlamaForCausalLM, expected a PMC"):
            call(model)
