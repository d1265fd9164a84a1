"""Scales that are quantized again per super-group: integers times an f16 super-scale; `scale.py` has the formulas.

Parts of a tensor [..., K] with groups of g and super-groups of G elements, P = G / g groups each: `scale` (and
`group_minimum`) integers [..., ceil(K/g)], `super_scale` (and `super_minimum`) f16 [..., ceil(K/G)]. The last
super-group of a row may have fewer groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonq.codecs import scale as scales


def _groups(fmt: Any) -> int:
    """Groups of a super-group."""
    return int(fmt.super_group // fmt.group[1])


def _by_super_group(per_group: Tensor, fmt: Any) -> Tensor:
    """[..., n] to [..., ceil(n / P), P]; zeros fill the last super-group."""
    per, n = _groups(fmt), per_group.shape[-1]
    padded = torch.nn.functional.pad(per_group, (0, -n % per))
    return padded.reshape(*per_group.shape[:-1], -(-n // per), per)


def _integers(raw: Tensor, bad: Tensor | None, least: int, fmt: Any) -> tuple[Tensor, Tensor]:
    """fp32 scales or minima [..., n], 0 in groups that are not finite, to integers [..., n] and super-scales.

    `bad` are super-groups with a non-finite element; `least` takes the place of an integer 0.
    """
    scale, n = fmt.scale, raw.shape[-1]
    groups = _by_super_group(raw, fmt)
    if scale.low:
        positive, negative = groups.amax(-1), groups.amin(-1).neg_()
        largest = torch.where(positive >= negative, -positive, negative).div_(-scale.low)
    else:
        largest = groups.amax(-1).div_(scale.high)
    stored = scales.store(largest, bad, fmt.super_scale)
    integers = groups.div_(stored.to(torch.float32).unsqueeze(-1)).clamp_(scale.low, scale.high).round_()
    integers.masked_fill_(integers == 0, least)
    if bad is not None:
        integers.masked_fill_(bad.unsqueeze(-1), 0)
    return integers.to(scale.dtype).flatten(-2)[..., :n], stored


def choose(hi: Tensor, lo: Tensor, fmt: Any) -> dict[str, Tensor]:
    """Parts besides qdata, of groups [..., ceil(K/g)] with largest and smallest element `hi`, `lo`.

    NaN or infinity in `hi` or `lo` marks a group with a non-finite element.
    """
    bad = scales.non_finite(hi, lo)
    super_bad = None
    if bad is not None:
        hi, lo = hi.masked_fill(bad, 0.0), lo.masked_fill(bad, 0.0)
        super_bad = _by_super_group(bad, fmt).any(-1)
    parts = {}
    parts["scale"], super_scale = _integers(scales.raw(hi, lo, fmt), super_bad, 1, fmt)
    if fmt.minimum:
        parts["group_minimum"], super_minimum = _integers(lo.clamp(max=0.0).neg_(), super_bad, 0, fmt)
        return {**parts, "super_scale": super_scale, "super_minimum": super_minimum}
    return {**parts, "super_scale": super_scale}


def load(parts: dict[str, Tensor], fmt: Any) -> tuple[Tensor, Tensor | None]:
    """(factor d * k, minimum e * j or None) of every group, fp32 [..., ceil(K/g)], exact products."""

    def product(integers: Tensor, supers: Tensor) -> Tensor:
        spread = supers.to(torch.float32).repeat_interleave(_groups(fmt), -1)
        return spread[..., : integers.shape[-1]] * integers.to(torch.float32)

    factor = product(parts["scale"], parts["super_scale"])
    return factor, product(parts["group_minimum"], parts["super_minimum"]) if fmt.minimum else None
