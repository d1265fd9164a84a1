"""How a scale follows from its group, and how it is stored.

All in fp32; m is the element of largest magnitude (the positive one on a tie), hi = max(x, 0), lo = min(x, 0), B =
bits.

* absmax      s = |m| / element.max
* half_range  s = |m| / ((2^B - 1) / 2)                  (compressed-tensors)
* full_range  s = -m / 2^(B - 1), so s can be negative   (llama.cpp, auto-round)
* minmax      s = (hi - lo) / (2^B - 1), zero point z = clamp(rne(-lo / s), 0, 2^B - 1)
* floor       s = 2^(floor(log2 |m|) - emax)             (OCP MX 1.0 section 6.3)
* ceil        s = 2^(ceil(log2 |m|) - emax)
* rceil       s = |m| / element.max rounded up to a power of two
* even        |m| first rounded to the element's mantissa bits, half up with carry, then floor

With a tensor scale G: s = G * |m| / element.max is what is stored, and s / G what divides x.
A scale is rounded to its storage type before it divides. One that would overflow takes the largest number of that type,
one that would be zero the smallest positive; a group with a non-finite element takes NaN.

Super-groups quantize the scales s of their groups again (GGUF k-quants; `super_scale.py`). With integers from `low` to
`high` and S the s of largest magnitude in the super-group (sign kept, the positive one on a tie):

* signed integers (full_range)  d = f16(S / low), so d has the sign of -S
* unsigned integers             d = f16(S / high)
* integer scale                 k = clamp(rne(s / d), low, high), 1 instead of 0; the factor of the group is d * k
* code                          clamp(rne(x / (d * k))); y = d * k * code
* minmax                        has a minimum m = -lo a group instead of a zero point; with M the largest m of the
                                super-group e = f16(M / high), j = clamp(rne(m / e), 0, high);
                                code = clamp(rne((x + e * j) / (d * k)), 0, 2^B - 1); y = d * k * code - e * j

d and e are rounded and saturated as scales are, and never zero. Integers have no NaN: a non-finite element takes its
whole super-group, whose d (and e) are NaN and whose integers are 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tritonq.codecs import minifloat
from tritonq.codecs.scratch import buffer

_INF = 0x7F800000


def _exponent_scale(amax: Tensor, fmt: Any) -> Tensor:
    """Biased exponent (uint8) of an e8m0 scale; `amax` is finite."""
    element, rule = fmt.element, fmt.scale.rule
    bits = amax.view(torch.int32)
    if rule == "even":
        bits = bits + (1 << (22 - element.mbits))
    exponent = bits >> 23
    mantissa = bits & 0x7FFFFF
    if rule == "ceil":
        # The fp32 subnormals up to 2^-127 are below the smallest power of two that e8m0 has.
        exponent = exponent + torch.where(exponent == 0, mantissa > 0x400000, mantissa > 0).to(torch.int32)
    if rule == "rceil":  # |m| = 2^a * p, max = 2^b * r with p, r in [1, 2): 2^(a - b), and twice that where p > r
        exponent = exponent + (mantissa > element.max_mantissa).to(torch.int32)
    return (exponent - element.emax).clamp_(0, 254).to(torch.uint8)


def store(raw: Tensor, bad: Tensor | None, scale: Any, within: tuple[float, float] = (0.0, math.inf)) -> Tensor:
    """fp32 scales (overwritten) to the storage dtype of a `ScaleType`: rounded, saturated, never zero, NaN where
    `bad`. Where all magnitudes are known to be `within` the normal numbers of a torch dtype, that is a cast."""
    smallest, largest = within
    known = bad is None and scale.dtype.is_floating_point and largest <= scale.max
    if known and smallest >= torch.finfo(scale.dtype).smallest_normal:
        return raw.to(scale.dtype)
    if scale.element is None:
        tiny = torch.finfo(torch.float32).smallest_normal * 2.0**-23
        stored = raw.clamp_(-scale.max, scale.max)
        stored.masked_fill_(stored == 0, tiny)
        return stored if bad is None else stored.masked_fill_(bad, torch.nan)
    code = scale.element.codec.encode_ref(raw, 0, scale.element)
    magnitude = code & ((1 << (scale.bits - scale.element.signed)) - 1)
    code.masked_fill_(magnitude == 0, 1)
    if bad is not None:
        code.masked_fill_(bad, scale.element.nan_code)
    return code.view(scale.dtype)


def non_finite(hi: Tensor, lo: Tensor) -> Tensor | None:
    """Which groups have a non-finite element; None where none has."""
    differences = torch.sub(hi, lo, out=buffer("range", hi))  # none is negative: infinity and NaN reach the sum
    if math.isfinite(float(differences.sum())):
        return None
    return ~(torch.isfinite(hi) & torch.isfinite(lo))


def choose(hi: Tensor, lo: Tensor, fmt: Any, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scale (storage dtype) and zero point (uint8, or None) of groups with largest and smallest element `hi`, `lo`.

    NaN or infinity in `hi` or `lo` marks a group with a non-finite element.
    """
    element, rule = fmt.element, fmt.scale.rule
    within, first = (0.0, math.inf), None
    if not fmt.scale.is_exponent and hi.numel():  # scales that are all finite say that the groups are, in fewer passes
        first = raw(hi, lo, fmt, tensor_scale)
        smallest, largest = torch.aminmax(torch.abs(first, out=buffer("magnitude", first)))
        within = float(smallest), float(largest)
    bad = None if math.isfinite(within[1]) else non_finite(hi, lo)
    if bad is not None:
        hi, lo, first = hi.masked_fill(bad, 0.0), lo.masked_fill(bad, 0.0), None
    if fmt.scale.is_exponent:
        exponent = _exponent_scale(torch.maximum(hi, -lo), fmt)
        return (exponent if bad is None else exponent.masked_fill_(bad, 0xFF)).view(fmt.scale.dtype), None
    scale = store(raw(hi, lo, fmt, tensor_scale) if first is None else first, bad, fmt.scale, within)
    if rule != "minmax":
        return scale, None
    zero = (-lo.clamp(max=0.0) / load(scale, fmt)).round_().clamp_(0, (1 << element.bits) - 1)
    return scale, (zero if bad is None else zero.masked_fill_(bad, 0.0)).to(torch.uint8)


def raw(hi: Tensor, lo: Tensor, fmt: Any, tensor_scale: Tensor | None = None) -> Tensor:
    """fp32 scales before they are rounded, of groups with largest and smallest element `hi`, `lo`, finite."""
    element, rule = fmt.element, fmt.scale.rule
    levels = 1 << element.bits
    if rule == "minmax":
        return hi.clamp(min=0.0).sub_(lo.clamp(max=0.0)).div_(levels - 1)
    largest = torch.maximum(hi, torch.neg(lo, out=buffer("largest", lo)), out=buffer("largest", lo))
    if rule == "full_range":
        # The sign of -(hi + lo), which is -0 on a tie. torch.where takes ten times as long.
        return largest.copysign_(torch.add(hi, lo, out=buffer("range", hi)).neg_()).div_(levels // 2)
    if rule == "half_range":
        return largest.div_((levels - 1) / 2)
    if tensor_scale is not None:
        largest = largest.mul_(tensor_scale)
    return largest.div_(element.max)


def load(scale: Tensor, fmt: Any, tensor_scale: Tensor | None = None) -> Tensor:
    """Stored scales to the fp32 factor of dequantization."""
    if fmt.scale.is_exponent:
        bits = scale.view(torch.uint8).to(torch.int32)
        value = (bits << 23).masked_fill_(bits == 0, 0x400000).masked_fill_(bits == 0xFF, 0x7FC00000)
        return value.view(torch.float32)
    if fmt.scale.element is not None and fmt.scale.element.dtype is None:
        # No codec call: its result would lie in a buffer that the elements of the same tile use.
        return minifloat.table(fmt.scale.element, scale.device)[scale.view(torch.uint8).to(torch.int32)]
    value = scale.to(torch.float32)
    return value if tensor_scale is None else value / tensor_scale


def choose_tensor_scale(amax: Tensor, fmt: Any) -> Tensor:
    """G = scale.max * element.max / amax (a divisor), 1 for an all-zero tensor; shape [1], fp32."""
    product = fmt.scale.max * fmt.element.max
    largest = torch.finfo(torch.float32).max
    quotient = torch.full_like(amax, product) / amax  # a Python number over a tensor would multiply by a reciprocal
    scale = torch.where(amax > 0, quotient, 1.0).clamp(max=largest)
    return scale.to(torch.float32).reshape(1)
