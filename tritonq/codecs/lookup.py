"""Codes that stand for the entries of a table: NF4, AF4, and tables of one's own.

value(code) = values[code], strictly ascending fp32 numbers. encode takes the nearest entry, ties to the even code,
exactly: code = number of thresholds below x, where threshold i is the largest fp32 number that still rounds down to
entry i instead of up to entry i + 1. Numbers beyond the ends saturate. Where the table does not use all 2^bits codes,
those left over decode to its last value and are never written.

Stochastic rounding takes entry i + 1 instead of entry i, the largest <= x, if and only if
u * (values[i + 1] - values[i]) < x - values[i], each operation rounded to fp32: the probability is within 2^-22 of the
fraction unless the neighbours are so close that fp32 is subnormal there.
"""

from __future__ import annotations

import builtins
import functools
import itertools
import math
import struct
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from tritonq.codecs.scratch import buffer


def _fp32(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def _largest_at_most(x: Fraction) -> float:
    """The largest finite fp32 number <= x, by bisection over the bits of its magnitude."""
    top = 0x7F7FFFFF
    if x >= 0:  # the largest magnitude <= x
        low, high = 0, top
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if Fraction(_fp32(middle)) <= x else (low, middle - 1)
        return _fp32(low)
    low, high = 0, top  # the smallest magnitude >= -x
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if Fraction(_fp32(middle)) >= -x else (middle + 1, high)
    return -_fp32(low)


def thresholds(values: tuple[float, ...]) -> tuple[float, ...]:
    """Per pair of neighbours the largest fp32 number that rounds to the lower one.

    For codes i and i + 1 with the exact midpoint m: the largest fp32 number <= m where i is even, for the tie goes to
    it, and < m where i is odd.
    """
    found = []
    for code, (a, b) in enumerate(itertools.pairwise(values)):
        middle = (Fraction(a) + Fraction(b)) / 2
        limit = _largest_at_most(middle)
        if code % 2 and limit == middle:
            limit = _largest_at_most(Fraction(math.nextafter(limit, -math.inf)))
        found.append(limit)
    return tuple(found)


def cells(thresholds: tuple[float, ...], most: int) -> tuple[float, tuple[int, ...]] | None:
    """The smallest power of two that tells the thresholds apart, and the integers nearest to their products with it,
    which all differ; None if they span more than `most` integers.

    Ties go to integers an even number after the first, as in the sum that a kernel counts cells from there on with."""
    span = Fraction(thresholds[-1]) - Fraction(thresholds[0])
    if not 2.0**-60 < span < 2.0**60:
        return None
    scale = Fraction(2) ** -math.frexp(float(span))[1]
    while span * scale < most:
        first = builtins.round(Fraction(thresholds[0]) * scale)
        found = tuple(first + builtins.round(Fraction(t) * scale - first) for t in thresholds)
        if len(set(found)) == len(found) and found[-1] - found[0] < most:
            return float(scale), found
        scale *= 2
    return None


@functools.cache
def table(element: Any, device: torch.device) -> Tensor:
    """Values by code, fp32, all 2^bits of them."""
    return torch.tensor(element.table, dtype=torch.float32, device=device)


@functools.cache
def _boundaries(element: Any, device: torch.device) -> Tensor:
    return torch.tensor(element.thresholds, dtype=torch.float32, device=device)


@functools.cache
def _following(element: Any, device: torch.device) -> Tensor:
    """The next larger value by code, the largest after itself; fp32."""
    return torch.tensor(element.table[1:] + element.table[-1:], dtype=torch.float32, device=device)


_FEW = 64  # up to so many thresholds, comparing with each (vectorized) takes less time than torch's search


def _codes(x: Tensor, element: Any) -> Tensor:
    """How many thresholds are below x: fp32, or int32."""
    if len(element.thresholds) > _FEW:
        index = buffer("work", x).view(torch.int32)
        return torch.bucketize(x, _boundaries(element, x.device), out_int32=True, out=index)
    count, above = buffer("values", x).zero_(), buffer("work", x)
    for threshold in element.thresholds:
        count.add_(torch.gt(x, threshold, out=above))
    return count


def _values(codes: Tensor, element: Any) -> Tensor:
    index = codes if codes.dtype is torch.int32 else buffer("work", codes).view(torch.int32).copy_(codes)
    values = buffer("values", codes, torch.float32)
    torch.index_select(table(element, codes.device), 0, index.view(-1), out=values.view(-1))
    return values


def round(x: Tensor, zero: Any, element: Any) -> Tensor:
    return _values(_codes(x, element), element)


def stochastic(x: Tensor, u: Tensor, zero: Any, element: Any) -> Tensor:
    x = x.clamp_(element.values[0], element.values[-1])
    values, following = table(element, x.device), _following(element, x.device)
    lower, upper = buffer("values", x), buffer("work", x)
    code = buffer("code", x).view(torch.int32)
    torch.bucketize(x, values[1 : len(element.values)], right=True, out_int32=True, out=code)  # entries <= x, but one
    torch.index_select(values, 0, code.view(-1), out=lower.view(-1))
    torch.index_select(following, 0, code.view(-1), out=upper.view(-1))
    distance, limit = x.sub_(lower), u.mul_(torch.sub(upper, lower, out=code.view(torch.float32)))
    return x.copy_(torch.where(limit < distance, upper, lower))


def encode(x: Tensor, zero: Any, element: Any) -> Tensor:
    return _codes(x, element).to(torch.uint8)


def decode(code: Tensor, zero: Any, element: Any) -> Tensor:
    return _values(buffer("work", code, torch.float32).view(torch.int32).copy_(code), element)


def clipped(x: Tensor, zero: Any, element: Any) -> Tensor:
    return (x < element.values[0]) | (x > element.values[-1])
