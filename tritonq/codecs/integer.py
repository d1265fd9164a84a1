"""Integer codes, offset-binary: code = clamp(rne(x) + zero, 0, 2^bits - 1).

Symmetric formats are the asymmetric ones with the constant zero point 2^(bits - 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _bounds(zero: Any, element: Any) -> tuple[Any, Any]:
    return -zero, (1 << element.bits) - 1 - zero


def _rounded(x: Tensor, zero: Any, element: Any) -> Tensor:
    low, high = _bounds(zero, element)
    return x.clamp_(low, high).round_()  # integer bounds: clamping first rounds the same


def round(x: Tensor, zero: Any, element: Any) -> Tensor:
    return _rounded(x, zero, element).add_(0.0)  # -0 has no code


def encode(x: Tensor, zero: Any, element: Any) -> Tensor:
    return _rounded(x, zero, element).add_(zero).to(torch.uint8)


def decode(code: Tensor, zero: Any, element: Any) -> Tensor:
    return code.to(torch.float32).sub_(zero)


def clipped(x: Tensor, zero: Any, element: Any) -> Tensor:
    low, high = _bounds(zero, element)
    return (x < low) | (x > high)
