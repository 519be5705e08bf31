"""Operations that Triton's interpreter gets wrong in bfloat16, which it keeps as integers; on a GPU they are Triton's own."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, where total is float32. The interpreter would multiply the integers."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x as the nearest number of type dtype. The interpreter would cut off the bits that bfloat16 lacks."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, (bits & -0x10000).to(tl.float32, bitcast=True), x)
    return x.to(dtype)
