"""torch.autocast changes nothing that the ops compute."""

import pytest
import torch
import torch.distributed as dist

from pmc_fast import (
    collapse_loss,
    decode_attention,
    linear_logprob,
    linear_sample,
    packed_attention,
    parallel_head,
    sample,
)
from pmc_fast.ops._autocast import outside_autocast
from pmc_fast.parallel_head import VocabShards


def losses(op, hidden, weight, target, **options):
    """With gradients, whose backward pass runs in the same block."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    if op.__name__ == "collapse_loss":
        value, *others = op(*leaves, target, torch.ones(len(target)), **options)
    else:
        value, others = op(*leaves, target, **options), []
    return [value, *others, *torch.autograd.grad(value.sum(), leaves)]


def attention(hidden, weight, impl):
    query, value = (x[:12].view(12, 4, 8).clone().requires_grad_() for x in (hidden, weight))
    out = packed_attention(query, query[:, 2:], value[:, :2], [3, 4, 5], impl=impl)
    return [out, *torch.autograd.grad(out.square().sum(), (query, value))]


def results(hidden, weight, target, impl):
    found = []
    for op in (linear_logprob, collapse_loss):
        found += losses(op, hidden, weight, target, impl=impl)
    found += sample(hidden, impl=impl)
    found += linear_sample(hidden, weight, top_p=0.9, impl=impl)
    key, value = weight[:60].view(2, 5, 2, 3, 32)
    found.append(decode_attention(hidden[:20].view(5, 4, 32), key, value, target[:5] % 3, impl=impl))
    return found + (attention(hidden, weight, impl) if impl != "triton" else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
def test_ops(impl, dtype, rng_seed):
    hidden, weight, target = torch.randn(20, 32).to(dtype), torch.randn(70, 32).to(dtype), torch.randint(0, 70, (20,))
    want = results(hidden, weight, target, impl)
    with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else torch.float16):
        got = results(hidden, weight, target, impl)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_device_that_has_no_autocast():
    assert outside_autocast(torch.square)(torch.empty(3, device="meta")).shape == (3,)


def test_ops_with_a_shared_head(rng_seed):
    hidden, weight, target = torch.randn(20, 32), torch.randn(70, 32), torch.randint(0, 70, (20,))

    def found():
        shards = VocabShards.of(weight)
        drawn = parallel_head.linear_sample(hidden, weight, top_p=0.9, shards=shards)
        ops = (parallel_head.linear_logprob, parallel_head.collapse_loss)
        return [x for op in ops for x in losses(op, hidden, weight, target, shards=shards)] + [*drawn]

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        want = found()
        with torch.autocast("cpu", torch.bfloat16):
            got = found()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(got, want, rtol=0, atol=0)
