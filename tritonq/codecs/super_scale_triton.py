"""Device functions of `super_scale`: scales of groups to integers and super-scales, and back."""

import triton
import triton.language as tl

from tritonq.codecs import minifloat_triton as minifloat
from tritonq.codecs import scale_triton as scales


@triton.jit
def over_groups(per_super, M: tl.constexpr, SUPERS: tl.constexpr, GROUPS: tl.constexpr):
    """[M, SUPERS] to [M, GROUPS]."""
    return tl.broadcast_to(per_super[:, :, None], [M, SUPERS, GROUPS // SUPERS]).reshape([M, GROUPS])


@triton.jit
def _integers(
    raw, super_bad, LEAST: tl.constexpr, M: tl.constexpr, SUPERS: tl.constexpr, GROUPS: tl.constexpr, FMT: tl.constexpr
):
    """fp32 scales or minima [M, GROUPS], 0 in groups that are not finite, to (integers fp32 [M, GROUPS], storage bits
    of super-scales int32 [M, SUPERS], products [M, GROUPS]); LEAST takes the place of an integer 0."""
    LOW: tl.constexpr = FMT.scale.low
    HIGH: tl.constexpr = FMT.scale.high
    groups = raw.reshape([M, SUPERS, GROUPS // SUPERS])
    largest = tl.max(groups, 2)
    if LOW < 0:
        negative = tl.max(0.0 - groups, 2)
        largest = tl.where(largest >= negative, 0.0 - largest, negative) * (-1.0 / LOW)  # a power of two
    else:
        largest = scales.over_constant_coarse(largest, HIGH)  # below 2^-70 an f16 number is the smallest one
    TYPE: tl.constexpr = FMT.super_scale.element
    SIGNED: tl.constexpr = LOW < 0
    bits, value = scales.store_minifloat(largest, super_bad, TYPE, SIGNED)
    value = over_groups(value, M, SUPERS, GROUPS)
    integer = tl.minimum(tl.maximum(tl.div_rn(raw, value), LOW), HIGH)
    integer = (integer + 12582912.0) - 12582912.0
    integer = tl.where(integer == 0.0, LEAST, integer)
    return integer, bits, value * integer


@triton.jit
def choose(high, low, M: tl.constexpr, SUPERS: tl.constexpr, GROUPS: tl.constexpr, FMT: tl.constexpr):
    """Maximal keys of groups [M, GROUPS] to (scale, minimum) fp32 integers, (super_scale, super_minimum) storage bits
    [M, SUPERS], (factor, offset) fp32, and whether the super-group of a group has a non-finite element.

    The factors of such a super-group are any numbers. Without minima those are zeros.
    """
    positive, negative = scales.magnitudes(high, low, FMT)
    bad = tl.maximum(positive, negative) >= 0x7F800000
    positive, negative = tl.where(bad, 0, positive), tl.where(bad, 0, negative)
    super_bad = tl.max(bad.to(tl.int32).reshape([M, SUPERS, GROUPS // SUPERS]), 2)
    bad = over_groups(super_bad, M, SUPERS, GROUPS) != 0
    super_bad = super_bad != 0
    scale, super_scale, factor = _integers(
        scales.raw(positive, negative, 1.0, FMT), super_bad, 1.0, M, SUPERS, GROUPS, FMT
    )
    if FMT.minimum:
        lowest = negative.to(tl.float32, bitcast=True)
        minimum, super_minimum, offset = _integers(lowest, super_bad, 0.0, M, SUPERS, GROUPS, FMT)
    else:
        minimum, super_minimum, offset = tl.zeros_like(scale), super_scale, tl.zeros_like(factor)
    return (
        tl.where(bad, 0.0, scale), tl.where(bad, 0.0, minimum), super_scale, super_minimum, factor, offset, bad
    )  # fmt: skip


@triton.jit
def load(integer, bits, FMT: tl.constexpr):
    """Stored integers (a byte each) and the bits of their super-scales, of one shape, to fp32 products."""
    if FMT.scale.low < 0:
        integer = (integer.to(tl.int32) << 24) >> 24
    else:
        integer = integer.to(tl.int32)
    TYPE: tl.constexpr = FMT.super_scale.element
    return minifloat.decode_bits(bits, TYPE) * integer.to(tl.float32)
