"""Device functions of `integer`; see `tritonq.codecs` for what each one does."""

import triton
import triton.language as tl


@triton.jit
def round(x, zero, ELEM: tl.constexpr):
    low = 0.0 - zero
    x = tl.minimum(tl.maximum(x, low), low + ((1 << ELEM.bits) - 1))
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: fp32 keeps integers there, half to even


@triton.jit
def encode(x, zero, ELEM: tl.constexpr):
    low = 0.0 - zero
    x = tl.minimum(tl.maximum(x, low), low + ((1 << ELEM.bits) - 1))
    # The low bits of x + 1.5 * 2^23 are the rounded integer.
    rounded = (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    return rounded + tl.cast(zero, tl.int32)


@triton.jit
def decode(code, zero, ELEM: tl.constexpr):
    return code.to(tl.float32) - zero
