"""Scales in the 128 x 4 tiles that block-scaled matrix multiplications of Blackwell read.

Scales [..., R, C] (R rows, one scale per group along them) are padded with zero bytes to [R', C'], multiples of 128 and
4, and cut into tiles of 128 x 4, which follow each other row by row. Inside its tile the scale of row i and column j
lies at byte (i % 32) * 16 + (i / 32) * 4 + j. (cuBLAS, "1D Block Scaling Factors Layout"; PTX ISA, tcgen05.mma
block scaling.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritonq.formats import Format, Shape

ROWS, COLUMNS = 128, 4  # of a tile


def padded(rows: int, columns: int) -> tuple[int, int]:
    """(R', C') of R x C scales."""
    return -(-rows // ROWS) * ROWS, -(-columns // COLUMNS) * COLUMNS


def swizzled_shape(shape: Shape) -> Shape:
    """[..., R, C] to [..., R' * C']."""
    if len(shape) < 2:
        raise ValueError(f"swizzled scales are matrices [..., rows, columns], got shape {tuple(shape)}; reshape them")
    return (*shape[:-2], math.prod(padded(shape[-2], shape[-1])))


def check_format(fmt: Format) -> None:
    """ValueError where the scales of `fmt` have no swizzled layout."""
    if fmt.group[0] != 1 or fmt.group[1] == -1 or fmt.scale.bits != 8 or fmt.zero_point:
        raise ValueError(
            f"swizzled scales are bytes of groups along a row without zero points, {fmt.name} has {fmt.scale.name} "
            f"scales of groups {fmt.group}; quantize it without swizzled, or take a format such as mxfp8 or nvfp4"
        )


def _bytes(part: Tensor) -> Tensor:
    """8-bit floats as bytes: torch can do little more with them than cast."""
    return part.view(torch.uint8) if part.dtype.itemsize == 1 else part


def swizzle(scale: Tensor) -> Tensor:
    """Scales [..., R, C] in the order of Blackwell's 128 x 4 tiles: [..., R' * C'], with R and C rounded up to
    multiples of 128 and 4 and zero bytes in between.

    Args:
        scale: `QTensor.scale`, or the "scale" of `ops.quantize`, of an MX format or nvfp4; any dtype, any device.

    Raises:
        ValueError: fewer than two dimensions.
    """
    rows, columns = padded(*scale.shape[-2:]) if scale.ndim >= 2 else (0, 0)
    shape = swizzled_shape(tuple(scale.shape))  # raises where there are no rows
    plain = _bytes(scale)
    plain = torch.nn.functional.pad(plain, (0, columns - scale.shape[-1], 0, rows - scale.shape[-2]))
    tiles = plain.reshape(*shape[:-1], rows // ROWS, 4, 32, columns // COLUMNS, COLUMNS)
    # [..., tile row, i / 32, i % 32, tile column, j] to [..., tile row, tile column, i % 32, i / 32, j]
    return tiles.transpose(-4, -2).reshape(shape).view(scale.dtype)


def unswizzle(swizzled: Tensor, shape: Shape) -> Tensor:
    """Inverse of `swizzle`: scales of `shape` [..., R, C], without the padding.

    Raises:
        ValueError: `swizzled` does not have the number of elements that scales of `shape` have.
    """
    shape = tuple(shape)
    flat = swizzled_shape(shape)
    if swizzled.numel() != math.prod(flat):
        raise ValueError(
            f"scales of shape {shape} take {math.prod(flat)} elements in 128 x 4 tiles, got {swizzled.numel()}; pass "
            "the shape of the scales before they were swizzled, such as fmt.scale_shape(x.shape)"
        )
    rows, columns = padded(shape[-2], shape[-1])
    tiles = _bytes(swizzled).reshape(*shape[:-2], rows // ROWS, columns // COLUMNS, 32, 4, COLUMNS)
    plain = tiles.transpose(-4, -2).reshape(*shape[:-2], rows, columns)[..., : shape[-2], : shape[-1]]
    return plain.contiguous().view(swizzled.dtype)
