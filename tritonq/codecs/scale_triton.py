"""Device functions of `scale`: keys that a group is reduced to, the choice of a scale, its storage bits.

A group is reduced by integer maxima of its fp32 bits: `keys`. Infinity and NaN have the largest bits, so the maxima
also tell whether the group is finite; and a maximum of integers does not depend on the order of reduction.

Stored scales are converted by integer arithmetic, not by the hardware: with Triton 3.6, e4m3 scales that went through a
hardware conversion and back inside the NVFP4 QDQ kernel came out wrong on sm_90.
"""

import triton
import triton.language as tl

from tritonq.codecs import minifloat_triton as minifloat


@triton.constexpr_function
def key_type(fmt):
    """Type of the first of `keys`."""
    return tl.int32 if fmt.scale.signed_range else tl.uint32


@triton.jit
def keys(x, FMT: tl.constexpr):
    """What a group is reduced to by two maxima.

    Where the rule looks at magnitudes only, the first is twice the bits of |x| and the second unused. Otherwise they
    are the bits of x read as signed and as unsigned: the maximum of the former is the largest element if any is
    positive, of the latter the smallest if any is negative.
    """
    bits = x.to(tl.int32, bitcast=True)
    if FMT.scale.signed_range:
        return bits, bits.to(tl.uint32, bitcast=True)
    else:  # NVIDIA GPUs shift on the pipe of multiplications, which has less to do than that of logic
        return (bits << 1).to(tl.uint32, bitcast=True), tl.full([1], 0, tl.uint32)


@triton.jit
def magnitudes(high, low, FMT: tl.constexpr):
    """Maximal keys to the bits of max(x, 0) and max(-x, 0) over the group; or of max |x|, twice."""
    if FMT.scale.signed_range:
        # In unsigned numbers: ptxas 12.8 takes a signed minimum of 0 and max.u32(x, 0), which all but one element of a
        # group known to be 0 leave, to be 0.
        smallest = tl.maximum(low, 0x80000000) - 0x80000000
        return tl.maximum(high, 0), smallest.to(tl.int32, bitcast=True)
    else:
        largest = (high >> 1).to(tl.int32, bitcast=True)
        return largest, largest


@triton.jit
def over_constant(a, DIVISOR: tl.constexpr):
    return tl.div_rn(a, tl.full(a.shape, DIVISOR, tl.float32))


@triton.jit
def over_constant_coarse(a, DIVISOR: tl.constexpr):
    """a / DIVISOR, correctly rounded where it is at least 2^-70 (see `quotient`), NaN for infinity; DIVISOR has at most
    12 significant bits."""
    INVERSE: tl.constexpr = 1.0 / DIVISOR
    inverse = tl.full(a.shape, INVERSE, tl.float32)
    q = a * inverse
    return tl.fma(tl.fma(-q, tl.full(a.shape, DIVISOR, tl.float32), a), inverse, q)


@triton.jit
def divides_fast(tensor_scale):
    """Whether every factor there can be with this tensor scale is MODERATE for `quotient`."""
    return (tensor_scale > 2.0**-60) & (tensor_scale < 2.0**60)


@triton.jit
def _over_scalar(a, divisor):
    """a / divisor, correctly rounded, for a between 2^-20 and 2^20 (see `quotient`): cheap unless it could
    underflow."""
    if divides_fast(divisor):
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
def store(raw, bad, FMT: tl.constexpr):
    """fp32 to (storage bits int32, their value fp32): rounded, saturated, never zero. The bits are those of NaN where
    `bad`, the value is then any number."""
    if FMT.scale.element is None:
        value = tl.minimum(tl.maximum(raw, -FMT.scale.max), FMT.scale.max)
        bits = value.to(tl.int32, bitcast=True)
        bits = tl.where((bits & 0x7FFFFFFF) == 0, 1, bits)
        value = bits.to(tl.float32, bitcast=True)
        bits = tl.where(bad, 0x7FC00000, bits)
    else:
        TYPE: tl.constexpr = FMT.scale.element
        SIGNED: tl.constexpr = FMT.scale.rule == "full_range"
        bits, value = store_minifloat(raw, bad, TYPE, SIGNED)
    return bits, value


@triton.jit
def store_minifloat(raw, bad, TYPE: tl.constexpr, SIGNED: tl.constexpr):
    """`store` of a float type; SIGNED: scales can be negative (rule full_range), and what rounds to zero becomes
    positive."""
    raw_bits = tl.minimum(tl.abs(raw), TYPE.max).to(tl.int32, bitcast=True)
    magnitude = tl.maximum(raw_bits, TYPE.smallest_bits).to(tl.float32, bitcast=True)
    bits = minifloat.magnitude_code(magnitude, TYPE)
    value = minifloat.magnitude_value(magnitude, TYPE)
    if SIGNED:
        HALF: tl.constexpr = TYPE.half_smallest_bits
        negative = (raw < 0.0) & (raw_bits > HALF)
        value = tl.where(negative, 0.0 - value, value)
        bits = tl.where(negative, bits | (1 << (TYPE.bits - 1)), bits)
    return tl.where(bad, TYPE.nan_code, bits), value


@triton.jit
def value(bits, FMT: tl.constexpr):
    """Storage bits (any integer type) to the fp32 number they stand for."""
    if FMT.scale.is_exponent:
        bits = bits.to(tl.int32)
        number = tl.where(bits == 0, 0x400000, bits << 23)  # 2^-127 is subnormal
        return tl.where(bits == 0xFF, 0x7FC00000, number).to(tl.float32, bitcast=True)
    elif FMT.scale.element is None:
        return bits.to(tl.int32).to(tl.float32, bitcast=True)
    else:
        TYPE: tl.constexpr = FMT.scale.element
        return minifloat.decode_bits(bits, TYPE)


@triton.jit
def over_tensor_scale(number, tensor_scale, FMT: tl.constexpr):
    """The fp32 factor of dequantization that a scale is."""
    if FMT.tensor_scale:
        return _over_scalar(number, tensor_scale)
    else:
        return number


@triton.jit
def load(bits, tensor_scale, FMT: tl.constexpr):
    """Storage bits (any integer type) to the fp32 factor of dequantization."""
    return over_tensor_scale(value(bits, FMT), tensor_scale, FMT)


@triton.jit
def raw(positive, negative, tensor_scale, FMT: tl.constexpr):
    """What `magnitudes` gives to fp32 scales before they are rounded, of floating and integer scale types."""
    ELEM: tl.constexpr = FMT.element
    RULE: tl.constexpr = FMT.scale.rule
    amax = tl.maximum(positive, negative).to(tl.float32, bitcast=True)
    if RULE == "minmax":
        LEVELS: tl.constexpr = (1 << ELEM.bits) - 1
        high, low = positive.to(tl.float32, bitcast=True), negative.to(tl.float32, bitcast=True)
        if FMT.super_group:  # whatever is too large or small for an integer times an f16 number may be inexact
            return over_constant_coarse(tl.minimum(high + low, 3.4028234663852886e38), LEVELS)
        else:
            return over_constant(high + low, LEVELS)
    elif RULE == "full_range":
        return tl.where(positive >= negative, 0.0 - amax, amax) * (1.0 / (1 << (ELEM.bits - 1)))  # a power of two
    elif RULE == "half_range":
        return over_constant(amax, ((1 << ELEM.bits) - 1) / 2)
    elif FMT.tensor_scale:  # stored with a smallest number far above 2^-70
        return over_constant_coarse(amax * tensor_scale, ELEM.max)
    else:
        return over_constant(amax, ELEM.max)


@triton.jit
def choose(high, low, tensor_scale, FMT: tl.constexpr):
    """Maximal keys of groups to (storage bits int32, fp32 factor, fp32 zero point, whether an element is not finite).
    The factor of a group with such an element is any number; its storage bits are those of NaN."""
    ELEM: tl.constexpr = FMT.element
    positive, negative = magnitudes(high, low, FMT)
    largest = tl.maximum(positive, negative)
    bad = largest >= 0x7F800000
    amax = largest.to(tl.float32, bitcast=True)
    zero = tl.zeros_like(amax) + ELEM.zero_code
    if FMT.scale.rule == "minmax":
        LEVELS: tl.constexpr = (1 << ELEM.bits) - 1
        bits, factor = store(raw(positive, negative, tensor_scale, FMT), bad, FMT)
        zero = tl.minimum(tl.div_rn(negative.to(tl.float32, bitcast=True), factor), LEVELS)  # >= 0, so not too small
        zero = tl.where(bad, 0.0, (zero + 12582912.0) - 12582912.0)
    elif FMT.scale.is_exponent:
        bits = _exponent_bits(amax, FMT)
        factor = tl.where(bits == 0, 0x400000, bits << 23).to(tl.float32, bitcast=True)  # 2^-127 is subnormal
        bits = tl.where(bad, 0xFF, bits)
    else:
        bits, factor = store(raw(positive, negative, tensor_scale, FMT), bad, FMT)
        if FMT.tensor_scale:
            factor = _over_scalar(factor, tensor_scale)
    return bits, factor, zero, bad


@triton.jit
def divide(x, factor):
    """x / factor for any factor, NaN replaced by 0."""
    y = tl.div_rn(x, tl.broadcast_to(factor, x.shape))
    return tl.where(y == y, y, 0.0)


@triton.jit
def _rounded_reciprocal(b, SIGNED: tl.constexpr):
    """1 / b, correctly rounded, for |b| between 2^-80 and 2^80: two Newton steps from an approximation good to 2^-20,
    which fail only where the significand of b is all ones; the reciprocal then ends in a one."""
    one = tl.full(b.shape, 1.0, tl.float32)
    y = b
    if SIGNED:
        y = tl.abs(b)
    y = tl.rsqrt(y)
    if SIGNED:
        y = y * tl.where(b < 0.0, 0.0 - y, y)
    else:
        y = y * y
    y = tl.fma(tl.fma(-y, b, one), y, y)
    y = tl.fma(tl.fma(-y, b, one), y, y).to(tl.int32, bitcast=True)
    ones = ((b.to(tl.int32, bitcast=True) + 1) & 0x7FFFFF) == 0
    return tl.where(ones, y | 1, y).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(factor, MODERATE: tl.constexpr, FMT: tl.constexpr):
    """(shift, divisor, inverse, below, correction) with which `quotient` divides by a factor that `choose` returned.

    shift is a power of two and divisor = factor * shift, in [2^-23, 4), so nothing below over- or underflows where it
    matters; a MODERATE factor, between 2^-80 and 2^80, is the divisor itself. inverse is 1 / divisor rounded. below +
    correction is 1 / divisor to within 2^-43 of itself, with a correction that is not negative.
    """
    bits = factor.to(tl.int32, bitcast=True)
    if FMT.scale.is_exponent:  # the reciprocal of a power of two is one, and exact
        exact = tl.where(bits == 0x7F000000, 0x400000, 0x7F000000 - bits)
        exact = tl.where(bits == 0x400000, 0x7F000000, exact).to(tl.float32, bitcast=True)
        return exact, exact, exact, exact, exact
    if MODERATE:
        shift, divisor = tl.full(factor.shape, 1.0, tl.float32), factor
    else:
        exponent = (bits >> 23) & 0xFF
        shift = (tl.maximum(253 - exponent, 1) << 23).to(tl.float32, bitcast=True)
        divisor = factor * shift
    inverse = _rounded_reciprocal(divisor, FMT.scale.rule == "full_range")
    below = (inverse.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)  # of smaller magnitude
    return shift, divisor, inverse, below, tl.fma(-below, divisor, tl.full(factor.shape, 1.0, tl.float32)) * below


@triton.jit
def quotient(x, shift, divisor, inverse, below, correction, MODERATE: tl.constexpr, FMT: tl.constexpr):
    """x / factor, correctly rounded, in four or five operations instead of a division's dozen.

    Markstein: with q a faithful rounding of a / b and y the correctly rounded 1 / b, fma(fma(-q, b, a), y, q) is the
    correctly rounded a / b, because a - b q is exact. x * inverse alone can be 1.5 units off, which `correction` mends;
    where the divisor has at most 12 significant bits a - b q is exact all the same, and a / b keeps 2^-36 from the
    midpoints of fp32, so the correction can go. -0 stays -0: no sum below adds zeros of different sign to it.
    """
    a = x
    if not MODERATE:
        a = x * shift
    if FMT.scale.is_exponent:
        return a
    if FMT.scale.element is None or FMT.tensor_scale:
        q = tl.fma(a, below, a * correction)
    else:
        q = a * inverse
    # Times -1, not unary minus: that is 0 - x in Triton 3.6, which turns 0 into 0 instead of -0.
    return tl.fma(tl.fma(q, divisor, a * -1.0) * -1.0, inverse, q)
