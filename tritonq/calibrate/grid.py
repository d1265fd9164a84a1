"""The numbers that the codes of a weight stand for: its scales, chosen, loaded, column by column.

A layer's scales follow from the format's rule or a search; `Grid` is then all that rounding a column takes, for any
format: y = factor * round(x / factor) under the zero point or the minimum of its group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonq import ops, reference
from tritonq.calibrate.task import Layer
from tritonq.codecs import scale as scales
from tritonq.codecs import super_scale
from tritonq.formats import Format
from tritonq.nn.quantize import smallest_divisor
from tritonq.reference import Parts


def divisors(layers: Sequence[Layer], weights: Mapping[Layer, Tensor] | None = None) -> dict[Layer, Tensor]:
    """Tensor-wide divisors, fp32 [1], of layers whose format has them; those that share one get the smallest. Of
    `weights` in place of those that the layers have."""
    sets: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.fmt.tensor_scale:
            sets.setdefault(layer.shared if layer.shared is not None else f"{id(layer)}", []).append(layer)
    found = {}
    for members in sets.values():
        own = [layer.weight if weights is None else weights[layer] for layer in members]
        smallest = smallest_divisor(own, members[0].fmt)
        found.update({layer: smallest.to(layer.weight.device) for layer in members})
    return found


@torch.no_grad()
def choose(
    weight: Tensor, fmt: Format, search: str | bool, importance: Tensor | None, divisor: Tensor | None
) -> Parts:  # fmt: skip
    """Parts of a weight [..., K] besides the codes.

    Args:
        search: "mse" or False; formats with super-groups have no search.
        importance: of the columns in the search, [K], or [E, K] for a weight [E, N, K]; where the experts share a scale
            its mean counts.
        divisor: tensor-wide, fp32 [1], of formats that have one.
    """
    if not search or fmt.super_group:
        parts = ops.quantize(weight, fmt, tensor_scale=divisor)
        del parts["qdata"]
        return parts
    if importance is not None and importance.ndim == 2 and (weight.ndim == 2 or fmt.group[0] == -1):
        importance = importance.mean(0)
    if importance is None or importance.ndim == 1:
        return ops.searched_scales(weight, fmt, tensor_scale=divisor, importance=importance)
    each = [
        ops.searched_scales(w, fmt, tensor_scale=divisor, importance=own)
        for w, own in zip(weight, importance, strict=True)
    ]
    return {
        name: part if name == "tensor_scale" else torch.stack([parts[name] for parts in each])
        for name, part in each[0].items()
    }


@dataclass
class Grid:
    """What the codes of a weight [B, N, K] stand for, by column group: [B, N, groups], fp32.

    y = factor * code(x / factor, zero), or with a minimum y = factor * code((x + minimum) / factor) - minimum.
    """

    fmt: Format
    factor: Tensor
    zero: Tensor | None
    minimum: Tensor | None

    @classmethod
    def of(cls, parts: Parts, fmt: Format, shape: tuple[int, int, int]) -> Grid:
        """From the parts of a weight of B * N rows or of B experts."""
        zero, minimum = parts.get("zero_point"), None
        if fmt.super_group:
            factor, minimum = super_scale.load(parts, fmt)
        else:
            factor = scales.load(parts["scale"], fmt, parts.get("tensor_scale"))
        rows = fmt.group[0]

        def spread(part: Tensor | None) -> Tensor | None:
            if part is None:
                return None
            if rows == -1:
                return part.float().view(1, 1, 1).expand(*shape[:2], 1)
            part = part.float().view(shape[0], -1, part.shape[-1])
            return part.repeat_interleave(rows, 1)[:, : shape[1]] if rows > 1 else part

        spread_factor = spread(factor)
        assert spread_factor is not None
        return cls(fmt, spread_factor, spread(zero), spread(minimum))

    @classmethod
    def cat(cls, grids: Sequence[Grid]) -> Grid:
        """The rows of one after those of another."""

        def cat(name: str) -> Tensor | None:
            found = [getattr(grid, name) for grid in grids]
            return None if found[0] is None else torch.cat(found, 1)

        factor = cat("factor")
        assert factor is not None
        return cls(grids[0].fmt, factor, cat("zero"), cat("minimum"))

    def at(self, columns: Tensor) -> Grid:
        """That of columns [B, c], each on the first axis: [c, B, N]."""
        size = self.fmt.group[1]
        groups = (columns // size if size > 0 else torch.zeros_like(columns)).unsqueeze(1)

        def pick(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.gather(2, groups.expand(-1, part.shape[1], -1)).permute(2, 0, 1)

        factor = pick(self.factor)
        assert factor is not None
        return Grid(self.fmt, factor.contiguous(), pick(self.zero), pick(self.minimum))

    def round(self, x: Tensor, i: int) -> Tensor:
        """A column [B, N] to what its codes stand for, under entry i of the first axis."""
        minimum = None if self.minimum is None else self.minimum[i]
        zero = self.fmt.zero_code if self.zero is None else self.zero[i]
        quotient = (x if minimum is None else x + minimum) / self.factor[i]
        y: Tensor = self.fmt.element.codec.round_ref(quotient, zero, self.fmt.element) * self.factor[i]
        return y if minimum is None else y - minimum


def encode(values: Tensor, parts: Parts, fmt: Format) -> Parts:
    """All parts of values that lie on the grid of `parts`."""
    if fmt.super_group:
        factor, minimum = super_scale.load(parts, fmt)
        return {"qdata": reference.encode(values.clone(), factor, minimum, None, fmt), **parts}
    return ops.quantize(values, fmt, **parts)  # type: ignore[arg-type]
