"""Philox-4x32-10 and the Gumbel noise made from it."""

import math

import pytest
import torch

from pmc_fast.native import library
from pmc_fast.native.sample import gumbel as native_gumbel
from pmc_fast.philox import SELECTION_STREAM, gumbel, gumbel_of, philox_4x32


@pytest.mark.parametrize(
    ("seed", "counter", "expected"),
    [
        (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (2**64 - 1, (2**32 - 1,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(seed, counter, expected):
    """The vectors that the Random123 library (Salmon et al.) publishes."""
    words = philox_4x32(tuple(torch.tensor(c) for c in counter), seed)
    assert " ".join(f"{int(w):08x}" for w in words) == expected


def by_hand(seed, sequence, position, token, stream=0):
    """Philox and the noise of one token in Python's own integers and floats."""
    c, k = [token // 4, position, sequence, stream], [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return -math.log(-math.log1p(-(c[token % 4] + 0.5) * 2.0**-32))


def test_noise_belongs_to_its_coordinates(rng_seed):
    seed = rng_seed << 31 | 5  # both halves of the key
    sequence, position = torch.randint(0, 2**32, (3,)), torch.randint(0, 2**32, (3,))
    for stream in (0, SELECTION_STREAM):
        got = gumbel(seed, sequence, position, 23, stream)
        rows = zip(sequence.tolist(), position.tolist(), strict=True)
        want = [[by_hand(seed, s, p, t, stream) for t in range(23)] for s, p in rows]
        assert torch.equal(got, torch.tensor(want, dtype=torch.float64).float())
        assert torch.equal(gumbel(seed, sequence, position, 9, stream, begin=14), got[:, 14:])
        some = torch.randint(0, 23, (3, 7))
        assert torch.equal(gumbel_of(seed, sequence, position, some, stream), got.gather(1, some))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, r"seed: got -1, expected an integer in \[0, 2\^64\)"),
        ({"seed": 2**64}, "seed: got 18446744073709551616"),
        ({"seed": 1.0}, "seed: got 1.0"),
        ({"stream": 2**32}, "stream: got 4294967296"),
        ({"vocab": -3}, r"vocab: got -3, expected an integer in \[0, 2\^32\)"),
        ({"begin": -1}, "begin: got -1"),
        ({"sequence": torch.tensor([0, 2**32])}, "sequence: got 4294967296, expected integers"),
        ({"sequence": 3}, r"sequence: got 3, expected int64 \[N\]"),
        ({"position": torch.tensor([-1, 0])}, "position: got -1, expected integers"),
        ({"position": torch.tensor([0])}, r"position: got torch.int64 of shape \[1\]"),
        ({"position": torch.zeros(2)}, "position: got torch.float32"),
    ],
)
def test_what_is_no_coordinate(change, message):
    given = {"seed": 0, "sequence": torch.tensor([0, 1]), "position": torch.tensor([2, 3]), "vocab": 5}
    with pytest.raises(ValueError, match=f"^{message}"):
        gumbel(**{**given, **change})


@pytest.mark.parametrize("isa", library().instruction_sets())
@pytest.mark.parametrize("vocab", [1, 3, 4, 5, 31, 32, 33, 65, 1027])  # around multiples of every set's lanes
def test_native_noise_is_the_same_to_the_bit(vocab, isa, rng_seed):
    sequence, position = torch.randint(0, 2**32, (9,)), torch.randint(0, 2**32, (9,))
    sequence[0], position[1] = 2**32 - 1, 2**32 - 1
    before = library().instruction_set()
    library().use_instruction_set(isa)
    try:
        got = native_gumbel(2**62 + rng_seed, sequence, position, vocab)
    finally:
        library().use_instruction_set(before)
    assert torch.equal(got, gumbel(2**62 + rng_seed, sequence, position, vocab))
