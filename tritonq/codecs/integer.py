"""Integer codes, offset-binary: code = clamp(rne(x * 2^F) + zero, 0, 2^bits - 1), with F fractional bits (mostly 0).

Symmetric formats are the asymmetric ones with the constant zero point 2^(bits - 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonq.codecs import philox
from tritonq.codecs.scratch import buffer


def _bounds(zero: Any, element: Any) -> tuple[Any, Any]:
    low, high = -zero, (1 << element.bits) - 1 - zero
    unit = 2.0**-element.fraction
    return (low * unit, high * unit) if element.fraction else (low, high)


_MAGIC = 1.5 * 2**23  # fp32 keeps integers around it, half to even; multiples of 2^-F around 2^-F of it


def round(x: Tensor, zero: Any, element: Any) -> Tensor:
    x = x.clamp_(*_bounds(zero, element))  # bounds are values of codes: what is clamped first rounds the same
    if not element.fraction:
        return x.round_().add_(0.0)  # no code stands for -0
    magic = _MAGIC * 2.0**-element.fraction
    return x.add_(magic).sub_(magic)


def stochastic(x: Tensor, u: Tensor, zero: Any, element: Any) -> Tensor:
    unit = 2.0**-element.fraction
    x = x.clamp_(*_bounds(zero, element))
    nearest = torch.add(x, _MAGIC * unit, out=buffer("work", x)).sub_(_MAGIC * unit)
    return x.copy_(philox.decide(x, nearest, unit, u))


def encode(x: Tensor, zero: Any, element: Any) -> Tensor:
    x = round(x, zero, element)
    if element.fraction:
        x = x.mul_(1 << element.fraction)
    return x.add_(zero).to(torch.uint8)


def decode(code: Tensor, zero: Any, element: Any) -> Tensor:
    values = buffer("values", code, torch.float32).copy_(code).sub_(zero)
    return values.mul_(2.0**-element.fraction) if element.fraction else values


def clipped(x: Tensor, zero: Any, element: Any) -> Tensor:
    low, high = _bounds(zero, element)
    return (x < low) | (x > high)
