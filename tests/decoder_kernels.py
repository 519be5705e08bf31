"""What the kernels of the static decoder compute, in plain torch."""

import torch
from torch.utils._python_dispatch import _disable_current_modes

from pmc_fast.reference.decode_attention import decode_attention as reference


def decode_attention(*args, **options):
    with _disable_current_modes():  # unlike the kernel, the reference looks at values
        return reference(*args, **options)


def normalize(x, weight, bias, epsilon, *, centered, offset=0.0, added=None, out):
    if added is not None:
        x += added.float()
    value = x.float()
    if centered:
        value = value - value.mean(-1, keepdim=True)
    value = value * (value.square().mean(-1, keepdim=True) + epsilon).rsqrt() * (weight.float() + offset)
    return out.copy_(value if bias is None else value + bias.float())


def activate(x, activation, up=None):
    wide = x.float()
    wide = (
        torch.nn.functional.silu(wide) if activation == "silu" else torch.nn.functional.gelu(wide, approximate="tanh")
    )
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


def append_token(
    token, logprob, slot, ends, limit, *, running, length, finished, tokens, logprobs, position, step
):  # fmt: skip
    mine = slot[running]
    tokens[mine, length[mine]], logprobs[mine, length[mine]] = token[running], logprob[running]
    length[mine] += 1
    ended = torch.isin(token, ends)
    finished[slot[running & ended]] = True
    running &= ~ended & (length[slot] < limit[slot])
    position += 1
    step += 1
