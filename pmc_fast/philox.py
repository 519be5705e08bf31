"""Counter-based random numbers: Philox-4x32-10 and the Gumbel noise of a draw."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from pmc_fast.errors import described

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF

SAMPLE_STREAM = 0  # the noise that picks tokens
SELECTION_STREAM = 1  # the noise that picks one of a question's samples


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    product = a * b  # wraps as two's complement, whose low 64 bits are the unsigned product
    return (product >> 32) & _MASK, product & _MASK


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 (Salmon et al., SC 2011): four 32-bit words for each 128-bit counter.

    Args:
        counter: four broadcastable int64 tensors of values in [0, 2^32), the lowest word first.
        seed: the 64-bit key, in [0, 2^64).

    Returns:
        Four int64 tensors of values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(c0, _M0)
        high1, low1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def gumbel(
    seed: int, sequence: Tensor, position: Tensor, vocab: int, stream: int = SAMPLE_STREAM, begin: int = 0
) -> Tensor:
    """The Gumbel noise of every token of every row; it depends on nothing but its coordinates.

    Equivalent to ``-log(-log1p(-u))`` with ``u = (word + 0.5) * 2**-32``, ``word`` being word ``token % 4`` of Philox
    with key ``seed`` at counter ``(token // 4, position, sequence, stream)``; computed in float64, rounded once.

    Args:
        seed: in [0, 2^64).
        sequence: int64 [N], in [0, 2^32): which text a row belongs to.
        position: int64 [N], in [0, 2^32): which token of that text is drawn.
        vocab: the number of tokens, V.
        stream: separates uses of one seed.
        begin: the first token's id.

    Returns:
        float32 [N, V].

    Raises:
        ValueError: an argument of another type, shape or range (``sequence`` and ``position`` out of theirs on a CPU alone: a GPU
            would have to be waited for).
    """
    for name, value, bits in (("seed", seed, 64), ("stream", stream, 32), ("vocab", vocab, 32), ("begin", begin, 32)):
        if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= value < 2**bits:
            raise ValueError(f"{name}: got {described(value)}, expected an integer in [0, 2^{bits})")
    for name, values in (("sequence", sequence), ("position", position)):
        is_tensor = isinstance(values, Tensor)
        if not (is_tensor and values.dtype == torch.int64 and values.dim() == 1 and values.shape == sequence.shape):
            got = f"{values.dtype} of shape {list(values.shape)}" if is_tensor else described(values)
            raise ValueError(f"{name}: got {got}, expected int64 [N], sequence and position alike")
        if values.device.type == "cpu" and (wrong := values[values >> 32 != 0]).numel():
            raise ValueError(f"{name}: got {int(wrong[0])}, expected integers in [0, 2^32)")
    first, rows = begin // 4, sequence.numel()
    blocks = (begin + vocab + 3) // 4 - first
    block = torch.arange(first, first + blocks, device=sequence.device).expand(rows, blocks)
    words = _words(seed, sequence, position, block, stream)
    return _noise(words.reshape(rows, 4 * blocks)[:, begin - 4 * first :][:, :vocab])


def gumbel_of(seed: int, sequence: Tensor, position: Tensor, token: Tensor, stream: int = SAMPLE_STREAM) -> Tensor:
    """The Gumbel noise of some tokens of every row.

    Equivalent to ``gumbel(seed, sequence, position, V, stream).gather(1, token)``.

    Args:
        token: int64 [N, C], ids in [0, V).
        others: as for `gumbel`.

    Returns:
        float32 [N, C].
    """
    words = _words(seed, sequence, position, token // 4, stream)
    return _noise(words.gather(2, (token % 4)[:, :, None])[:, :, 0])


def _words(seed: int, sequence: Tensor, position: Tensor, block: Tensor, stream: int) -> Tensor:
    """The four words of each block [N, B], [N, B, 4]."""
    zero = torch.zeros((), dtype=torch.int64, device=sequence.device)
    words = philox_4x32((block, position[:, None] + zero, sequence[:, None] + zero, zero + stream), seed)
    return torch.stack(torch.broadcast_tensors(*words), dim=-1)


def _noise(word: Tensor) -> Tensor:
    u = (word.double() + 0.5) * 2.0**-32
    return (-torch.log(-torch.log1p(-u))).float()
