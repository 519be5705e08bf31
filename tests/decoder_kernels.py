"""What the kernels of the static decoder compute, in plain torch."""

from contextlib import suppress

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from pmc_fast.gpu.regroup import regroup
from pmc_fast.reference import decode_attention as reference

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}

__all__ = [
    "ACTIVATIONS",
    "activate",
    "append_token",
    "copy_rows",
    "decode_attention",
    "faster_at_once",
    "normalize",
    "regroup",
    "rotate_and_append",
]


def normalize(x, weight, bias, epsilon, *, centered, offset=0.0, added=None, out):
    if added is not None:
        x += added.float()
    value = x.float()
    if centered:
        value = value - value.mean(-1, keepdim=True)
    value = value * (value.square().mean(-1, keepdim=True) + epsilon).rsqrt() * (weight.float() + offset)
    return out.copy_(value if bias is None else value + bias.float())


def activate(x, activation, up=None):
    wide = ACTIVATIONS[activation](x.float())
    return x.copy_(wide if up is None else wide * up.float())


def rotate_and_append(query, key, value, cosine, sine, position, length, keys, values):
    def turned(states):
        size = cosine.shape[1]
        wide, kept = states[..., :size].float(), states[..., size:]
        half = torch.cat([-wide[..., size // 2 :], wide[..., : size // 2]], -1)
        wide = wide * cosine[position][:, None] + half * sine[position][:, None]
        return torch.cat([wide.to(states.dtype), kept], -1)

    row = torch.arange(len(query), device=query.device)
    keys[row, :, length - 1], values[row, :, length - 1] = turned(key), value
    return turned(query)


def faster_at_once(rows, prefix_key, heads, window):
    return False


def decode_attention(query, key, value, first, *, prefix_row, length, sharers, **options):
    """A row that has no text may hold anything, of which the reference complains; the kernel makes NaN of it, too."""

    def attend(rows):
        its = {"prefix_row": prefix_row[rows], "length": length[rows]}
        with _disable_current_modes():  # unlike the kernel, the reference looks at values
            return reference.decode_attention(query[rows], key[rows], value[rows], first[rows], **its, **options)

    try:
        return attend(slice(None))
    except ValueError:
        out = torch.full_like(query, torch.nan)
        for row in range(len(query)):
            with suppress(ValueError):
                out[row] = attend([row])[0]
        return out


def append_token(
    token, logprob, ends, limit, *, running, length, finished, tokens, logprobs, position, step
):  # fmt: skip
    ran = running.nonzero()[:, 0]
    tokens[ran, length[ran]], logprobs[ran, length[ran]] = token[ran], logprob[ran]
    length[ran] += 1
    ended = torch.isin(token, ends)
    finished[ran] |= ended[ran]
    running &= ~ended & (length < limit)
    position += 1
    step += 1


def copy_rows(own, source, destination, copies, length):
    count, held = int(copies), int(length) - 1
    own[:, :, destination[:count], :, :held] = own[:, :, source[:count], :, :held]
