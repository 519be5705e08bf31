"""Philox words and Gumbel noise on the device: what pmc_fast/philox.py defines, in Triton.

A draw needs exact noise only for the few tokens that may win, and float64 logarithms are dear on a GPU. `gumbel_bound` costs
some twenty float32 operations and never lies below `gumbel`: a token whose bound cannot win needs no noise.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.philox import SAMPLE_STREAM

STREAM = tl.constexpr(SAMPLE_STREAM)


def halves(bits: int | Tensor) -> tuple[int, int] | tuple[Tensor, Tensor]:
    """The low and the high half of a 64-bit integer, as kernels take it: int32 arguments whatever the value.

    Of a tensor int64 [1] where they lie: a kernel in a CUDA graph then reads the value of the time.
    """
    if isinstance(bits, Tensor):
        return bits.view(torch.int32).split(1)
    return struct.unpack("<2i", struct.pack("<Q", bits))


@triton.jit
def half(argument):
    """uint32, of what `halves` gave."""
    if argument.dtype.is_ptr():
        argument = tl.load(argument)
    return argument.to(tl.uint32, bitcast=True)


@triton.jit
def block_words(seed_low, seed_high, sequence, position, block):
    """The words of tokens 4 * block + 0, 1, 2, 3; sequence, position and block are uint32 and broadcast."""
    stream = tl.zeros_like(block) + STREAM
    return tl.philox_impl(block, position, sequence, stream, half(seed_low), half(seed_high))


@triton.jit
def tile_words(seed_low, seed_high, sequence, position, first, TOKENS: tl.constexpr):
    """uint32 [TOKENS, rows]: the words of TOKENS tokens from `first`, which 4 divides; sequence, position: uint32 [rows]."""
    rows: tl.constexpr = sequence.shape[0]
    block = first // 4 + tl.arange(0, TOKENS // 4)
    block = tl.broadcast_to(block.to(tl.uint32)[:, None], [TOKENS // 4, rows])
    w0, w1, w2, w3 = block_words(seed_low, seed_high, sequence[None, :], position[None, :], block)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [blocks, rows, word // 2, word % 2]
    return words.permute(0, 2, 3, 1).reshape(TOKENS, rows)


@triton.jit
def token_word(seed_low, seed_high, sequence, position, token):
    """The word of any one token; int32 token broadcasts with uint32 sequence and position."""
    w0, w1, w2, w3 = block_words(seed_low, seed_high, sequence, position, (token // 4).to(tl.uint32))
    word = token % 4
    return tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))


@triton.jit
def gumbel(word):
    """The noise itself: float64, rounded once to float32. 1 - u is exact, so log(1 - u) is as good as log1p(-u)."""
    u = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    return (-tl.log(-tl.log(1 - u))).to(tl.float32)


@triton.jit
def gumbel_bound(word):
    """At least gumbel(word); at most 0.002 more for noise in (-0.18, 15), 2.1 more below that.

    -log(-log1p(-u)) = -log(u) - h(u) with h(u) = log(-log1p(-u) / u). log2(u) comes from the bits of the word as a float,
    whose mantissa 1 + f stands for f + f (1 - f) c(f); c and h are polynomials fitted on [0, 1) and [0, 0.7].
    """
    value = word.to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    f = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1
    c = (0.08231335 * f - 0.24169904) * f + 0.43998527
    exponent_and_f = (bits - 0x3F800000).to(tl.float32)  # times 2^23
    u = value * 2.3283064365386963e-10
    h = (((0.61316927 * u - 0.32740219) * u + 0.33535781) * u + 0.49001034) * u
    # log(2) * 32 and a margin for the fits (at most 0.0005) and for rounding
    bound = 22.18131 - h - exponent_and_f * 8.262958e-8
    return bound - (f - f * f) * c * 0.6931472
