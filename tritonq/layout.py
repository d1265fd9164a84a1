"""Where the parts of a quantized tensor lie in its one buffer of bytes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonq.formats import Format, Shape
from tritonq.reference import Parts
from tritonq.tiling import contiguous_strides

Segment = tuple[str, int, Shape, Shape, torch.dtype]  # name, byte offset, shape, stride, dtype


@dataclass(frozen=True)
class Layout:
    """Where the parts of a quantized tensor of `shape` lie in its buffer of `nbytes` bytes."""

    format: Format
    shape: Shape
    segments: tuple[Segment, ...]
    nbytes: int

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def of(fmt: Format, shape: Shape) -> Layout:
        """The layout of a fresh tensor: parts one after the other, codes aligned to 256 bytes and scales to 16."""
        segments, end = [], 0
        for name, (part, dtype) in fmt.storage(shape).items():
            alignment = 256 if name == "qdata" else 16
            start = -(-end // alignment) * alignment
            segments.append((name, start, part, contiguous_strides(part), dtype))
            end = start + math.prod(part) * dtype.itemsize
        return Layout(fmt, shape, tuple(segments), end)

    def part(self, buf: Tensor, segment: Segment) -> Tensor:
        _, offset, shape, stride, dtype = segment
        extent = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1 if math.prod(shape) else 0
        return buf[offset : offset + extent * dtype.itemsize].view(dtype).as_strided(shape, stride)

    def parts(self, buf: Tensor) -> Parts:
        """Views of the parts by name, shaped as `format.storage(shape)` says."""
        return {segment[0]: self.part(buf, segment) for segment in self.segments}

    @functools.cached_property
    def offsets(self) -> dict[str, int] | None:
        """The first byte of each part, where all are contiguous and begin at multiples of 16."""
        found = {name: offset for name, offset, *_ in self.segments}
        runs = all(stride == contiguous_strides(shape) for _, _, shape, stride, _ in self.segments)
        return found if runs and not any(offset % 16 for offset in found.values()) else None
