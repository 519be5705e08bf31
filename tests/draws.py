"""What two calls of a sampler drew, compared."""

import torch

from pmc_fast.sampler import Samples


def assert_same(got, want, rtol=1e-3, atol=1e-4):
    """The same answers, by implementations that round otherwise.

    Of a million draws one or so is between tokens that are all but tied. So one answer may part from the other, but not for other
    log-probabilities of what is before.
    """
    assert got.tokens.shape[:2] == want.tokens.shape[:2]
    width = min(got.tokens.shape[2], want.tokens.shape[2])
    same = got.tokens[:, :, :width] == want.tokens[:, :, :width]
    whole = same.all(2) & (got.lengths == want.lengths)
    assert (~whole).sum() <= 1
    for name in ("lengths", "finished", "pruned"):
        assert torch.equal(getattr(got, name)[whole], getattr(want, name)[whole]), name
    before = same.cumprod(2).bool()
    mine, others = (samples.logprobs[:, :, :width][before] for samples in (got, want))
    torch.testing.assert_close(mine, others, rtol=rtol, atol=atol)
    assert not whole.all() or None in (got.decoded, want.decoded) or got.decoded == want.decoded


def differ(first, second):
    """Whether other weights drew them: other tokens, which by chance may be the same, or others of their log-probabilities, by more
    than what implementations differ by."""
    return not (
        torch.equal(first.tokens, second.tokens)
        and torch.allclose(first.logprobs, second.logprobs, rtol=1e-3, atol=1e-3)
    )


def part(samples, which):
    """Some of the answers, by an index of prompts, or of prompts and their answers."""
    return Samples(*(getattr(samples, name)[which] for name in ("tokens", "lengths", "logprobs", "finished", "pruned")))
