"""How many floating-point operations the ops take, for torch's FlopCounterMode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pmc_fast import ops as _ops  # noqa: F401  registers the ops that are counted

Shape = Sequence[int]


def _product(hidden: Shape, weight: Shape, *args: Any, out_shape: Any) -> int:
    return 2 * hidden[0] * weight[0] * weight[1]


def _with_gradients(hidden: Shape, weight: Shape, *args: Any, out_shape: Any) -> int:
    *_, needs, _impl = args
    return _product(hidden, weight, out_shape=out_shape) * (1 + sum(needs[:2]))


def _linear_logprob(
    hidden: Shape, weight: Shape, target: Shape, bias: Shape | None, ahead: Shape | None, *args: Any, out_shape: Any
) -> int:
    return _product(hidden, weight, out_shape=out_shape) * (1 if ahead is None else 2)


def _decode_attention(query: Shape, key: Shape, *args: Any, out_shape: Any) -> int:
    rows, heads, dim = query
    prefix = args[4]
    return 4 * rows * heads * dim * (key[2] + (prefix[2] if prefix is not None else 0))


def _packed_attention(
    query: Shape, key: Shape, value: Shape, lengths: Sequence[int], *args: Any, out_shape: Any
) -> int:
    shared, *own = lengths
    scores = shared * shared + sum(length * (shared + length) for length in own)
    return 4 * query[1] * query[2] * scores


def _packed_attention_backward(
    upstream: Shape, query: Shape, key: Shape, value: Shape, out: Shape, log_mass: Shape, *args: Any, out_shape: Any
) -> int:
    return _packed_attention(query, key, value, *args, out_shape=out_shape) * 5 // 2


FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.pmc_fast.collapse_loss: _with_gradients,
    torch.ops.pmc_fast.linear_logprob: _linear_logprob,
    torch.ops.pmc_fast.linear_logprob_backward: lambda upstream, *args, out_shape: _with_gradients(
        *args, out_shape=out_shape
    ),
    torch.ops.pmc_fast.linear_sample: _product,
    torch.ops.pmc_fast.decode_attention: _decode_attention,
    torch.ops.pmc_fast.packed_attention: _packed_attention,
    torch.ops.pmc_fast.packed_attention_backward: _packed_attention_backward,
}
"""Operations of each op's products, a multiplication and an addition counted as two, from its shapes.

``with torch.utils.flop_counter.FlopCounterMode(custom_mapping=pmc_fast.flops.FORMULAS) as counter`` counts them beside
torch's own. All rows count, those with an ignored target or a weight of 0 and positions beyond a row's length, too, since shapes
do not tell; so do scores that causality or a window leave out, as of torch's own attention. What is decoded outside of torch's
dispatcher, as by the sampler on a CPU, is not seen.
"""
# Products that torch's own table leaves out.
FORMULAS[torch.ops.aten.addmm_] = lambda out, a, b, *args, out_shape, **options: 2 * a[0] * a[1] * b[1]
# Of several products end to end, whose lengths shapes do not tell: no matrix of both is a batch.
FORMULAS[torch.ops.aten._grouped_mm] = lambda a, b, *args, out_shape, **options: 2 * a[-2] * a[-1] * b[-1]
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    FORMULAS[torch.ops.mkldnn._linear_pointwise] = _product
