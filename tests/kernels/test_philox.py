"""The device's noise against pmc_fast.philox's, and the bound that spares most of it."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from pmc_fast.kernels import philox as kernels
from pmc_fast.kernels.linear_sample import tile_token, words_of_tile
from pmc_fast.philox import gumbel


@triton.jit
def noise_of_words(words, noise, bound, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + index).to(tl.uint32)
    tl.store(noise + index, kernels.gumbel(word))
    tl.store(bound + index, kernels.gumbel_bound(word))


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def noise_of_tokens(
    seed_low,
    seed_high,
    sequence,
    position,
    noise,
    first,
    MATRIX: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    its_sequence = tl.load(sequence + row).to(tl.uint32)
    its_position = tl.load(position + row).to(tl.uint32)
    if MATRIX:
        token = tile_token(first, TOKENS)
        words = words_of_tile(seed_low, seed_high, its_sequence, its_position, first, TOKENS)
    else:
        token = first + tl.arange(0, TOKENS)
        words = kernels.tile_words(seed_low, seed_high, its_sequence, its_position, first, TOKENS)
    alone = kernels.token_word(seed_low, seed_high, its_sequence[None, :], its_position[None, :], token[:, None])
    place = row[None, :] * TOKENS + token[:, None] - first
    tl.store(noise + place, kernels.gumbel(words))
    tl.store(noise + ROWS * TOKENS + place, kernels.gumbel(alone))


@pytest.mark.parametrize("matrix", [False, True], ids=["in order", "as a product's threads hold them"])
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 0x299F31D0A4093822])
def test_noise_is_the_same_to_the_bit(seed, matrix, rng_seed):
    tokens, rows, first = 128, 4, 4 * 12345
    sequence, position = torch.randint(0, 2**32, (rows,)), torch.randint(0, 2**32, (rows,))
    sequence[0], position[1], sequence[2], position[2] = 2**32 - 1, 2**32 - 1, 0, 0
    got = torch.full((2, rows, tokens), torch.nan)
    noise_of_tokens[(1,)](*kernels.halves(seed), sequence, position, got, first, matrix, tokens, rows)
    want = gumbel(seed, sequence, position, first + tokens)[:, first:]
    assert torch.equal(got[0], want) and torch.equal(got[1], want)


def test_the_bound_is_above_the_noise_and_close_to_it(rng_seed):
    near_powers = [2**e + d for e in range(33) for d in range(-3, 4)]
    fitted = [int(u * 2**32) + d for u in (0.7, 0.69999, 0.70001) for d in range(-3, 4)]
    edges = [w for w in near_powers + fitted if 0 <= w < 2**32]
    size = 2**20
    random = torch.randint(0, 2**32, (size - len(edges),)) >> torch.randint(0, 24, (size - len(edges),))
    words = torch.cat([torch.tensor(edges), random])
    noise, bound = torch.full((2, size), torch.nan)
    noise_of_words[(size // 4096,)](words, noise, bound, 4096)
    u = (words.double() + 0.5) * 2.0**-32
    assert torch.equal(noise, (-torch.log(-torch.log1p(-u))).float())
    gap = bound.double() - noise.double()
    assert gap.min() > 5e-5  # room for the rounding of fused multiply-adds
    assert gap[(words > 1300) & (u < 0.7)].max() < 0.002  # what draw_from_tile relies on
    assert gap[words > 0].max() < 2.2
