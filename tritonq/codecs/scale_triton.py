"""Device functions of `scale`: keys that a group is reduced to, the choice of a scale, its storage bits.

A group is reduced by unsigned integer maxima of *keys*, fp32 bits arranged so that a larger key means a larger element.
Infinity and NaN have the largest keys, so the maximum also tells whether the group is finite; and a maximum of integers
does not depend on the order of reduction.
"""

import triton
import triton.language as tl


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
def _exponent_bits(amax, FMT: tl.constexpr):
    ELEM: tl.constexpr = FMT.element
    RULE: tl.constexpr = FMT.scale.rule
    if RULE == "rceil":
        amax = tl.div_rn(amax, tl.full(amax.shape, ELEM.max, tl.float32))
    bits = amax.to(tl.int32, bitcast=True)
    if RULE == "even":
        bits = bits + (1 << (22 - ELEM.mbits))
    exponent = bits >> 23
    if RULE == "ceil" or RULE == "rceil":
        mantissa = bits & 0x7FFFFF
        exponent += tl.where(exponent == 0, mantissa > 0x400000, mantissa > 0).to(tl.int32)
    if RULE != "rceil":
        exponent -= ELEM.emax
    return tl.minimum(tl.maximum(exponent, 0), 254)


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
        bits = TYPE.codec.encode(raw, 0, TYPE)
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
        value = TYPE.codec.decode(bits, 0, TYPE)
        if FMT.tensor_scale:
            value = tl.div_rn(value, tl.zeros_like(value) + tensor_scale)
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
        bits = _store_bits(tl.div_rn(hi - lo, tl.full(hi.shape, LEVELS, tl.float32)), bad, FMT)
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
                raw = tl.div_rn(amax, tl.full(amax.shape, ((1 << ELEM.bits) - 1) / 2, tl.float32))
            else:
                if FMT.tensor_scale:
                    amax = amax * tensor_scale
                raw = tl.div_rn(amax, tl.full(amax.shape, ELEM.max, tl.float32))
            bits = _store_bits(raw, bad, FMT)
        factor = load(bits, tensor_scale, FMT)
    return bits, factor, zero


@triton.jit
def divide(x, factor, FMT: tl.constexpr):
    """x / factor, NaN replaced by 0. A power of two has an exact reciprocal, and multiplying by it rounds the same."""
    if FMT.scale.is_exponent:
        bits = 0x7F000000 - factor.to(tl.int32, bitcast=True)  # 2^k to 2^-k
        bits = tl.where(factor == 2.0**127, 0x400000, bits)
        bits = tl.where(factor == 2.0**-127, 0x7F000000, bits)
        bits = tl.where(factor == factor, bits, 0x7FC00000)
        y = x * bits.to(tl.float32, bitcast=True)
    else:
        y = tl.div_rn(x, tl.broadcast_to(factor, x.shape))
    return tl.where(y == y, y, 0.0)
