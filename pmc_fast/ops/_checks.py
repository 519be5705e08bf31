"""Argument checks that the ops share: each names the argument, what it got and what it wants.

Numbers are compared, not given to `math`, so that torch.compile can check one that it does not know yet.
"""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor

from pmc_fast.errors import LARGEST, NORMAL, described, is_normal

INTEGERS = (int, Integral, torch.SymInt)
NUMBERS = (float, *INTEGERS, Real, torch.SymFloat)  # the usual first; what NumPy makes, what torch traces
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {described(value)}, expected a tensor")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: got {kind}, expected a dense tensor (torch.strided)")


def number(name: str, value: float, wanted: str, kinds: tuple[type, ...] = NUMBERS) -> None:
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise TypeError(f"{name}: got {described(value)}, expected {wanted}")


def integer(name: str, value: int, wanted: str, least: int) -> None:
    """Also that it is below 2^63: operators of torch take 64 bits."""
    number(name, value, wanted, INTEGERS)
    if not least <= value < 2**63:
        raise ValueError(f"{name}: got {value}, expected {wanted}")


def matrix(name: str, values: Tensor) -> None:
    tensor(name, values)
    if values.dim() != 2:
        raise ValueError(f"{name}: got shape {list(values.shape)}, expected 2 dimensions")
    if values.dtype not in FLOATING:
        raise TypeError(f"{name}: got dtype {values.dtype}, expected float32, bfloat16, float16 or float64")


def vector(name: str, values: Tensor, size: int, dtype: torch.dtype, like: Tensor) -> None:
    tensor(name, values)
    if values.dim() != 1 or values.shape[0] != size:
        raise ValueError(f"{name}: got shape {list(values.shape)}, expected [{size}]")
    if values.dtype != dtype:
        raise TypeError(f"{name}: got dtype {values.dtype}, expected {dtype}")
    if values.device != like.device:
        raise ValueError(f"{name}: got device {values.device}, expected {like.device}, that of the other tensors")


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float) -> None:
    """The arguments of an output head: hidden [N, D], weight [V, D], bias [V]."""
    matrix("hidden", hidden)
    matrix("weight", weight)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"weight: got shape {list(weight.shape)}, expected [V, {hidden.shape[1]}] to match hidden "
            f"{list(hidden.shape)}"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected at least one token and one dimension")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight: got dtype {weight.dtype}, expected {hidden.dtype}, that of hidden")
    if weight.device != hidden.device:
        raise ValueError(f"weight: got device {weight.device}, expected {hidden.device}, that of hidden")
    if bias is not None:
        vector("bias", bias, weight.shape[0], hidden.dtype, hidden)
    soft_cap(softcap)
    wanted = f"{NORMAL}, or the negative of one"
    number("logit_scale", logit_scale, wanted)
    if not is_normal(abs(logit_scale)):
        raise ValueError(f"logit_scale: got {logit_scale}, expected {wanted}")


def soft_cap(value: float | None) -> None:
    if value is None:
        return
    wanted = f"None or {NORMAL}"
    number("softcap", value, wanted)
    if not is_normal(value):
        raise ValueError(f"softcap: got {value}, expected {wanted}")


def scale(value: float) -> None:
    """Of attention's scores, None being already what it stands for."""
    wanted = "None or a number in [-3.403e+38, 3.403e+38] (float32's range)"
    number("scale", value, wanted)
    if not abs(value) <= LARGEST:
        raise ValueError(f"scale: got {value}, expected {wanted}")


def ignored(index: int | None) -> None:
    if index is not None:
        integer("ignore_index", index, "None or an integer in [-2^63, 2^63)", -(2**63))


def temperature(value: float, *, allow_zero: bool) -> None:
    number("temperature", value, "a number")
    if not (is_normal(value) or (allow_zero and value == 0)):
        raise ValueError(f"temperature: got {value}, expected {NORMAL}{', or 0 for greedy' if allow_zero else ''}")


def sampling(temperature_: float, top_k: int | None, top_p: float, min_p: float, seed: int) -> None:
    """The options of a draw."""
    temperature(temperature_, allow_zero=True)
    if top_k is not None:
        integer("top_k", top_k, "None or an integer in [1, 2^63)", 1)
    number("top_p", top_p, "a number in (0, 1]")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, expected a number in (0, 1]")
    number("min_p", min_p, "a number in [0, 1]")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p: got {min_p}, expected a number in [0, 1]")
    integer("seed", seed, "an integer in [0, 2^63)", 0)


def coordinates(sequence: Tensor | None, position: Tensor | None, rows: Tensor) -> None:
    """The noise coordinates of each row, where they are given."""
    for name, values in (("sequence", sequence), ("position", position)):
        if values is not None:
            vector(name, values, rows.shape[0], torch.int64, rows)


def targets(target: Tensor, vocab: int, ignore_index: int | None) -> None:
    """The values of target; reads them, so only an op's body calls it."""
    good = (target >= 0) & (target < vocab)
    wanted = f"token ids in [0, {vocab})"
    if ignore_index is not None:
        good |= target == ignore_index
        wanted += f" or ignore_index={ignore_index}"
    _all("target", good, target, wanted)


def within(name: str, values: Tensor, size: int) -> None:
    """That every value is in [0, size); reads them, so only an op's body calls it."""
    _all(name, (values >= 0) & (values < size), values, f"integers in [0, {size})")


def length_and_first(length: Tensor, first: Tensor, positions: int, prefix: int) -> None:
    """That of `positions` each row holds `length`, and begins within them and the prefix; reads values likewise."""
    _all("length", (length >= 1) & (length <= positions), length, f"integers in [1, {positions}]")
    ends = "S + length" if prefix else "length"
    _all("first", (first >= 0) & (first < prefix + length), first, f"integers in [0, {ends})")


def counters(name: str, values: Tensor) -> None:
    """The values of sequence or position; reads them, so only an op's body calls it."""
    _all(name, values >> 32 == 0, values, "integers in [0, 2^32)")


def finite(name: str, values: Tensor) -> None:
    """That every value is a number; reads them, so only an op's body calls it."""
    _all(name, torch.isfinite(values), values, "finite numbers")


def _all(name: str, good: Tensor, values: Tensor, wanted: str) -> None:
    """Raise unless all values are good. On a GPU the device raises, when it gets there: the host does not wait to look."""
    if good.device.type != "cpu":
        torch._assert_async(good.all(), f"{name}: expected {wanted}")
    elif not good.all():
        row = int((~good).nonzero()[0])
        raise ValueError(f"{name}: got {values[row].item()} at row {row}, expected {wanted}")
