"""The gradients of `linear_logprob`, a slice of the vocabulary at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmc_fast.gpu.cross_entropy import Gradients, finished, magnification
from pmc_fast.gpu.gemm import add_product, even_pieces, padded_rows, write_product
from pmc_fast.kernels.cross_entropy import gradient_scale, product_gradient
from pmc_fast.kernels.interpreted import rounded
from pmc_fast.kernels.logits import tempered_logits
from pmc_fast.kernels.variant import MODELS, Variant, absent, present

# Slices are as wide as SLICE_BYTES of logits allow, but no narrower than LEAST_TOKENS.
LEAST_TOKENS = 8192
SLICE_BYTES = 1 << 28
BLOCK = 4096  # logits per program


@triton.jit
def slice_kernel(
    products,  # [count, tokens], float32
    gradients,  # [count, tokens]; may be `products`
    stride,  # of the rows of both, whose padding may be read and written
    bias,  # [tokens] or None
    tokens,
    first_token,
    target,  # [count]
    row_weight,  # [count]
    normalizer,  # [count, 2]
    magnify,  # [1], multiplies the gradient; None: 1
    logit_scale,
    softcap,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < stride
    product = tl.load(products + row * stride + columns, mask=inside, eviction_policy="evict_first")
    if bias is not None:
        product += tl.load(bias + columns, mask=columns < tokens, other=0).to(tl.float32)
    logits, slope = tempered_logits(product, logit_scale, softcap, inverse_temperature)
    scale = gradient_scale(row, row_weight, magnify, logit_scale, inverse_temperature)
    label = tl.load(target + row) - first_token
    top, mass = tl.load(normalizer + 2 * row), tl.load(normalizer + 2 * row + 1)
    gradient = product_gradient(logits, slope, columns, label, top, mass, scale)
    tl.store(gradients + row * stride + columns, rounded(gradient, gradients.dtype.element_ty), mask=inside)


def sliced_backward(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    normalizer: Tensor,
    *,
    rows: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """A slice of the vocabulary at a time, in float32 until it is a gradient.

    Logits rounded to 16 bits would not do here: each row's top and mass are those of unrounded ones.
    """
    x, *rest = (t if rows is None else t[rows] for t in (hidden, target, -upstream.float(), normalizer))
    label, row_weight, normalizer = (t.contiguous() for t in rest)
    bias = None if bias is None else bias.contiguous()
    (vocab, size), count, dtype, device = weight.shape, len(x), weight.dtype, weight.device
    magnify = magnification(row_weight, logit_scale, temperature) if dtype == torch.float16 else None

    d_x = torch.empty(count, size, dtype=torch.float32, device=device) if needs[0] else None
    d_weight = torch.empty(vocab, size, dtype=dtype, device=device) if needs[1] else None
    d_bias = torch.empty(vocab, dtype=torch.float32, device=device) if needs[2] else None
    most = max(LEAST_TOKENS, SLICE_BYTES // (count * weight.element_size()))
    slices = list(even_pieces(vocab, most, multiple=256))
    widest = max(tokens.stop - tokens.start for tokens in slices)
    products = padded_rows(count, widest, torch.float32, device)
    gradients = products if dtype == torch.float32 else padded_rows(count, widest, dtype, device)
    for tokens in slices:
        head_slice, width = weight[tokens], tokens.stop - tokens.start
        z, g = products[:, :width], gradients[:, :width]
        write_product(z, x, head_slice.T)
        block = min(BLOCK, triton.next_power_of_2(width))
        slice_kernel[(count, triton.cdiv(width, block))](
            z,
            g,
            z.stride(0),
            None if bias is None else bias[tokens],
            width,
            tokens.start,
            label,
            row_weight,
            normalizer,
            magnify,
            logit_scale,
            softcap,
            1 / temperature,
            BLOCK=block,
            num_warps=8,
        )
        if d_x is not None:
            (write_product if tokens.start == 0 else add_product)(d_x, g, head_slice)
        if d_weight is not None:
            write_head_gradient(d_weight[tokens], g.T, x, magnify)
        if d_bias is not None:
            torch.sum(g, 0, dtype=torch.float32, out=d_bias[tokens])
    d_hidden, _, d_bias = finished(d_x, None, d_bias, hidden, rows, magnify)
    return d_hidden, d_weight, d_bias


def write_head_gradient(out: Tensor, gradients: Tensor, x: Tensor, magnify: Tensor | None) -> None:
    """out = gradients @ x / magnify, rounded once."""
    if magnify is None:
        write_product(out, gradients, x)
    else:
        sums = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        write_product(sums, gradients, x)
        out.copy_(sums.div_(magnify))


def variants(capability: int) -> list[Variant]:
    """The kernel at its production configurations; none of them depends on the GPU."""
    given = {"logit_scale": "fp32", "inverse_temperature": "fp32"}
    return [
        _variant(f"gradient of a slice, {model.name}, {dtype}", kind, model.optional(kind) | given)
        for model in MODELS
        for dtype, kind in (("bfloat16", "*bf16"), ("float16", "*fp16"), ("float32", "*fp32"))
    ]


def _variant(name: str, kind: str, head: dict) -> Variant:
    signature = {"products": "*fp32", "gradients": kind, "target": "*i64"}
    signature |= dict.fromkeys(("stride", "tokens", "first_token"), "i32")
    signature |= dict.fromkeys(("row_weight", "normalizer"), "*fp32")
    optional = head | {"magnify": "*fp32" if kind == "*fp16" else None}
    return Variant(
        name=name,
        kernel=slice_kernel,
        signature=signature | present(optional),
        constants={"BLOCK": BLOCK} | absent(optional),
        num_warps=8,
        num_stages=3,
        aligned=("products", "gradients", "stride", "tokens", *(("bias",) if head["bias"] else ())),
    )
