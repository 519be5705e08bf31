"""The C++ kernels of the losses: each thread works in memory of its own, and what is rounded to bfloat16 is as torch rounds it."""

import pytest
import torch

from pmc_fast import collapse_loss, linear_logprob
from pmc_fast.native import gemm
from pmc_fast.native.collapse_loss import _epilogue


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_share_no_memory(dtype, monkeypatch, rng_seed):
    """Rows that take many turns of the scheduler: of any two threads one would be stopped within a row, on a single core too."""
    monkeypatch.setattr(gemm, "has_fast_bfloat16", lambda: True)
    hidden, weight, target = torch.randn(160, 3), torch.randn(20_011, 3), torch.randint(20_011, (160,))
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    upstream = torch.rand(160)

    def results():
        options = {"logit_scale": 0.7, "impl": "native"}
        frozen = linear_logprob(hidden, weight.detach(), target, **options)
        logprob = linear_logprob(hidden, weight, target, **options)
        loss = collapse_loss(hidden, weight, target, upstream, **options)
        gradients = [torch.autograd.grad(frozen, hidden, upstream)[0]]
        for value, above in ((logprob, upstream), (loss.loss, None)):
            gradients += torch.autograd.grad(value, (hidden, weight), above)
        return [logprob, frozen, loss.token_nll, *gradients]

    torch.set_num_threads(1)
    alone = results()
    torch.set_num_threads(5)
    for got, want in zip(results(), alone, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_every_tie_of_bfloat16_is_rounded_to_even(isa):
    """Numbers between any two neighbours, in vectors and after them: gradients of tokens that are certain and not what they should."""
    upper = torch.arange(2**16)
    upper = upper[upper & 0x7F80 != 0x7F80]  # finite
    bits = (upper[:, None] << 16) + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    number = bits.flatten().to(torch.int32).view(torch.float32)
    row, vocab = torch.arange(len(number)), 35
    certain, target = row % vocab, (row + 1) % vocab
    logits = torch.full((len(number), vocab), -200.0, dtype=torch.bfloat16)
    logits[row, certain] = 0
    _epilogue(logits, target, number, row, None, 1.0)
    assert torch.equal(logits[row, certain], number.bfloat16()) and torch.equal(logits[row, target], -number.bfloat16())
    logits[row, certain] = logits[row, target] = 0
    assert not logits.any()
