"""Device functions of `scale`: keys that a group is reduced to, the choice of a scale, its storage bits.

A group is reduced by unsigned integer maxima of *keys*, fp32 bits arranged so that a larger key means a larger element.
Infinity and NaN have the largest keys, so the maximum also tells whether the group is finite; and a maximum of integers
does not depend on the order of reduction.

Stored scales are converted by integer arithmetic, not by the hardware: with Triton 3.6, e4m3 scales that went through a
hardware conversion and back inside the NVFP4 QDQ kernel came out wrong on sm_90.
"""

import triton
import triton.language as tl

from tritonq.codecs import minifloat_triton as minifloat


@triton.jit
def _ordered(x):
    """fp32 to uint32 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _unordered(key):
    bits = key.to(tl.int32, bitcast=True)
    return bits ^ (((bits ^ -1) >> 31) | -2147483648)


@triton.jit
def high_key(x, FMT: tl.constexpr):
    """Key of the largest element (minmax) or of the largest magnitude; bit 0 then says that it is positive."""
    if FMT.scale.rule == "minmax":
        key = _ordered(x)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        key = bits << 1
        if FMT.scale.rule == "full_range":
            key = key | ((bits >> 31) ^ 1)
    return key


@triton.jit
def low_key(x):
    """Key of the smallest element; only minmax needs it."""
    return _ordered(x) ^ 0xFFFFFFFF


@triton.jit
def _over_constant(a, DIVISOR: tl.constexpr):
    return tl.div_rn(a, tl.full(a.shape, DIVISOR, tl.float32))


@triton.jit
def _over_constant_coarse(a, DIVISOR: tl.constexpr):
    """a / DIVISOR, correctly rounded where it is at least 2^-70 (see `quotient`); DIVISOR has at most 12 significant
    bits."""
    INVERSE: tl.constexpr = 1.0 / DIVISOR
    inverse = tl.full(a.shape, INVERSE, tl.float32)
    q = tl.minimum(a * inverse, 3.4028234663852886e38)
    return tl.fma(tl.fma(-q, tl.full(a.shape, DIVISOR, tl.float32), a), inverse, q)


@triton.jit
def _over_scalar(a, divisor):
    """a / divisor, correctly rounded, for a between 2^-20 and 2^20 (see `quotient`): cheap unless it could
    underflow."""
    if (divisor > 2.0**-60) & (divisor < 2.0**60):
        b = tl.zeros_like(a) + divisor
        inverse = tl.zeros_like(a) + tl.div_rn(1.0, divisor)
        q = tl.fma(a, inverse, a * (tl.fma(-inverse, b, tl.zeros_like(a) + 1.0) * inverse))
        result = tl.fma(tl.fma(-q, b, a), inverse, q)
    else:
        result = tl.div_rn(a, tl.zeros_like(a) + divisor)
    return result


@triton.jit
def _exponent_bits(amax, FMT: tl.constexpr):
    ELEM: tl.constexpr = FMT.element
    RULE: tl.constexpr = FMT.scale.rule
    bits = amax.to(tl.int32, bitcast=True)
    if RULE == "even":
        bits = bits + (1 << (22 - ELEM.mbits))
    exponent = bits >> 23
    mantissa = bits & 0x7FFFFF
    if RULE == "ceil":
        exponent += tl.where(exponent == 0, mantissa > 0x400000, mantissa > 0).to(tl.int32)
    if RULE == "rceil":
        exponent += (mantissa > ELEM.max_mantissa).to(tl.int32)
    return tl.minimum(tl.maximum(exponent - ELEM.emax, 0), 254)


@triton.jit
def _store_bits(raw, bad, FMT: tl.constexpr):
    """fp32 to storage bits (int32): rounded, saturated, never zero, NaN where `bad`."""
    if FMT.scale.element is None:
        raw = tl.minimum(tl.maximum(raw, -FMT.scale.max), FMT.scale.max)
        bits = raw.to(tl.int32, bitcast=True)
        bits = tl.where((bits & 0x7FFFFFFF) == 0, 1, bits)
        bits = tl.where(bad, 0x7FC00000, bits)
    else:
        TYPE: tl.constexpr = FMT.scale.element
        bits = minifloat.encode_bits(raw, TYPE)
        bits = tl.where((bits & ((1 << (TYPE.ebits + TYPE.mbits)) - 1)) == 0, 1, bits)
        bits = tl.where(bad, TYPE.nan_code, bits)
    return bits


@triton.jit
def load(bits, tensor_scale, FMT: tl.constexpr):
    """Storage bits (any integer type) to the fp32 factor of dequantization."""
    if FMT.scale.is_exponent:
        bits = bits.to(tl.int32)
        value = tl.where(bits == 0, 0x400000, bits << 23)  # 2^-127 is subnormal
        value = tl.where(bits == 0xFF, 0x7FC00000, value).to(tl.float32, bitcast=True)
    elif FMT.scale.element is None:
        value = bits.to(tl.int32).to(tl.float32, bitcast=True)
    else:
        TYPE: tl.constexpr = FMT.scale.element
        value = minifloat.decode_bits(bits, TYPE)
        if FMT.tensor_scale:
            value = _over_scalar(value, tensor_scale)
    return value


@triton.jit
def choose(high, low, tensor_scale, FMT: tl.constexpr):
    """Maximal keys of groups to (storage bits int32, fp32 factor, fp32 zero point)."""
    ELEM: tl.constexpr = FMT.element
    RULE: tl.constexpr = FMT.scale.rule
    zero = tl.zeros_like(high).to(tl.float32) + ELEM.zero_code
    if RULE == "minmax":
        high_bits, low_bits = _unordered(high), _unordered(low ^ 0xFFFFFFFF)
        bad = ((high_bits & 0x7FFFFFFF) >= 0x7F800000) | ((low_bits & 0x7FFFFFFF) >= 0x7F800000)
        hi = tl.maximum(tl.where(bad, 0, high_bits).to(tl.float32, bitcast=True), 0.0)
        lo = tl.minimum(tl.where(bad, 0, low_bits).to(tl.float32, bitcast=True), 0.0)
        LEVELS: tl.constexpr = (1 << ELEM.bits) - 1
        bits = _store_bits(_over_constant(hi - lo, LEVELS), bad, FMT)
        factor = load(bits, tensor_scale, FMT)
        zero = tl.minimum(tl.div_rn(0.0 - lo, factor), LEVELS)  # >= 0, so only the upper bound can be passed
        zero = tl.where(bad, 0.0, (zero + 12582912.0) - 12582912.0)
    else:
        bad = high >= 0xFF000000
        amax = (tl.where(bad, 0, high) >> 1).to(tl.float32, bitcast=True)
        if FMT.scale.is_exponent:
            bits = tl.where(bad, 0xFF, _exponent_bits(amax, FMT))
        else:
            if RULE == "full_range":
                raw = tl.where((high & 1) == 1, 0.0 - amax, amax) * (1.0 / (1 << (ELEM.bits - 1)))  # a power of two
            elif RULE == "half_range":
                raw = _over_constant(amax, ((1 << ELEM.bits) - 1) / 2)
            else:
                if FMT.tensor_scale:  # stored with a smallest number far above 2^-70
                    raw = _over_constant_coarse(amax * tensor_scale, ELEM.max)
                else:
                    raw = _over_constant(amax, ELEM.max)
            bits = _store_bits(raw, bad, FMT)
        factor = load(bits, tensor_scale, FMT)
    return bits, factor, zero


@triton.jit
def divide(x, factor):
    """x / factor for any factor, NaN replaced by 0."""
    y = tl.div_rn(x, tl.broadcast_to(factor, x.shape))
    return tl.where(y == y, y, 0.0)


@triton.jit
def reciprocal(factor, FMT: tl.constexpr):
    """(shift, divisor, inverse, below, correction) with which `quotient` divides by a factor that `choose` returned.

    shift is a power of two and divisor = factor * shift, in [2^-23, 4), so nothing below over- or underflows where it
    matters. inverse is 1 / divisor rounded. below + correction is 1 / divisor to within 2^-46 of itself, with a
    correction that is not negative.
    """
    bits = factor.to(tl.int32, bitcast=True)
    if FMT.scale.is_exponent:  # the reciprocal of a power of two is one, and exact
        exact = tl.where(bits == 0x7F000000, 0x400000, 0x7F000000 - bits)
        exact = tl.where(bits == 0x400000, 0x7F000000, exact).to(tl.float32, bitcast=True)
        return exact, exact, exact, exact, exact
    exponent = (bits >> 23) & 0xFF
    shift = (tl.maximum(253 - exponent, 1) << 23).to(tl.float32, bitcast=True)
    divisor = factor * shift
    one = tl.full(factor.shape, 1.0, tl.float32)
    inverse = tl.div_rn(one, divisor)
    above = tl.fma(-inverse, divisor, one) < 0.0
    below = inverse.to(tl.int32, bitcast=True) - above.to(tl.int32)
    below = below.to(tl.float32, bitcast=True)
    return shift, divisor, inverse, below, tl.fma(-below, divisor, one) * below


@triton.jit
def quotient(x, shift, divisor, inverse, below, correction, FMT: tl.constexpr):
    """x / factor, correctly rounded, in four or five operations instead of a division's dozen.

    Markstein: with q a faithful rounding of a / b and y the correctly rounded 1 / b, fma(fma(-q, b, a), y, q) is the
    correctly rounded a / b, because a - b q is exact. x * inverse alone can be 1.5 units off, which `correction` mends;
    where the divisor has at most 12 significant bits a - b q is exact all the same, and a / b keeps 2^-36 from the
    midpoints of fp32, so the correction can go. -0 stays -0: no sum below adds zeros of different sign to it.
    """
    a = x * shift
    if FMT.scale.is_exponent:
        return a
    q = a * inverse
    if FMT.scale.element is None or FMT.tensor_scale:
        q = tl.fma(a, below, a * correction)
    # Times -1, not unary minus: that is 0 - x in Triton 3.6, which turns 0 into 0 instead of -0.
    return tl.fma(tl.fma(q, divisor, a * -1.0) * -1.0, inverse, q)
