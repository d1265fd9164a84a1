"""Which scales a search tries in place of the one that a rule gives, and how their errors compare.

A group of elements x with weights w takes the scale that minimises sum w (x - dequantize(quantize(x)))^2. The
candidates are numbers that the scale's type stores: neighbours of the rule's scale, whose fp32 bits lie k * step apart.

* e8m0: two exponents below, one above
* e4m3, ue5m3: every number within an octave below and above
* bf16: every number from about 0.65 to 1.3 times the rule's scale for integers of 4 bits in groups of 128, which is
  where the best scale of normal, Laplace and Student t(4) numbers lies; `_window` has those of other elements
* f16, f32: as many to an octave as bf16 has, then 1024 to an octave around the best

The rule's own scale is one of them and wins ties, so no group gets worse by a search. Where the rule gives the scale
the sign of the largest element and both signs are as large (`tied`), the candidates of the other sign are tried, too.

Asymmetric codes try three zero points with each scale: the one that keeps the lowest number of the group where the rule
puts it, the one that keeps the highest, and the one between.

Errors are compared the same way on every backend, bit for bit: x and the scales are multiplied by the power of two that
takes the step between the largest codes, under the scale that a stage begins with, into [1, 2); x / s is taken as
x * (1 / s), with 1 / s rounded to 16 bits (a bf16 x makes that an exact product, and only numbers next to a midpoint
are told apart less well); squares are summed in fp32 over runs of 8 consecutive elements of a row, then run by run; the
sums of rows become integers, which add up in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonq.codecs import scale as scales
from tritonq.codecs.scratch import buffer

RUN = 8  # elements of a row whose squares are summed one after the other
BLOCK = 2 * RUN  # two runs; their sum joins that of the row
CAP = 2.0**24  # the sum of a row is at most this, in units of the step between the largest codes squared
ANCHORS = 3  # zero points tried with each scale


@dataclass(frozen=True)
class Stage:
    """Candidates k = -below .. count - 1 - below, `step` apart as fp32 bits; count is a power of two."""

    step: int
    below: int
    count: int


def _window(fmt: Any) -> tuple[int, int]:
    """(below, count) with 128 candidates to an octave. The fewer the codes and the larger the group, the more it pays
    to clip; floats of many bits repeat their grid an octave up."""
    element, bits = fmt.element, fmt.bits
    size = fmt.group[0] * fmt.group[1] if min(fmt.group) > 0 else 1 << 20
    if not element.codec.offset_binary:
        return (96, 256) if bits <= 4 else (4, 128)
    if bits == 4:
        return (48, 128) if size <= 64 else (80, 128) if size <= 256 else (192, 256)
    return {2: (320, 512), 3: (160, 256)}.get(bits, (32, 64))


def stages(fmt: Any) -> tuple[Stage, ...]:
    """What to try, first around the rule's scale, then around the best of the first stage."""
    element = fmt.scale.element
    stored = 0 if fmt.scale.is_exponent else 23 if element is None else element.mbits
    if stored == 0:
        return (Stage(1 << 23, 2, 4),)
    if stored < 7:
        octave = 1 << stored
        return (Stage(1 << (23 - stored), octave, 2 * octave),)
    first = Stage(1 << 16, *_window(fmt))
    return (first,) if stored == 7 else (first, Stage(1 << 13, 8, 16))


def fraction(fmt: Any) -> int:
    """Fractional bits of the integers that sums of rows become; all rows of a group fit 63 bits."""
    return 24 if 1 <= fmt.group[0] <= 1 << 14 else 16


def rank(k: int) -> int:
    """Which of several candidates with the same error is taken: the one with the lowest rank, the rule's before all."""
    return 2 * abs(k) - (k > 0)


def candidate(scale: Tensor, k: int, stage: Stage, fmt: Any) -> Tensor:
    """The k-th neighbour of stored scales; NaN, of groups that are not finite, has none."""
    if k == 0:
        return scale
    if fmt.scale.is_exponent:
        stored = scale.view(torch.uint8).to(torch.int32)
        return (stored + k).clamp_(0, 254).masked_fill_(stored == 255, 255).to(torch.uint8).view(scale.dtype)
    value = scales.load(scale, fmt)
    bits = value.abs().view(torch.int32)
    moved = (bits & -stage.step).add_(k * stage.step).clamp_(1, 0x7F7FFFFF)
    return scales.store(moved.view(torch.float32).copysign_(value), value.isnan(), fmt.scale)


def zero_point(zero: Tensor, ratio: Tensor, anchor: int, fmt: Any) -> Tensor:
    """Zero point (fp32) for a scale `ratio` times smaller than the one that came with `zero`."""
    levels = (1 << fmt.bits) - 1
    low = zero * ratio
    high = levels - (levels - zero) * ratio
    moved = (low, high, (low + high) * 0.5)[anchor]
    return torch.where(moved.isnan(), zero, moved).round_().clamp_(0, levels)


def unit(factor: Tensor, fmt: Any) -> Tensor:
    """The power of two that takes |factor| times the step between the largest codes into [1, 2), as far as fp32 has
    one. Errors are then of the order of 1 whatever the range of the codes."""
    element = fmt.element
    step = element.emax - (element.bits - 1 if element.values else element.mbits)
    exponent = (factor.abs().view(torch.int32) >> 23).neg_().add_(254 - step).clamp_(1, 254)
    return (exponent << 23).view(torch.float32)


def inverse(factor: Tensor) -> Tensor:
    """1 / factor, rounded to 16 significant bits, half up."""
    bits = (torch.ones_like(factor) / factor).view(torch.int32)
    return (bits.add_(0x80) & -0x100).view(torch.float32)


def blocks(groups: Tensor) -> Tensor:
    """[n, R, C] to [BLOCK, blocks of a row, R, n], with zeros where a row ends within a block: what is summed first
    comes first, and neighbours in memory are neighbouring groups."""
    groups = torch.nn.functional.pad(groups, (0, -groups.shape[-1] % BLOCK))
    return groups.unflatten(-1, (-1, BLOCK)).permute(3, 2, 1, 0).contiguous()


def errors(x: Tensor, weights: Tensor | None, factor: Tensor, zero: Any, fmt: Any) -> Tensor:
    """Integer errors [n] of blocks [BLOCK, B, R, n], for one scaled factor a group and a zero point or its constant."""
    scaled = torch.mul(x, inverse(factor), out=buffer("scaled", x))
    y = fmt.element.codec.round_ref(scaled, zero, fmt.element)
    e = y.mul_(factor).sub_(x)
    e = e.mul_(e)
    if weights is not None:
        e = e.mul_(weights)
    runs = e.view(2, RUN, *e.shape[1:])
    total = runs[:, 0].clone()
    for i in range(1, RUN):
        total.add_(runs[:, i])
    found = total[0].add_(total[1])
    total = found[0].clone()
    for block in found[1:]:
        total.add_(block)
    total = torch.where(total < CAP, total, CAP)  # NaN is not less
    return total.mul_(2.0 ** fraction(fmt)).to(torch.int64).sum(0)


Trial = tuple[Tensor, Tensor | None]  # stored scales and fp32 zero points [n]


def _trials(scale: Tensor, zero: Tensor | None, stage: Stage, fmt: Any) -> list[Trial]:
    """In the order in which they win ties."""
    trials: list[Trial] = []
    for k in sorted(range(-stage.below, stage.count - stage.below), key=rank):
        moved = candidate(scale, k, stage, fmt)
        if zero is None:
            trials.append((moved, None))
        else:
            ratio = scales.load(scale, fmt) / scales.load(moved, fmt)
            trials += [(moved, zero_point(zero, ratio, anchor, fmt)) for anchor in range(ANCHORS)]
    return trials


Chunks = Callable[[], Iterable[tuple[Tensor, Tensor | None]]]


def tries_both_signs(fmt: Any) -> bool:
    """Whether groups that are `tied` try scales of both signs. One group for a whole tensor does not."""
    return fmt.scale.rule == "full_range" and fmt.group[0] != -1


def tied(x: Tensor) -> Tensor:
    """Which groups [n, R, C] have a largest and a smallest element of the same magnitude."""
    high = x.amax((1, 2))
    return (high == -x.amin((1, 2))) & (high > 0)


def _integers(scale: Tensor) -> Tensor:
    return scale.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[scale.dtype.itemsize])


def _stage(
    chunks: Chunks, scale: Tensor, zero: Tensor | None, divisor: Tensor | None, stage: Stage, fmt: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The best scales (as integers) and zero points of a stage, and their errors."""
    power = unit(scales.load(scale, fmt, divisor), fmt)
    trials = _trials(scale, zero, stage, fmt)
    totals: list[Tensor] = []
    for x, weights in chunks():
        x = blocks(x).mul_(power)
        weights = None if weights is None else blocks(weights)
        for i, (moved, z) in enumerate(trials):
            factor = scales.load(moved, fmt, divisor) * power
            found = errors(x, weights, factor, fmt.element.zero_code if z is None else z, fmt)
            found = found.sum(0, keepdim=True) if fmt.group[0] == -1 else found
            totals[i:] = [totals[i] + found if i < len(totals) else found, *totals[i + 1 :]]
    smallest, chosen = totals[0], torch.zeros_like(totals[0])
    for i, total in enumerate(totals):
        better = total < smallest
        smallest, chosen = torch.where(better, total, smallest), chosen.masked_fill(better, i)
    pick = chosen.unsqueeze(0)
    best_zero = None if zero is None else torch.stack([z for _, z in trials if z is not None]).gather(0, pick)[0]
    return torch.stack([_integers(s) for s, _ in trials]).gather(0, pick)[0], best_zero, smallest


def best(
    chunks: Chunks, scale: Tensor, zero: Tensor | None, divisor: Tensor | None, fmt: Any
) -> tuple[Tensor, Tensor | None]:
    """Scales (as stored) and zero points (uint8) [n], starting from those of the rule.

    Args:
        chunks: gives groups [n, R, C] in fp32 and their weights, or None for ones; several times, and in several
            chunks of any number of rows [m, 1, C] where one group (n = 1) is all there is.
        divisor: the tensor scale.
    """
    dtype, zero = scale.dtype, None if zero is None else zero.to(torch.float32)
    for i, stage in enumerate(stages(fmt)):
        found, zero, error = _stage(chunks, scale, zero, divisor, stage, fmt)
        if i == 0 and tries_both_signs(fmt):
            ((x, weights),) = chunks()
            both = tied(x).nonzero()[:, 0]
            if both.numel():
                own = [(x[both], None if weights is None else weights[both])]
                sign = 1 << (8 * dtype.itemsize - 1)
                other = (_integers(scale)[both] ^ (sign if dtype.itemsize == 1 else -sign)).view(dtype)
                mirrored, _, mirrored_error = _stage(own.copy, other, None, divisor, stage, fmt)
                found[both] = torch.where(mirrored_error < error[both], mirrored, found[both])
        scale = found.view(dtype)
    return scale, None if zero is None else zero.to(torch.uint8)
