"""Integer codes, offset-binary: code = clamp(rne(x) + zero, 0, 2^bits - 1).

Symmetric formats are the asymmetric ones with the constant zero point 2^(bits - 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonq.codecs.scratch import buffer


def _bounds(zero: Any, element: Any) -> tuple[Any, Any]:
    return -zero, (1 << element.bits) - 1 - zero


_MAGIC = 1.5 * 2**23  # fp32 keeps integers around it, half to even


def round(x: Tensor, zero: Any, element: Any) -> Tensor:
    low, high = _bounds(zero, element)
    # Integer bounds: clamping first rounds the same. Unlike round_, the sum has no -0, which no code stands for.
    return x.clamp_(low, high).add_(_MAGIC).sub_(_MAGIC)


def encode(x: Tensor, zero: Any, element: Any) -> Tensor:
    return round(x, zero, element).add_(zero).to(torch.uint8)


def decode(code: Tensor, zero: Any, element: Any) -> Tensor:
    return buffer("values", code, torch.float32).copy_(code).sub_(zero)


def clipped(x: Tensor, zero: Any, element: Any) -> Tensor:
    low, high = _bounds(zero, element)
    return (x < low) | (x > high)
