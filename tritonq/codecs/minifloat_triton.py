"""Device functions of `minifloat`; see `tritonq.codecs` for what each one does.

Integer arithmetic on fp32 bits, the same on every target: no hardware conversion, so nothing to differ between GPUs.
"""

import triton
import triton.language as tl


@triton.jit
def _rounded_bits(magnitude, ELEM: tl.constexpr):
    """fp32 bits + half a unit of the last mantissa bit kept, minus one where that bit is 0: ties go to even."""
    SHIFT: tl.constexpr = 23 - ELEM.mbits
    return magnitude + ((1 << (SHIFT - 1)) - 1) + ((magnitude >> SHIFT) & 1)


@triton.jit
def encode(x, zero, ELEM: tl.constexpr):
    SHIFT: tl.constexpr = 23 - ELEM.mbits
    SMALLEST_NORMAL: tl.constexpr = 2.0 ** (1 - ELEM.bias)
    # Adding 2^(exponent of the smallest subnormal + 23) leaves a subnormal's code in the low bits of the sum.
    MAGIC: tl.constexpr = 2.0 ** (24 - ELEM.bias - ELEM.mbits)
    MAGIC_BITS: tl.constexpr = (127 + 24 - ELEM.bias - ELEM.mbits) << 23
    if ELEM.signed:
        a = tl.minimum(tl.abs(x), ELEM.max)
    else:
        a = tl.minimum(tl.maximum(x, 0.0), ELEM.max)
    normal = (_rounded_bits(a.to(tl.int32, bitcast=True), ELEM) >> SHIFT) - ((127 - ELEM.bias) << ELEM.mbits)
    subnormal = (a + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    code = tl.where(a < SMALLEST_NORMAL, subnormal, normal)
    if ELEM.signed:
        sign = (x.to(tl.int32, bitcast=True) >> (32 - ELEM.bits)) & (1 << (ELEM.bits - 1))
        if ELEM.special == "fnuz":
            sign = tl.where(code == 0, 0, sign)
        code = code | sign
    return code


@triton.jit
def round(x, zero, ELEM: tl.constexpr):
    SHIFT: tl.constexpr = 23 - ELEM.mbits
    SMALLEST_NORMAL: tl.constexpr = 2.0 ** (1 - ELEM.bias)
    MAGIC: tl.constexpr = 2.0 ** (24 - ELEM.bias - ELEM.mbits)
    if ELEM.signed:
        a = tl.minimum(tl.abs(x), ELEM.max)
    else:
        a = tl.minimum(tl.maximum(x, 0.0), ELEM.max)
    normal = (_rounded_bits(a.to(tl.int32, bitcast=True), ELEM) >> SHIFT) << SHIFT
    subnormal = ((a + MAGIC) - MAGIC).to(tl.int32, bitcast=True)
    y = tl.where(a < SMALLEST_NORMAL, subnormal, normal)
    if ELEM.signed:
        sign = x.to(tl.int32, bitcast=True) & -2147483648
        if ELEM.special == "fnuz":
            sign = tl.where(y == 0, 0, sign)
        y = y | sign
    return y.to(tl.float32, bitcast=True)


@triton.jit
def decode(code, zero, ELEM: tl.constexpr):
    MAGNITUDE: tl.constexpr = (1 << (ELEM.ebits + ELEM.mbits)) - 1
    code = code.to(tl.int32)
    magnitude = code & MAGNITUDE
    # As fp32 bits the exponent field is too small by 127 - bias; subnormals follow the same rule.
    value = (magnitude << (23 - ELEM.mbits)).to(tl.float32, bitcast=True)
    if ELEM.bias != 127:
        value = value * (2.0 ** (127 - ELEM.bias))
    if ELEM.special == "ieee":
        TOP: tl.constexpr = ((1 << ELEM.ebits) - 1) << ELEM.mbits
        special = 0x7F800000 | ((magnitude - TOP) << (23 - ELEM.mbits))
        value = tl.where(magnitude >= TOP, special.to(tl.float32, bitcast=True), value)
    if ELEM.special == "fn":
        value = tl.where(magnitude == MAGNITUDE, float("nan"), value)
    if ELEM.signed:
        sign = (code << (32 - ELEM.bits)) & -2147483648
        value = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    if ELEM.special == "fnuz":
        value = tl.where(code == ELEM.nan_code, float("nan"), value)
    return value


@triton.jit
def clipped(x, zero, ELEM: tl.constexpr):
    return tl.abs(x) > ELEM.max
