"""The linear layers of a model on a CPU, by the faster of torch's two libraries and in the dtype that the CPU multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial

import torch
from torch import Tensor, nn

from pmc_fast.errors import BackendUnavailable
from pmc_fast.native import library, packed_linear
from pmc_fast.sharding import is_dtensor

# Weights copied into the library's own layout at most, for the time of one sampling call.
PACKED_BYTES = 2 << 30

# The products of the block under way, by the identity of the weights that they hold copies of.
_products: ContextVar[Mapping[tuple, Product]] = ContextVar("pmc_fast_products", default={})  # noqa: B039


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, without gradients.

    float32 on a CPU goes through oneDNN where it is built in: MKL, which torch prefers, reaches only half to nine tenths
    of that rate on AMD's CPUs.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() and weight.numel() and _has_onednn():
        return _onednn(x, weight, bias)
    return nn.functional.linear(x, weight, bias)


@cache
def has_fast_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 faster than float32 here.

    Without instructions for it, it is several times slower. With AVX-512's alone an Intel Xeon takes 1.6 to 1.9 times as long as
    for float32, so there it takes AMX; AMD's CPUs were not compared.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    return torch.cpu._is_amx_tile_supported() or not _is_intel()


def _is_intel() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in file)
    except OSError:
        return False


class Product:
    """A float32 copy of a weight in the layout that multiplies fastest; product(x, bias) is x @ weight.T + bias."""

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def add_to(self, total: Tensor, x: Tensor, bias: Tensor | None) -> None:
        """total += x @ weight.T + bias."""
        total += self(x, bias)


class _Panels(Product):
    """This library's own layout and product."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = packed_linear.pack(weight)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return packed_linear.packed_linear(x, self.weight, bias)

    def add_to(self, total: Tensor, x: Tensor, bias: Tensor | None) -> None:
        packed_linear.packed_linear(x, self.weight, bias, total, accumulate=True)


class _Reordered(Product):
    """oneDNN's, for about so many rows."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().float(), max(1, rows))

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _onednn(x, self._weight, bias)


@contextmanager
def fast_linear(model: nn.Module, rows: int, head: Tensor | None = None) -> Iterator[None]:
    """Within a with block, the model's nn.Linear layers on a CPU multiply faster; for use without gradients.

    Their weights must not change meanwhile: they are packed once, as float32, into the layout that the library multiplies
    from (at most PACKED_BYTES of them), which pays when few rows are multiplied many times.

    Args:
        model: its layers of type nn.Linear are changed and, in the end, restored.
        rows: how many rows most products will have, for the choice of layout.
        head: a weight [V, D] that is multiplied outside of the model's layers: see `packed`.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and "forward" not in vars(module) and not is_dtensor(module.weight)
    ]
    room, held = PACKED_BYTES, {}
    for layer in layers if _has_onednn() else []:
        if not _gains(layer.weight):
            continue
        if (needed := _packed_bytes(layer.weight)) > room:
            layer.forward = partial(_forward, layer, _widen(layer.weight))
            continue
        room -= needed
        product = _Panels(layer.weight) if _multiplies_packed() else _Reordered(layer.weight, rows)
        held[_identity(layer.weight)] = product
        layer.forward = partial(_forward, layer, product)
    if head is not None and _gains(head) and _multiplies_packed() and _packed_bytes(head) <= room:
        held[_identity(head)] = _Panels(head)
    token = _products.set(held)
    try:
        yield
    finally:
        _products.reset(token)
        for layer in layers:
            vars(layer).pop("forward", None)


def product_with(weight: Tensor) -> Product | None:
    """The product with this weight, if there is a `fast_linear` block around that copied it."""
    return _products.get().get(_identity(weight))


def packed(weight: Tensor) -> packed_linear.PackedWeight | None:
    """The copy of this weight in the library's own layout, if there is a `fast_linear` block around that made one."""
    product = product_with(weight)
    return product.weight if isinstance(product, _Panels) else None


def _identity(weight: Tensor) -> tuple:
    return weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def _multiplies_packed() -> bool:
    """Whether this library's own product is the faster one: with AVX2; with AVX-512 oneDNN's takes 5 to 20 % less."""
    try:
        return library().instruction_set() == "avx2"
    except BackendUnavailable:
        return False


def _packed_bytes(weight: Tensor) -> int:
    return packed_linear.packed_bytes(weight) if _multiplies_packed() else weight.numel() * 4


def _widen(weight: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    """x, bias -> x @ weight.T + bias in float32, from the weight as it is."""
    return lambda x, bias: _onednn(x, weight.float(), bias)


def _gains(weight: Tensor) -> bool:
    slow = weight.dtype == torch.bfloat16 and not has_fast_bfloat16()
    return weight.device.type == "cpu" and weight.numel() > 0 and (weight.dtype == torch.float32 or slow)


def _forward(layer: nn.Linear, multiply: Callable[[Tensor, Tensor | None], Tensor], x: Tensor) -> Tensor:
    changed = type(layer) is not nn.Linear  # parametrized since, as PEFT does for the time of a layer's call
    if changed or x.dtype != layer.weight.dtype or not x.numel():
        return nn.functional.linear(x, layer.weight, layer.bias)
    bias = None if layer.bias is None else layer.bias.float()
    return multiply(x.float(), bias).to(x.dtype)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
