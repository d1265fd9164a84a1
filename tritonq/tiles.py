"""Tiles of a tensor and of its parts, dealt out one after the other.

A tile is a `Box` in a slab of a tensor of any strides, and what belongs to it are contiguous pieces of contiguous
parts: its rows of codes and scales, and a scale or divisor of the whole tensor as it is. An operation that runs out of
memory over a tile puts it back and goes on with smaller ones, so nothing is lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonq import boxes, memory, tiling
from tritonq.boxes import Box
from tritonq.formats import Format, Shape


@dataclass(frozen=True)
class Tile:
    """A box of a slab of a tensor of `whole`, and its place in the parts of `fmt`."""

    slab: tiling.Matrix
    box: Box
    fmt: Format
    whole: Shape

    @property
    def shape(self) -> Shape:
        return self.box.shape

    @property
    def size(self) -> int:
        return self.box.size

    @property
    def first(self) -> int:
        """Row-major index of its first element."""
        batch, row, column = self.box.starts
        return self.slab.first(self.whole) + (batch * self.slab.rows + row) * self.slab.columns + column

    @property
    def columns(self) -> slice:
        return slice(self.box.starts[2], self.box.stops[2])

    def of_strided(self, x: Tensor) -> Tensor:
        """View [b, n, k] of the tensor that the tiles were planned for, of whatever strides."""
        m = self.slab
        view = x.as_strided((m.batch, m.rows, m.columns), m.strides, x.storage_offset() + m.offset)
        return view[tuple(map(slice, *self.box))]

    def of_values(self, y: Tensor) -> Tensor:
        """View [b, n, k] of a contiguous tensor of the same shape."""
        slab = y[self.slab.index].view(self.slab.batch, self.slab.rows, self.slab.columns)
        return slab[tuple(map(slice, *self.box))]

    def of_part(self, name: str, part: Tensor) -> Tensor:
        """View of the contiguous part `name` of `fmt.storage(whole)`, as `fmt.storage(shape)` describes it."""
        rows, columns = self.fmt.group
        if name == "tensor_scale" or (rows == -1 and name != "qdata"):
            return part
        batch, (_, row, column), (_, end_row, end_column) = slice(self.box.starts[0], self.box.stops[0]), *self.box
        if name == "qdata":
            bits = self.fmt.bits
            window = slice(row, end_row), slice(column * bits // 8, self.fmt.row_bytes(end_column))
        else:
            per = self.fmt.super_group if name.startswith("super_") else columns
            across = slice(0, 1) if per == -1 else slice(column // per, -(-end_column // per))
            window = slice(row // rows, -(-end_row // rows)), across
        return part[self.slab.index].view(self.slab.batch, -1, part.shape[-1])[batch, *window]


class Tiles:
    """The tiles of a tensor that are not done yet, for one worker or several.

    Args:
        shape, strides: of the tensor, in elements; it has some.
        fmt: what decides where it can be cut.
    """

    def __init__(self, shape: Shape, strides: Shape, fmt: Format) -> None:
        self.shape, self.fmt = tuple(shape), fmt
        rows, columns = boxes.granule(fmt, self.shape[-1])
        self.granules = 1, rows, self.shape[-1] if rows > 1 else columns  # a tile is one piece of every part
        slabs = tiling.matrices(self.shape, strides, fmt)
        self._pending = [(m, boxes.whole((m.batch, m.rows, m.columns))) for m in reversed(slabs)]
        self._lock = threading.Lock()

    def take(self, limit: int) -> Tile | None:
        """The next tile, of at most `limit` elements or one granule where that is more; None at the end."""
        with self._lock:
            if not self._pending:
                return None
            slab, box = self._pending.pop()
            stack = [box]
            found = boxes.take(stack, self.granules, limit)
            self._pending += [(slab, rest) for rest in stack]
            return Tile(slab, found, self.fmt, self.shape)

    def peek(self, limit: int) -> Tile | None:
        """What `take` would give."""
        with self._lock:
            if not self._pending:
                return None
            slab, box = self._pending[-1]
            return Tile(slab, boxes.take([box], self.granules, limit), self.fmt, self.shape)

    def put_back(self, tile: Tile) -> None:
        """A tile that was taken and is still to be done."""
        with self._lock:
            self._pending.append((tile.slab, tile.box))

    def stop(self) -> None:
        """Leave the rest undone."""
        with self._lock:
            self._pending.clear()

    def can_be_cut(self, tile: Tile) -> bool:
        return boxes.can_be_cut(tile.box, self.granules)

    def halved(self, tile: Tile, error: torch.OutOfMemoryError, device: torch.device) -> int:
        """Put back a tile that took too much memory; the limit to go on with.

        Raises:
            torch.OutOfMemoryError: it is the smallest tile there is.
        """
        if not self.can_be_cut(tile):
            raise torch.OutOfMemoryError(
                f"{self.fmt.name}: no memory on {device} for a tile of {tile.shape} elements of a tensor of "
                f"{self.shape}, which is the smallest that holds whole groups; {_free(device)}the workspace is "
                f"{memory.budget()} bytes. Free memory there, leave the result in host memory with "
                "output_device='cpu', or pass a format with smaller groups"
            ) from error
        self.put_back(tile)
        return tile.size // 2


def _free(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f"{free} of {total} bytes are free, "


def in_tiles(tiles: Tiles, limit: int, device: torch.device, step: Callable[[Tile], None]) -> None:
    """Run `step` over all tiles, over smaller ones where memory runs out."""
    while (tile := tiles.take(limit)) is not None:
        try:
            step(tile)
        except torch.OutOfMemoryError as error:
            limit = tiles.halved(tile, error, device)
