"""Device functions of `minifloat`; see `tritonq.codecs` for what each one does.

Integer arithmetic on fp32 bits, on every target alike. The two fp8 types that NVIDIA converts in hardware from sm_89 on
take that conversion instead: round to nearest even, saturating, subnormals and the sign of zero kept, so the same
codes.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq


@triton.constexpr_function
def _hardware(element):
    """The Triton type with the codes of `element` that this target converts to, or None."""
    if not cuda_capability_geq(8, 9):
        return None
    kind = (element.ebits, element.mbits, element.special, element.signed)
    return {(4, 3, "fn", True): tl.float8e4nv, (5, 2, "ieee", True): tl.float8e5}.get(kind)


@triton.jit
def _magnitude(x, ELEM: tl.constexpr):
    if ELEM.signed:
        return tl.minimum(tl.abs(x), ELEM.max)
    else:
        return tl.minimum(tl.maximum(x, 0.0), ELEM.max)


@triton.jit
def _exponent(a, ELEM: tl.constexpr):
    """Exponent field of a, at least that of the smallest normal number of ELEM."""
    return tl.maximum(a.to(tl.int32, bitcast=True) & 0x7F800000, (128 - ELEM.bias) << 23)


@triton.jit
def _magic(exponent, ELEM: tl.constexpr):
    """Bits of 1.5 * 2^(e + 23 - M): a sum with it is rounded to multiples of 2^(e - M), half to even, and counts them
    in its low bits."""
    return exponent + (((23 - ELEM.mbits) << 23) + 0x400000)


@triton.jit
def _powers(a, ELEM: tl.constexpr):
    """Code of a >= 0 where there is no mantissa: neighbouring powers of two have codes of alternating parity."""
    bits = a.to(tl.int32, bitcast=True)
    normal = ((bits + 0x3FFFFF + (((bits >> 23) + ELEM.bias + 1) & 1)) >> 23) - (127 - ELEM.bias)
    small = (a > 2.0**-ELEM.bias).to(tl.int32)  # the midpoint of 0 and the smallest number is a tie, and 0 is even
    return tl.where(a < 2.0 ** (1 - ELEM.bias), small, normal)


@triton.jit
def encode(x, zero, ELEM: tl.constexpr):
    HARDWARE: tl.constexpr = _hardware(ELEM)
    if HARDWARE is not None:
        x = tl.minimum(tl.maximum(x, -ELEM.max), ELEM.max)
        return x.to(HARDWARE).to(tl.uint8, bitcast=True).to(tl.int32)
    return encode_bits(x, ELEM)


@triton.jit
def decode(code, zero, ELEM: tl.constexpr):
    HARDWARE: tl.constexpr = _hardware(ELEM)
    if HARDWARE is not None:
        return code.to(tl.uint8).to(HARDWARE, bitcast=True).to(tl.float32)
    return decode_bits(code, ELEM)


@triton.jit
def encode_bits(x, ELEM: tl.constexpr):
    """`encode` by integer arithmetic on every target."""
    a = _magnitude(x, ELEM)
    if ELEM.mbits == 0:
        code = _powers(a, ELEM)
    elif ELEM.bias == 127:  # bf16: the upper half of fp32 bits, rounded
        bits = a.to(tl.int32, bitcast=True)
        SHIFT: tl.constexpr = 23 - ELEM.mbits
        code = (bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)) >> SHIFT
    else:
        exponent = _exponent(a, ELEM)
        magic = _magic(exponent, ELEM)
        steps = (a + magic.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - magic
        code = steps + (exponent >> (23 - ELEM.mbits)) - ((128 - ELEM.bias) << ELEM.mbits)
    if ELEM.signed:
        sign = (x.to(tl.int32, bitcast=True) >> (32 - ELEM.bits)) & (1 << (ELEM.bits - 1))
        if ELEM.special == "fnuz":
            sign = tl.where(code == 0, 0, sign)
        code = code | sign
    return code


@triton.jit
def round(x, zero, ELEM: tl.constexpr):
    HARDWARE: tl.constexpr = _hardware(ELEM)
    if HARDWARE is not None:
        x = tl.minimum(tl.maximum(x, -ELEM.max), ELEM.max)
        return x.to(HARDWARE).to(tl.float32)
    a = _magnitude(x, ELEM)
    if ELEM.mbits == 0:
        y = decode_bits(_powers(a, ELEM), ELEM).to(tl.int32, bitcast=True)
    else:
        magic = _magic(_exponent(a, ELEM), ELEM).to(tl.float32, bitcast=True)
        y = ((a + magic) - magic).to(tl.int32, bitcast=True)
    if ELEM.signed:
        sign = x.to(tl.int32, bitcast=True) & -2147483648
        if ELEM.special == "fnuz":
            sign = tl.where(y == 0, 0, sign)
        y = y | sign
    return y.to(tl.float32, bitcast=True)


@triton.jit
def decode_bits(code, ELEM: tl.constexpr):
    """`decode` by integer arithmetic on every target."""
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
