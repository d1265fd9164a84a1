"""Device functions of `integer`; see `tritonq.codecs` for what each one does."""

import triton
import triton.language as tl

from tritonq.codecs import philox_triton as philox


@triton.jit
def _bounded(x, zero, finite, ELEM: tl.constexpr):
    """x within the range of the codes, 0 where not `finite` (None: everywhere), even if x is NaN."""
    low = 0.0 - zero
    high = low + ((1 << ELEM.bits) - 1)
    if ELEM.fraction != 0:
        low, high = low * 2.0**-ELEM.fraction, high * 2.0**-ELEM.fraction
    if finite is not None:
        low, high = tl.where(finite, low, 0.0), tl.where(finite, high, 0.0)
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def round(x, zero, ELEM: tl.constexpr):
    x = _bounded(x, zero, None, ELEM)
    MAGIC: tl.constexpr = 12582912.0 * 2.0**-ELEM.fraction  # 1.5 * 2^(23 - F): fp32 keeps multiples of 2^-F there
    return (x + MAGIC) - MAGIC  # half to even


@triton.jit
def round_product(x, factor, zero, ELEM: tl.constexpr):
    """round(x * factor) in one operation less where the product is exact, and with one rounding less elsewhere."""
    MAGIC: tl.constexpr = 12582912.0 * 2.0**-ELEM.fraction
    UNIT: tl.constexpr = 2.0**-ELEM.fraction
    low = (0.0 - zero) * UNIT
    high = low + ((1 << ELEM.bits) - 1) * UNIT
    return tl.minimum(tl.maximum(tl.fma(x, factor, MAGIC), low + MAGIC), high + MAGIC) - MAGIC


@triton.jit
def stochastic(x, u, zero, ELEM: tl.constexpr):
    x = _bounded(x, zero, None, ELEM)
    UNIT: tl.constexpr = 2.0**-ELEM.fraction
    MAGIC: tl.constexpr = 12582912.0 * UNIT
    nearest = (x + MAGIC) - MAGIC
    return philox.decide(x, nearest, UNIT, u)


@triton.jit
def encode(x, zero, finite, ELEM: tl.constexpr):
    x = _bounded(x, zero, finite, ELEM)
    # The low bits of x + 1.5 * 2^(23 - F) are rne(x * 2^F). An even zero point may join the sum: ties stay ties.
    UNIT: tl.constexpr = 2.0**-ELEM.fraction
    if isinstance(zero, tl.constexpr):
        code = (x + (12582912.0 + zero) * UNIT).to(tl.int32, bitcast=True)
    else:
        code = (x + 12582912.0 * UNIT).to(tl.int32, bitcast=True) + tl.cast(zero, tl.int32)
    return code & 0xFF


@triton.jit
def decode(code, zero, ELEM: tl.constexpr):
    x = code.to(tl.float32) - zero
    if ELEM.fraction != 0:
        x = x * 2.0**-ELEM.fraction
    return x
