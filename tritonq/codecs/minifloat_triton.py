"""Device functions of `minifloat`; see `tritonq.codecs` for what each one does.

Integer arithmetic on fp32 bits, on every target alike. The two fp8 types that NVIDIA converts in hardware from sm_89 on
take that conversion instead: round to nearest even, saturating, subnormals and the sign of zero kept, so the same
codes.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from tritonq.codecs import philox_triton as philox


@triton.constexpr_function
def _hardware(element):
    """The Triton type with the codes of `element` that this target converts to, or None."""
    if not cuda_capability_geq(8, 9):
        return None
    kind = (element.ebits, element.mbits, element.special, element.signed)
    return {(4, 3, "fn", True): tl.float8e4nv, (5, 2, "ieee", True): tl.float8e5}.get(kind)


@triton.jit
def _bounded(x, finite, ELEM: tl.constexpr):
    """x within the range of the codes, 0 where not `finite` (None: everywhere), even if x is NaN."""
    low: tl.constexpr = -ELEM.max if ELEM.signed else 0.0
    if finite is None:
        return tl.minimum(tl.maximum(x, low), ELEM.max)
    else:
        return tl.minimum(tl.maximum(x, tl.where(finite, low, 0.0)), tl.where(finite, ELEM.max, 0.0))


@triton.jit
def _magnitude(x, finite, ELEM: tl.constexpr):
    """|x|, or x where codes have no sign, within the range of the codes; 0 as `_bounded` says."""
    if not ELEM.signed:
        return _bounded(x, finite, ELEM)
    elif finite is None:
        return tl.minimum(tl.abs(x), ELEM.max)
    else:
        return tl.minimum(tl.abs(x), tl.where(finite, ELEM.max, 0.0))


@triton.jit
def _exponent(a, ELEM: tl.constexpr):
    """Exponent field of a, at least that of the smallest normal number of ELEM: 2^e as fp32 bits."""
    return tl.maximum(a.to(tl.int32, bitcast=True) & 0x7F800000, (128 - ELEM.bias) << 23)


@triton.jit
def _steps(a, exponent, OFFSET: tl.constexpr, ELEM: tl.constexpr):
    """a + 1.5 * 2^(e + 23 - M): the sum is rounded to multiples of 2^(e - M), half to even, and counts them in its low
    22 bits, from an even OFFSET on. The product is exact."""
    MAGIC: tl.constexpr = (1.5 * 2**23 + OFFSET) * 2.0**-ELEM.mbits
    return tl.fma(exponent.to(tl.float32, bitcast=True), MAGIC, a)


@triton.jit
def _powers(a, ELEM: tl.constexpr):
    """Code of a >= 0 where there is no mantissa: neighbouring powers of two have codes of alternating parity."""
    bits = a.to(tl.int32, bitcast=True)
    normal = ((bits + 0x3FFFFF + (((bits >> 23) + ELEM.bias + 1) & 1)) >> 23) - (127 - ELEM.bias)
    small = (a > 2.0**-ELEM.bias).to(tl.int32)  # the midpoint of 0 and the smallest number is a tie, and 0 is even
    return tl.where(a < 2.0 ** (1 - ELEM.bias), small, normal)


@triton.jit
def magnitude_code(a, ELEM: tl.constexpr):
    """Code of 0 <= a <= max, without its sign."""
    if ELEM.mbits == 0:
        code = _powers(a, ELEM)
    elif ELEM.bias == 127:  # bf16: the upper half of fp32 bits, rounded
        bits = a.to(tl.int32, bitcast=True)
        SHIFT: tl.constexpr = 23 - ELEM.mbits
        code = (bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)) >> SHIFT
    else:
        exponent = _exponent(a, ELEM)
        OFFSET: tl.constexpr = -((128 - ELEM.bias) << ELEM.mbits)
        steps = _steps(a, exponent, OFFSET, ELEM).to(tl.int32, bitcast=True)
        # The low 22 bits are the code. Where codes fill bytes, the compiler does without the mask of a byte.
        KEPT: tl.constexpr = 8 if 8 % ELEM.bits == 0 else ELEM.ebits + ELEM.mbits
        code = (steps + (exponent >> (23 - ELEM.mbits))) & ((1 << KEPT) - 1)
    return code


@triton.jit
def magnitude_value(a, ELEM: tl.constexpr):
    """0 <= a <= max rounded to a number of ELEM."""
    if ELEM.mbits == 0:
        return decode_bits(_powers(a, ELEM), ELEM)
    elif ELEM.bias == 127:
        return (magnitude_code(a, ELEM) << (23 - ELEM.mbits)).to(tl.float32, bitcast=True)
    else:
        exponent = _exponent(a, ELEM)
        power = exponent.to(tl.float32, bitcast=True)
        return tl.fma(power, -1.5 * 2.0 ** (23 - ELEM.mbits), _steps(a, exponent, 0, ELEM))


@triton.jit
def encode(x, zero, finite, ELEM: tl.constexpr):
    HARDWARE: tl.constexpr = _hardware(ELEM)
    if HARDWARE is not None:
        return _bounded(x, finite, ELEM).to(HARDWARE).to(tl.uint8, bitcast=True).to(tl.int32)
    code = magnitude_code(_magnitude(x, finite, ELEM), ELEM)
    if ELEM.signed:
        SIGN: tl.constexpr = 1 << (ELEM.bits - 1)
        sign = x.to(tl.int32, bitcast=True) >> (32 - ELEM.bits)
        if finite is None:
            sign = sign & SIGN
        else:
            sign = sign & tl.where(finite, SIGN, 0)
        if ELEM.special == "fnuz":
            sign = sign & (code + (SIGN - 1))  # none for 0
        code = code | sign
    return code


@triton.jit
def decode(code, zero, ELEM: tl.constexpr):
    HARDWARE: tl.constexpr = _hardware(ELEM)
    if HARDWARE is not None:
        return code.to(tl.uint8).to(HARDWARE, bitcast=True).to(tl.float32)
    return decode_bits(code, ELEM)


@triton.jit
def round(x, zero, ELEM: tl.constexpr):
    HARDWARE: tl.constexpr = _hardware(ELEM)
    if HARDWARE is not None:
        return _bounded(x, None, ELEM).to(HARDWARE).to(tl.float32)
    y = magnitude_value(_magnitude(x, None, ELEM), ELEM).to(tl.int32, bitcast=True)
    if ELEM.signed:
        sign = x.to(tl.int32, bitcast=True) & -2147483648
        if ELEM.special == "fnuz":
            sign = sign & (y + 0x7FFFFFFF)  # none for 0
        y = y | sign
    return y.to(tl.float32, bitcast=True)


@triton.jit
def round_product(x, factor, zero, ELEM: tl.constexpr):
    return round(x * factor, zero, ELEM)


@triton.jit
def stochastic(x, u, zero, ELEM: tl.constexpr):
    x = _bounded(x, None, ELEM)
    exponent = _exponent(x, ELEM)
    power = exponent.to(tl.float32, bitcast=True)
    nearest = tl.fma(power, -1.5 * 2.0 ** (23 - ELEM.mbits), _steps(x, exponent, 0, ELEM))
    y = philox.decide(x, nearest, power * 2.0**-ELEM.mbits, u)
    if ELEM.signed:  # y has the sign of x unless it is 0
        y = (y.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & -2147483648)).to(tl.float32, bitcast=True)
    return y


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
