"""Scales of groups by the error of a layer's outputs: the clipping of AWQ, which sees what other groups do.

    E = W - round(W),     error = tr(E H E^T),  H = sum of x x^T over all inputs

A group's candidates are the scales that the format's rule gives for its elements times a ratio; below 1 they clip.
Groups are settled along the columns, those of a column group for all rows at once. For e, the part of E that a
candidate makes of group g,

    error(e) = e H_gg e^T + 2 e (H E^T)_g^T,      (H E^T)_g without the group itself

so that it sees what other groups have left, whose scales stand. Lin et al. 2023 take the first term alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq import ops
from tritonq.calibrate.grid import Grid
from tritonq.formats import Format
from tritonq.reference import Parts

TOGETHER = 1 << 25  # elements of errors at a time; of wide groups, candidates come one by one
RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 1.1, 1.25, 1.5)


@torch.no_grad()
def clipped(weight: Tensor, fmt: Format, hessian: Tensor, divisor: Tensor | None = None) -> Parts:
    """Parts of a weight [N, K] besides the codes, for formats without super-groups.

    Args:
        hessian: sum (or mean) of x x^T, fp32 [K, K].
        divisor: tensor-wide, fp32 [1], of formats that have one.

    Returns:
        As `ops.quantize` returns them; where no candidate is better, those of the rule.
    """
    weight = weight.float()
    candidates = [_rule(weight * ratio, fmt, divisor) for ratio in RATIOS]
    grids = [Grid.of(parts, fmt, (1, *weight.shape)) for parts in candidates]
    factor = torch.cat([grid.factor for grid in grids])  # [candidates, N, column groups]
    zero = None if grids[0].zero is None else torch.cat([grid.zero for grid in grids if grid.zero is not None])
    rows, columns = weight.shape
    height, width = (rows if fmt.group[0] == -1 else fmt.group[0]), (columns if fmt.group[1] == -1 else fmt.group[1])
    block = torch.arange(rows, device=weight.device) // height
    blocks = -(-rows // height)
    chosen = torch.zeros(blocks, factor.shape[-1], dtype=torch.int64, device=weight.device)

    def errors(group: int, by: Tensor, own: Tensor | None) -> Tensor:
        """Of the elements of a column group for scales [.., N] and zero points, [.., N, width]."""
        x, by = weight[:, group * width : (group + 1) * width], by.unsqueeze(-1)
        code = fmt.zero_code if own is None else own.unsqueeze(-1)
        return x - fmt.element.codec.round_ref(x / by, code, fmt.element) * by

    def some(group: int, which: slice) -> Tensor:
        return errors(group, factor[which, :, group], None if zero is None else zero[which, :, group])

    together = max(1, TOGETHER // max(1, rows * width))  # candidates at a time
    e = torch.cat([some(group, slice(0, 1))[0] for group in range(factor.shape[-1])], 1)
    for group in range(factor.shape[-1]):
        place = slice(group * width, min(columns, (group + 1) * width))
        h = hessian[:, place]
        left = e @ h - e[:, place] @ h[place]
        costs = []
        for start in range(0, len(RATIOS), together):
            tried = some(group, slice(start, start + together))
            costs.append(((tried @ h[place] + 2 * left) * tried).sum(-1))
        cost = torch.cat(costs)
        cost = cost.masked_fill_(~cost.isfinite(), torch.inf)
        by_block = cost.new_zeros(len(RATIOS), blocks).index_add_(1, block, cost)
        best = by_block.argmin(0)  # the first of those that are equal, which is the rule's
        chosen[:, group] = best
        mine = best[block].unsqueeze(0)
        own = None if zero is None else zero[:, :, group].gather(0, mine)[0]
        e[:, place] = errors(group, factor[:, :, group].gather(0, mine)[0], own)
    return {name: _picked([parts[name] for parts in candidates], name, chosen) for name in candidates[0]}


def _rule(weight: Tensor, fmt: Format, divisor: Tensor | None) -> Parts:
    parts: Parts = ops.quantize(weight, fmt, tensor_scale=divisor)
    del parts["qdata"]
    return parts


def _picked(parts: list[Tensor], name: str, chosen: Tensor) -> Tensor:
    """Of every group the part of its candidate."""
    if name == "tensor_scale":
        return parts[0]
    stacked = torch.stack([ops._bits(part).reshape(chosen.shape) for part in parts])
    found: Tensor = stacked.gather(0, chosen.unsqueeze(0))[0]
    return found.view(parts[0].dtype).view(parts[0].shape)
