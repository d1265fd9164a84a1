"""Cutting a tensor into tiles: boxes of whole groups and whole bytes that fit a budget.

Everything that goes over a tensor piece by piece is planned here: the CPU path (`tiling`), and what streams through
another device or has to keep its intermediates small (`tiles`, `scheduler`). A tensor is one or more slabs
[batch, N, K], a tile a range of each axis. Axes are cut from the outermost to the innermost, and one is cut only where
all before it are down to a granule; so with granules of one row every tile is one piece of a contiguous tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from tritonq.formats import Format, Shape


class Box(NamedTuple):
    """Ranges start .. stop of each axis."""

    starts: Shape
    stops: Shape

    @property
    def shape(self) -> Shape:
        return tuple(stop - start for start, stop in zip(self.starts, self.stops, strict=True))

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def whole(shape: Shape) -> Box:
    return Box((0,) * len(shape), tuple(shape))


def granule(fmt: Format, columns: int) -> tuple[int, int]:
    """(rows, columns) that tiles of a matrix hold multiples of: whole groups and whole bytes. One scale for the tensor,
    which is known before codes are, leaves the bytes."""
    rows, cols = fmt.group
    if rows == -1:
        return 1, 8
    aligned = columns if cols == -1 or cols >= columns else math.lcm(fmt.super_group or cols, 8)
    return rows, min(aligned, columns)


def take(stack: list[Box], granules: Shape, limit: int) -> Box:
    """The next box of at most `limit` elements, or of one granule where that is more; the rest stays on the stack."""
    starts, stops = stack.pop()
    for axis, step in enumerate(granules):
        extent = stops[axis] - starts[axis]
        others = math.prod(stops[i] - starts[i] for i in range(len(granules)) if i != axis)
        count = max(1, limit // (step * others)) * step
        if count < extent:
            end = starts[axis] + count
            stack.append(Box((*starts[:axis], end, *starts[axis + 1 :]), stops))
            stops = (*stops[:axis], end, *stops[axis + 1 :])
        if step * others <= limit:
            break
    return Box(starts, stops)


def cut(box: Box, granules: Shape, limit: int) -> Iterator[Box]:
    """Boxes of at most `limit` elements that make up a box, in the order of their elements."""
    stack = [box] if box.size else []
    while stack:
        yield take(stack, granules, limit)


def can_be_cut(box: Box, granules: Shape) -> bool:
    return any(extent > step for extent, step in zip(box.shape, granules, strict=True))
