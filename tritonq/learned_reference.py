"""QDQ with tuning parameters and its gradients in plain torch: the definition, and tile by tile the CPU path.

Over a group, with ratios `high` (max_scale) and `low` (min_scale), 1 where they are left out:

    hi = max(max x, 0) * high,  lo = min(min x, 0) * low       a negative ratio counts as 0
    s, z = the format's rule for the extremes hi and lo         rounded to storage, as ever
    u = x / s + v,  q = clamp(rne(u)),  y = s * q               codes: q + z

GIVEN scales take the place of `high` and `low`: s, and z (rounded and clamped where it is a floating-point number), as
they are. Formats with super-groups and minima m: u = (x + m) / s + v, y = s * q - m.

Gradients pass straight through every rounding, and stop at every clamp. Inside means that u is within the range of the
codes before it is rounded:

    dx = dy inside, 0 outside (the scale counts as constant)    dv = s dy inside, 0 outside
    A = sum of dy (q - x/s) inside + dy q outside               O = sum of dy outside
    given: ds = A,  dz = -s O (0 where z was clamped)

From here to hi and -lo, with L = 2^bits - 1 and A' = A, or of asymmetric formats A + O (-lo/s) unless z was clamped:

    minmax      d hi = A' / L,  d(-lo) = A' / L - O             (O only where z was not clamped)
    others      A times the slope of the rule before rounding, on the side of the larger magnitude, hi on a tie:
                1 / max, 1 / ((2^bits - 1) / 2), -+ 1 / 2^(bits - 1), 2^-emax (floor, even), 1 / max (ceil, rceil)
    dhigh = d hi * max(max x, 0),  dlow = d(-lo) * max(max -x, 0)

A' is 0 there if storing the scale saturated it, or lifted it to the smallest number (e8m0: raised it to 2^-127): those
are clamps. A group that is not finite has y = NaN, dx = dy, and 0 for every other gradient. NaN in v counts as infinity
with the sign of x / s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tritonq import reference
from tritonq.codecs import scale as scales
from tritonq.codecs import super_scale
from tritonq.formats import Format

Parts = reference.Parts


@dataclass(frozen=True)
class Learned:
    """The parameters of one call: v of the shape of x; `high` and `low` of the shape of the scale, max_scale and
    min_scale, or if `given` the scale and the zero point; the tensor-wide divisor of formats that have one."""

    v: Tensor | None = None
    high: Tensor | None = None
    low: Tensor | None = None
    given: bool = False
    tensor_scale: Tensor | None = None


@dataclass(frozen=True)
class Wanted:
    """What backward is to give. `factor` multiplies the gradients of given scales and zero points. With `step` the
    parameters move instead; `bounds` are those of v, then those of high and low."""

    x: bool = False
    v: bool = False
    high: bool = False
    low: bool = False
    factor: float = 1.0
    step: bool = False
    bounds: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    @property
    def groups(self) -> bool:
        return self.high or self.low


@dataclass(frozen=True)
class Chosen:
    """Of groups: fp32 extremes of x (both >= 0), ratios, factor s, zero point, minimum, whether the zero point is free
    to move, whether the group is not finite; `parts` as they are stored."""

    positive: Tensor
    negative: Tensor
    high: Tensor | None
    low: Tensor | None
    factor: Tensor
    zero: Tensor | None
    minimum: Tensor | None
    free: Tensor | None
    bad: Tensor
    parts: Parts


def axes(fmt: Format) -> tuple[int, ...]:
    """Those of `reference.grouped` that lie within a group."""
    return (-3, -1) if fmt.group[0] > 1 else (-1,)


def extremes(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """max(max x, 0) and max(max -x, 0) of every group of an fp32 tensor, NaN where an element is."""
    groups = reference.grouped(x, fmt)
    return groups.amax(axes(fmt)).clamp_(min=0.0), groups.amin(axes(fmt)).neg_().clamp_(min=0.0)


def _times(extreme: Tensor, ratio: Tensor | None) -> Tensor:
    if ratio is None:
        return extreme
    product = extreme * ratio
    return torch.where(product < 0.0, 0.0, product)


def _float(part: Tensor | None, shape: torch.Size) -> Tensor | None:
    return None if part is None else part.to(torch.float32).view(shape)


def choose(positive: Tensor, negative: Tensor, fmt: Format, tuning: Learned) -> Chosen:
    """Scales of groups with these extremes; `tuning` holds the parameters of these groups."""
    shape, divisor = positive.shape, tuning.tensor_scale
    if tuning.given:
        return _given(positive, negative, fmt, tuning)
    high, low = _float(tuning.high, shape), _float(tuning.low, shape)
    hi, lo = _times(positive, high), _times(negative, low).neg()
    minimum = zero = None
    if fmt.super_group:
        parts = super_scale.choose(hi, lo, fmt)
        factor, minimum = super_scale.load(parts, fmt)
    else:
        scale, zero = scales.choose(hi, lo, fmt, divisor)
        factor = scales.load(scale, fmt, divisor)
        parts = {"scale": scale} if zero is None else {"scale": scale, "zero_point": zero}
        zero = None if zero is None else zero.to(torch.float32)
    return Chosen(positive, negative, high, low, factor, zero, minimum, None, torch.isnan(factor), parts)


def _given(positive: Tensor, negative: Tensor, fmt: Format, tuning: Learned) -> Chosen:
    shape, divisor, scale = positive.shape, tuning.tensor_scale, tuning.high
    assert scale is not None
    if scale.dtype is torch.uint8:
        factor = scales.load(scale.view(fmt.scale.dtype), fmt, divisor).view(shape)
    else:
        factor = scale.to(torch.float32).view(shape)
        factor = factor if divisor is None else factor / divisor
    zero = free = None
    if fmt.zero_point:
        number = _float(tuning.low, shape)
        assert number is not None
        zero = number.clamp(0.0, (1 << fmt.bits) - 1)
        free, zero = zero == number, zero.round()
    never = torch.zeros(shape, dtype=torch.bool, device=factor.device)
    return Chosen(positive, negative, None, None, factor, zero, None, free, never, {})


@dataclass(frozen=True)
class Elements:
    """By group: x / s, x / s + v, what that rounds to, all fp32; the codes' zero."""

    quotient: Tensor
    u: Tensor
    value: Tensor
    zero: Tensor | int


def elements(x: Tensor, v: Tensor | None, chosen: Chosen, fmt: Format) -> Elements:
    """Of an fp32 tile of whole groups, or of part of one group."""
    groups = reference.grouped(x, fmt)
    zero = fmt.zero_code if chosen.zero is None else reference.spread(chosen.zero, fmt)
    if chosen.minimum is not None:
        groups = groups + reference.spread(chosen.minimum, fmt)
    quotient = groups / reference.spread(chosen.factor, fmt)
    quotient = quotient.masked_fill_(torch.isnan(quotient), 0.0)
    u = quotient if v is None else quotient + reference.grouped(v.to(torch.float32), fmt)
    u = torch.where(torch.isnan(u), torch.full_like(u, torch.inf).copysign_(quotient), u)
    return Elements(quotient, u, fmt.element.codec.round_ref(u.clone(), zero, fmt.element), zero)


def values(x: Tensor, found: Elements, chosen: Chosen, fmt: Format, dtype: torch.dtype) -> Tensor:
    """y of an fp32 tile, within the finite range of `dtype`."""
    y = found.value * reference.spread(chosen.factor, fmt)
    if chosen.minimum is not None:
        y = y - reference.spread(chosen.minimum, fmt)
    limit = torch.finfo(torch.float32 if dtype is torch.float64 else dtype).max
    y = reference.ungrouped(y.clamp_(-limit, limit), tuple(x.shape), fmt)
    gone = lost(x, chosen, fmt)
    return y if gone is None else y.masked_fill(gone, torch.nan)


def lost(x: Tensor, chosen: Chosen, fmt: Format) -> Tensor | None:
    """What given scales, which say nothing about x, leave NaN in element types that have one; None for nothing."""
    if chosen.parts or fmt.element.nan_code < 0:
        return None
    groups = reference.grouped(x, fmt)
    return reference.ungrouped(
        ~torch.isfinite(groups) & ~torch.isnan(reference.spread(chosen.factor, fmt)), tuple(x.shape), fmt
    )


@dataclass(frozen=True)
class Gradients:
    """Of a tile: dx in dy's dtype, dv fp32, and the sums A and O of its groups."""

    x: Tensor
    v: Tensor
    total: Tensor
    outside: Tensor


def gradients(found: Elements, dy: Tensor, chosen: Chosen, fmt: Format) -> Gradients:
    """dy of the shape of the tile."""
    shape, factor = tuple(dy.shape), chosen.factor
    kept = ~fmt.element.codec.clipped_ref(found.u, found.zero, fmt.element)
    by_group = reference.grouped(dy.to(torch.float32), fmt)
    usable = reference.spread(factor.masked_fill(chosen.bad, 0.0), fmt)
    dv = torch.where(kept, by_group * usable, 0.0)
    terms = by_group * torch.where(kept, found.value - found.quotient, found.value)
    passed = reference.ungrouped(kept | reference.spread(chosen.bad, fmt), shape, fmt)
    return Gradients(
        torch.where(passed, dy, 0.0),
        reference.ungrouped(dv, shape, fmt),
        terms.sum(axes(fmt)),
        torch.where(kept, 0.0, by_group).sum(axes(fmt)),
    )


def of_parameters(
    total: Tensor, outside: Tensor, chosen: Chosen, fmt: Format, tuning: Learned, factor: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `high` and `low` from the sums A and O of their groups."""
    if tuning.given:
        if tuning.tensor_scale is not None:
            total = total / tuning.tensor_scale
        of_zero = -outside * chosen.factor
        of_zero = of_zero if chosen.free is None else torch.where(chosen.free, of_zero, 0.0)
        return total * factor, of_zero * factor
    above, below = _times(chosen.positive, chosen.high), _times(chosen.negative, chosen.low)
    if fmt.scale.is_exponent:
        raw = torch.maximum(above, below) * fmt.slope
    else:
        raw = scales.raw(above, -below, fmt, tuning.tensor_scale).abs()
    low_bits, high_bits = fmt.scale.passing
    passes = (raw.view(torch.int32) > low_bits) & (raw.view(torch.int32) <= high_bits)
    if fmt.scale.rule == "minmax":
        free = torch.ones_like(passes)
        if not fmt.minimum:
            zero = below / chosen.factor
            free = zero <= (1 << fmt.bits) - 1
            total = total + torch.where(free, outside * zero, 0.0)
        of_high = torch.where(passes, total * fmt.slope, 0.0)
        of_low = of_high - torch.where(free, outside, 0.0)
    else:
        of_larger = torch.where(passes, total * fmt.slope, 0.0)
        larger, sign = above >= below, -1.0 if fmt.scale.rule == "full_range" else 1.0
        of_high, of_low = torch.where(larger, sign * of_larger, 0.0), torch.where(larger, 0.0, of_larger)
    found = []
    for gradient, extreme, ratio in (
        (of_high, chosen.positive, chosen.high), (of_low, chosen.negative, chosen.low),
    ):  # fmt: skip
        stopped = chosen.bad if ratio is None else chosen.bad | (ratio < 0.0)
        found.append(torch.where(stopped, 0.0, gradient * extreme))
    return found[0], found[1]


def moved(p: Tensor, gradient: Tensor, rate: Tensor, lowest: float, highest: float) -> Tensor:
    """p - rate * sign(gradient) within [lowest, highest], fp32; NaN has no sign, and a parameter that is NaN ends at
    the lower bound, where the maximum of a GPU leaves it."""
    sign = torch.sign(gradient.to(p.dtype).to(torch.float32)).nan_to_num_(0.0)
    found = p.to(torch.float32) - rate * sign
    return found.masked_fill_(found.isnan(), lowest).clamp_(lowest, highest)
