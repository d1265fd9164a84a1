"""Device functions of `integer`; see `tritonq.codecs` for what each one does."""

import triton
import triton.language as tl


@triton.jit
def _bounded(x, zero, finite, ELEM: tl.constexpr):
    """x within the range of the codes, 0 where not `finite` (None: everywhere), even if x is NaN."""
    low = 0.0 - zero
    high = low + ((1 << ELEM.bits) - 1)
    if finite is not None:
        low, high = tl.where(finite, low, 0.0), tl.where(finite, high, 0.0)
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def round(x, zero, ELEM: tl.constexpr):
    x = _bounded(x, zero, None, ELEM)
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: fp32 keeps integers there, half to even


@triton.jit
def encode(x, zero, finite, ELEM: tl.constexpr):
    x = _bounded(x, zero, finite, ELEM)
    # The low bits of x + 1.5 * 2^23 are the rounded integer. An even zero point may join the sum: ties stay ties.
    if isinstance(zero, tl.constexpr):
        code = (x + (12582912.0 + zero)).to(tl.int32, bitcast=True)
    else:
        code = (x + 12582912.0).to(tl.int32, bitcast=True) + tl.cast(zero, tl.int32)
    return code & 0xFF


@triton.jit
def decode(code, zero, ELEM: tl.constexpr):
    return code.to(tl.float32) - zero
