"""Floats of a few bits, from the definition of a code (OCP MX 1.0 section 5.3; IEEE 754 for "ieee").

value(sign, e, m) = (-1)^sign * 2^(e - bias) * (1 + m / 2^M) for e > 0, and (-1)^sign * 2^(1 - bias) * m / 2^M for e =
0.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from tritonq.codecs import philox
from tritonq.codecs.scratch import buffer

_EXPONENT = 0x7F800000  # the exponent field of an fp32 number


def value(code: int, element: Any) -> float:
    """The number that one code stands for."""
    e_bits, m_bits = element.ebits, element.mbits
    magnitude = code & ((1 << (e_bits + m_bits)) - 1)
    sign = -1.0 if element.signed and code >> (e_bits + m_bits) else 1.0
    exponent, mantissa = magnitude >> m_bits, magnitude & ((1 << m_bits) - 1)
    if element.special == "fnuz":
        if code == element.nan_code:
            return math.nan
    elif element.special == "ieee" and exponent == (1 << e_bits) - 1:
        return math.nan if mantissa else sign * math.inf
    elif element.special == "fn" and magnitude == element.nan_code:
        return math.nan
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - element.bias - m_bits)
    return sign * math.ldexp((1 << m_bits) + mantissa, exponent - element.bias - m_bits)


@functools.cache
def table(element: Any, device: torch.device) -> Tensor:
    """All values by code, fp32."""
    return torch.tensor([value(c, element) for c in range(1 << element.bits)], dtype=torch.float32, device=device)


def round(x: Tensor, zero: Any, element: Any) -> Tensor:
    """Adding and subtracting 1.5 * 2^(e + 23 - M) leaves x on multiples of 2^(e - M), half to even; e is the exponent
    of x, or that of the smallest normal number where x is subnormal."""
    m_bits, bias = element.mbits, element.bias
    x = x.clamp_(-element.max if element.signed else 0.0, element.max)
    bits = x.view(torch.int32)
    if m_bits == 0:
        # Neighbouring powers of two have codes of alternating parity, which the sum above does not see.
        half_to_even = (bits >> 23).add_(bias - 127).bitwise_and_(1).add_(0x3FFFFF)
        normal = bits.add(half_to_even).bitwise_and_(~0x7FFFFF).view(torch.float32)
        quantum = 2.0 ** (1 - bias)
        small = x.div(quantum).round_().mul_(quantum)
        result = torch.where(x.abs() < quantum, small, normal)
    else:
        power = torch.bitwise_and(bits, _EXPONENT, out=buffer("power", bits)).clamp_(min=(128 - bias) << 23)
        power, magic = power.view(torch.float32), 1.5 * 2.0 ** (23 - m_bits)
        result = torch.add(x, power, alpha=magic, out=buffer("work", x)).sub_(power, alpha=magic)
    if element.special == "fnuz" or not element.signed:
        return result.add_(0.0)  # no -0
    return result.copysign_(x)  # the sum loses the sign of zero


def stochastic(x: Tensor, u: Tensor, zero: Any, element: Any) -> Tensor:
    """The neighbours of x are multiples of 2^(e - M), as in `round`; also where M = 0."""
    x = x.clamp_(-element.max if element.signed else 0.0, element.max)
    bits, magic = x.view(torch.int32), 1.5 * 2.0 ** (23 - element.mbits)
    power = torch.bitwise_and(bits, _EXPONENT, out=buffer("power", bits)).clamp_(min=(128 - element.bias) << 23)
    power = power.view(torch.float32)
    nearest = torch.add(x, power, alpha=magic, out=buffer("work", x)).sub_(power, alpha=magic)
    result = philox.decide(x, nearest, power.mul_(2.0**-element.mbits), u)
    return x.copy_(result.copysign_(x))


def encode(x: Tensor, zero: Any, element: Any) -> Tensor:
    if element.bits == 16:  # scales; `round` would need numbers beyond fp32 for the top of bf16
        return x.clamp_(-element.max, element.max).to(element.dtype).view(torch.int16)
    x = round(x, zero, element)
    if element.dtype is not None:  # exact: x is a number of that type
        return x.to(element.dtype).view(torch.uint8)
    m_bits, smallest_normal = element.mbits, 2.0 ** (1 - element.bias)
    sign = (x.view(torch.int32) >> 31).bitwise_and_(1 << (element.bits - 1))
    x = x.abs_()
    subnormal = (x < smallest_normal).to(torch.float32)
    # Adding the smallest normal number gives a subnormal one the mantissa of its own code.
    code = x.add_(subnormal, alpha=smallest_normal).view(torch.int32) >> (23 - m_bits)
    code = code.sub_((127 - element.bias) << m_bits).sub_(subnormal.to(torch.int32), alpha=1 << m_bits)
    return (code.bitwise_or_(sign) if element.signed else code).to(torch.uint8)


def decode(code: Tensor, zero: Any, element: Any) -> Tensor:
    index = buffer("index", code, torch.int32).copy_(code).view(-1)
    values = buffer("values", code, torch.float32)
    torch.index_select(table(element, code.device), 0, index, out=values.view(-1))
    return values


def clipped(x: Tensor, zero: Any, element: Any) -> Tensor:
    return x.abs() > element.max
