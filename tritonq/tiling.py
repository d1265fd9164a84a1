"""Tiles: how a tensor of any rank and strides becomes matrices for a kernel, and the CPU path.

The CPU path runs the torch reference on tiles whose fp32 intermediates take 3 MiB a thread, in buffers that it reuses:
naive eager code spends most of its time in page faults of fresh intermediates.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tritonq import boxes, memory, reference
from tritonq.codecs import philox, super_scale
from tritonq.codecs import scale as scales
from tritonq.codecs import search as search_codec
from tritonq.codecs.scratch import reuse
from tritonq.formats import SUPER_PARTS, ElementType, Format, Shape

SCRATCH = 3 << 20  # bytes of fp32 intermediates of a CPU tile, per thread


@dataclass(frozen=True)
class Matrix:
    """A slab of a tensor as [batch, N, K] with element strides, and where it lies among its leading indices.

    `index` selects the slab from tensors that have the same leading axes.
    """

    index: tuple[int, ...]
    batch: int
    rows: int
    columns: int
    strides: tuple[int, int, int]
    offset: int  # elements from the start of the tensor

    def first(self, shape: Shape) -> int:
        """Row-major index of its first element in the tensor of `shape`."""
        index = 0
        for i, size in zip(self.index, shape, strict=False):
            index = index * size + i
        return index * self.batch * self.rows * self.columns


def _merge(sizes: list[int], strides: list[int]) -> list[tuple[int, int, int]]:
    """Axes (size, stride, number of axes merged) after joining neighbours that are laid out as one."""
    merged: list[tuple[int, int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if merged and (size == 1 or merged[-1][1] == stride * size or merged[-1][0] == 1):
            last_size, last_stride, count = merged[-1]
            merged[-1] = (last_size * size, last_stride if size == 1 else stride, count + 1)
        else:
            merged.append((size, stride, 1))
    return merged


def is_contiguous(shape: Shape, strides: Shape) -> bool:
    """Whether elements follow each other in order."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def contiguous_strides(shape: Shape) -> Shape:
    """Strides of a contiguous tensor."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def matrices(of_shape: Shape, of_strides: Shape, fmt: Format) -> list[Matrix]:
    """The fewest [batch, N, K] slabs that need no copy. Rows of a block format stay whole matrices."""
    shape, strides = list(of_shape), list(of_strides)
    keep = 2 if fmt.group[0] > 1 else 1
    lead = _merge(shape[:-keep], strides[:-keep])
    inner = [(shape[-2], strides[-2], 1)] if keep == 2 else []
    while len(lead) + len(inner) < 2:
        lead.insert(0, (1, 0, 0))
    outer, (batch, row) = lead[: len(lead) + len(inner) - 2], (lead + inner)[-2:]
    axes = sum(count for _, _, count in outer)
    result = []
    for index in _indices(shape[:axes]):
        offset = sum(i * s for i, s in zip(index, strides, strict=False))
        result.append(Matrix(index, batch[0], row[0], shape[-1], (batch[1], row[1], strides[-1]), offset))
    return result


def _indices(shape: list[int]) -> Iterator[tuple[int, ...]]:
    if not shape:
        yield ()
        return
    for i in range(shape[0]):
        for rest in _indices(shape[1:]):
            yield (i, *rest)


# ---------------------------------------------------------------------------------------------------- the CPU path


@dataclass(frozen=True)
class _Slab:
    """Matching 2-D views of x (or y) and of the parts."""

    x: Tensor
    qdata: Tensor | None
    scale: Tensor
    zero_point: Tensor | None
    supers: reference.Parts  # parts that only formats with super-groups have
    first: int  # row-major index of its first element in the whole tensor


def _slabs(
    x: Tensor,
    qdata: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    fmt: Format,
    parts: reference.Parts | None = None,
    before: int = 0,
) -> Iterator[_Slab]:
    """2-D slabs of x without copying it; parts are contiguous. `parts` may hold those of super-groups. So many elements
    are `before` x in the tensor that it is a tile of."""
    supers = {name: part for name, part in (parts or {}).items() if name in SUPER_PARTS}
    per_tensor = fmt.group[0] == -1
    for m in matrices(tuple(x.shape), x.stride(), fmt):
        for b in range(m.batch):
            view = x.as_strided((m.rows, m.columns), m.strides[1:], x.storage_offset() + m.offset + b * m.strides[0])

            def part(t: Tensor | None, m: Matrix = m, b: int = b) -> Tensor | None:
                return None if t is None else t[m.index].reshape(m.batch, -1, t.shape[-1])[b]

            first = before + m.first(tuple(x.shape)) + b * m.rows * m.columns
            if per_tensor:
                yield _Slab(view, part(qdata), scale, zero_point, {}, first)
            else:
                found = part(scale)
                assert found is not None
                own = {name: one for name, t in supers.items() if (one := part(t)) is not None}
                yield _Slab(view, part(qdata), found, part(zero_point), own, first)


_RANDOM = 7  # fp32 tensors' worth of scratch of stochastic rounding: counters, u, neighbours


# Tiles are smaller where more than fp32 numbers is held of them: making codes, decoding them, gradients.
_ENCODED, _DECODED, _CLIPPED = 1 / 2, 3 / 4, 1 / 2


def _budget(x: Tensor, fmt: Format, stochastic: bool = False, share: float = 1.0) -> int:
    """Elements of a tile of x."""
    keeps = max(fmt.element.codec.scratch, 1 if fmt.scale.signed_range else 2)  # |x| beside x
    keeps += fmt.group[1] > 0 and x.shape[-1] % fmt.group[1] > 0  # padded groups are copies
    keeps += _RANDOM * stochastic + bool(fmt.super_group)
    if x.device.type != "cpu":
        return max(1, memory.budget() // (4 * (keeps + 2)))  # buffers are not reused there
    return int(SCRATCH // (4 * keeps) * torch.get_num_threads() * share)


@dataclass(frozen=True)
class _Tile:
    """A window of a slab with its format: inside one large group, that of a single scale."""

    rows: slice
    cols: slice
    scale_rows: slice
    scale_cols: slice
    fmt: Format

    def of(self, part: Tensor | None) -> Tensor | None:
        """The scales of this window."""
        if part is None or part.ndim == 1:
            return part
        return part[self.scale_rows, self.scale_cols]

    def scales(self, slab: _Slab) -> reference.Parts:
        """All parts of this window but the codes, of a format with super-groups."""
        size = self.fmt.super_group
        supers = self.scale_rows, slice(self.cols.start // size, -(-self.cols.stop // size))
        found = {"scale": slab.scale[self.scale_rows, self.scale_cols]}
        for name, part in slab.supers.items():
            found[name] = part[supers] if name.startswith("super_") else part[self.scale_rows, self.scale_cols]
        return found

    def loaded(self, slab: _Slab) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of this window, or their fp32 factors and minima; see `reference`."""
        if self.fmt.super_group:
            return super_scale.load(self.scales(slab), self.fmt)
        scale = self.of(slab.scale)
        assert scale is not None
        return scale, self.of(slab.zero_point)

    def codes(self, qdata: Tensor) -> Tensor:
        """The bytes of this window; it begins at a whole byte and ends at one, or at the end of the row."""
        bits = self.fmt.bits
        return qdata[self.rows, self.cols.start * bits // 8 : -(-self.cols.stop * bits // 8)]


def _windows(slab: Tensor, fmt: Format, budget: int) -> Iterator[list[_Tile]]:
    """Tiles of a matrix, listed together where they share one scale: a group that is larger than a tile."""
    rows, columns = slab.shape
    if rows == 0 or columns == 0:
        return
    r, c = fmt.group
    row_step, col_step = boxes.granule(fmt, columns)
    # Groups that do not end at whole bytes cannot be cut, nor can super-groups.
    if r != -1 and (row_step * col_step <= budget or (c > 0 and c % 8) or fmt.super_group):
        for (i, j), (last_row, last_col) in boxes.cut(boxes.whole((rows, columns)), (row_step, col_step), budget):
            scale_cols = slice(0, 1) if c == -1 else slice(j // c, -(-last_col // c))
            yield [_Tile(slice(i, last_row), slice(j, last_col), slice(i // r, -(-last_row // r)), scale_cols, fmt)]
        return
    single = replace(fmt, group=(-1, -1))
    group_rows, group_cols = (rows if r == -1 else r), (columns if c == -1 else c)
    for i, j in itertools.product(range(0, rows, group_rows), range(0, columns, group_cols)):
        scale = slice(i // group_rows, i // group_rows + 1), slice(j // group_cols, j // group_cols + 1)
        group = boxes.Box((i, j), (min(i + group_rows, rows), min(j + group_cols, columns)))
        inside = boxes.cut(group, boxes.granule(single, columns), budget)
        yield [_Tile(slice(top, end), slice(left, right), *scale, single) for (top, left), (end, right) in inside]


def _load(slab: _Slab, tile: _Tile) -> Tensor:
    return reference.to_float32(slab.x[tile.rows, tile.cols])


_Shared = list[tuple[_Slab, _Tile]]  # tiles of one large group, or one tile of whole groups


def _choose(tiles: _Shared, fmt: Format, divisor: Tensor | None) -> Tensor | None:
    """Fill the scales and zero points of a tile, or of the one group that several tiles make up; returns the fp32
    elements where it is one tile, so that they are not loaded twice."""
    x = _load(*tiles[0])
    hi, lo = reference.group_range(x, tiles[0][1].fmt)
    if len(tiles) > 1:
        hi, lo = hi.clone(), lo.clone()
    for slab, tile in tiles[1:]:  # a list of results would pin the heap between the tiles
        high, low = reference.group_range(_load(slab, tile), tile.fmt)
        hi, lo = torch.maximum(hi, high), torch.minimum(lo, low)
    slab, tile = tiles[0]
    if fmt.super_group:
        own = tile.scales(slab)
        for name, part in super_scale.choose(hi, lo, fmt).items():
            own[name].copy_(part)
        return x
    chosen, zero = scales.choose(hi, lo, fmt, divisor)
    for target, values in ((tile.of(slab.scale), chosen), (tile.of(slab.zero_point), zero)):
        if target is not None and values is not None:
            target.copy_(values.view(target.shape))
    return x if len(tiles) == 1 else None


def _uniform(slab: _Slab, tile: _Tile, seed: int | None) -> Tensor | None:
    """The random numbers of a tile's elements, or None for rounding to nearest."""
    if seed is None:
        return None
    columns = slab.x.shape[1]
    first = slab.first + tile.rows.start * columns + tile.cols.start
    size = tile.rows.stop - tile.rows.start, tile.cols.stop - tile.cols.start
    return philox.uniform(seed, first, *size, columns, slab.x.device)


def _apply(
    slab: _Slab, tile: _Tile, x: Tensor, divisor: Tensor | None, given: bool, y: Tensor | None, seed: int | None
) -> None:
    """Codes, or values of `y`, of a tile whose scales are known; overwrites the fp32 elements x."""
    scale, zero = tile.loaded(slab)
    assert slab.qdata is not None
    u = _uniform(slab, tile, seed)
    if y is None:
        tile.codes(slab.qdata).copy_(reference.encode(x, scale, zero, divisor, tile.fmt, given, u))
    else:
        values = reference.encode_decode(x, scale, zero, divisor, tile.fmt, y.dtype, given, u)
        slab.qdata[tile.rows, tile.cols].copy_(values)


def tensor_scale(x: Tensor, fmt: Format) -> Tensor:
    """The tensor-wide divisor, fp32 [1], tile by tile."""
    amax = torch.zeros((), device=x.device)
    budget = _budget(x, fmt)
    whole = replace(fmt, group=(-1, -1))
    with reuse():
        for slab in list(_slabs(x, None, amax.reshape(1), None, whole)):
            for tile in itertools.chain.from_iterable(_windows(slab.x, whole, budget)):
                amax = torch.maximum(amax, reference.finite_amax(_load(slab, tile)))
    return scales.choose_tensor_scale(amax, fmt)


def choose(x: Tensor, fmt: Format, parts: reference.Parts) -> None:
    """Fill all parts but the codes."""
    encode(x, fmt, parts, given=False, scales_only=True)


def _rows_of_groups(x: Tensor, fmt: Format) -> Tensor:
    """[n, R, C]: the groups of a matrix of whole groups, each on two axes of its own; all its rows for one group."""
    if fmt.group[0] == -1:
        return x.unsqueeze(1)
    groups = reference.grouped(x, fmt)
    if fmt.group[0] == 1:
        return groups.reshape(-1, 1, groups.shape[-1])
    return groups.transpose(1, 2).reshape(-1, *fmt.group)


# Elements of a tile of `search`, per thread and at most: every candidate passes over it with a scale a group, and inner
# loops run over neighbouring groups, which have to be many.
SEARCHED, MOST_SEARCHED = 1 << 19, 1 << 21


@reuse()
def search(x: Tensor, fmt: Format, parts: reference.Parts, importance: Tensor | None) -> None:
    """Replace parts["scale"] (and zero_point), which hold what the rule gives, by the best of `codecs.search`."""
    divisor = parts.get("tensor_scale")
    slabs = list(_slabs(x, None, parts["scale"], parts.get("zero_point"), fmt))
    whole = fmt.group[0] == -1
    budget = min(SEARCHED * torch.get_num_threads(), MOST_SEARCHED)

    def load(slab: _Slab, rows: slice, cols: slice) -> tuple[Tensor, Tensor | None]:
        values = reference.to_float32(slab.x[rows, cols])  # copied again by the search before it is reused
        weights = None if importance is None else importance[cols].expand(values.shape)
        return _rows_of_groups(values, fmt), None if weights is None else _rows_of_groups(weights, fmt)

    if whole:
        step = max(1, budget // max(1, x.shape[-1]))

        def chunks() -> Iterator[tuple[Tensor, Tensor | None]]:
            for slab in slabs:
                for i in range(0, slab.x.shape[0], step):
                    yield load(slab, slice(i, i + step), slice(None))

        scale, zeros = parts["scale"], parts.get("zero_point")
        _store_found(scale, zeros, *search_codec.best(chunks, scale, zeros, divisor, fmt))
        return
    for slab in slabs:
        rows, columns = slab.x.shape
        r, c = fmt.group[0], columns if fmt.group[1] == -1 else fmt.group[1]
        col_step = max(1, budget // (r * c)) * c
        row_step = max(1, budget // (r * min(columns, col_step))) * r
        for i, j in itertools.product(range(0, rows, row_step), range(0, columns, col_step)):
            end_row, end_col = min(i + row_step, rows), min(j + col_step, columns)
            window = slice(i // r, -(-end_row // r)), slice(j // c, -(-end_col // c))
            scale = slab.scale[window]
            zeros = None if slab.zero_point is None else slab.zero_point[window]
            loaded = [load(slab, slice(i, end_row), slice(j, end_col))]
            flat = None if zeros is None else zeros.reshape(-1)
            _store_found(scale, zeros, *search_codec.best(loaded.copy, scale.reshape(-1), flat, divisor, fmt))


def _store_found(target: Tensor, zero_target: Tensor | None, scale: Tensor, zero: Tensor | None) -> None:
    target.copy_(scale.view(target.shape))
    if zero_target is not None and zero is not None:
        zero_target.copy_(zero.view(zero_target.shape))


def clip_gradient(x: Tensor, dy: Tensor, fmt: Format, parts: reference.Parts, dx: Tensor) -> None:
    """dx = dy where x / scale lies within the element's range, 0 elsewhere; dy and dx contiguous."""
    scale, zero_point, divisor = parts["scale"], parts.get("zero_point"), parts.get("tensor_scale")
    gradients = _slabs(dy, dx, scale, zero_point, fmt)
    for slab, gradient in zip(_slabs(x, dx, scale, zero_point, fmt, parts), gradients, strict=True):
        for tiles in _windows(slab.x, fmt, _budget(x, fmt, share=_CLIPPED)):
            for tile in tiles:
                tile_scale, tile_zero = tile.loaded(slab)
                assert slab.qdata is not None
                clipped = reference.clipped(_load(slab, tile), tile_scale, tile_zero, divisor, tile.fmt)
                slab.qdata[tile.rows, tile.cols] = gradient.x[tile.rows, tile.cols].masked_fill(clipped, 0.0)


def encode(
    x: Tensor, fmt: Format, parts: reference.Parts, given: bool, y: Tensor | None = None, scales_only: bool = False,
    seed: int | None = None, first: int = 0,
) -> None:  # fmt: skip
    """Fill parts["scale"] (and what goes with it) unless `given`, and parts["qdata"], or with `y` that tensor (QDQ).
    With a seed, rounding is stochastic, and `first` is the index of the first element of x in the tensor that it is a
    tile of."""
    scale, zero_point = parts["scale"], parts.get("zero_point")
    out = None if scales_only else parts["qdata"] if y is None else y
    budget = _budget(x, fmt, seed is not None, 1.0 if scales_only or y is not None else _ENCODED)
    slabs = list(_slabs(x, out, scale, zero_point, fmt, parts, first))
    groups = [[(slab, tile) for tile in tiles] for slab in slabs for tiles in _windows(slab.x, fmt, budget)]
    if fmt.group[0] == -1:
        groups = [list(itertools.chain.from_iterable(groups))]
    divisor = parts.get("tensor_scale")
    with reuse():
        for tiles in groups:
            loaded = None if given else _choose(tiles, fmt, divisor)
            for slab, tile in [] if scales_only else tiles:
                _apply(slab, tile, _load(slab, tile) if loaded is None else loaded, divisor, given, y, seed)


def decode(fmt: Format, parts: reference.Parts, y: Tensor) -> None:
    """Fill contiguous y with dequantized values."""
    divisor, budget = parts.get("tensor_scale"), _budget(y, fmt, share=_DECODED)
    slabs = list(_slabs(y, parts["qdata"], parts["scale"], parts.get("zero_point"), fmt, parts))
    tiles = [(slab, tile) for slab in slabs for group in _windows(slab.x, fmt, budget) for tile in group]
    with reuse():
        for slab, tile in tiles:
            scale, zero = tile.loaded(slab)
            assert slab.qdata is not None
            window = slab.x[tile.rows, tile.cols]
            codes, shape = tile.codes(slab.qdata), tuple(window.shape)
            window.copy_(reference.decode(codes, scale, zero, divisor, tile.fmt, shape, y.dtype))


@reuse()
def cast(x: Tensor, y: Tensor, element: ElementType) -> None:
    """Fill y, of x's shape and dtype, with x rounded to numbers of a minifloat; any strides, and y may be x."""
    budget = SCRATCH // (4 * element.codec.scratch) * (torch.get_num_threads() if x.device.type == "cpu" else 64)
    if x.numel() <= budget:
        y.copy_(reference.cast(x, element, y.dtype))
        return
    step = max(1, budget * len(x) // x.numel())
    for source, target in zip(x.split(step), y.split(step), strict=True):
        cast(source[0], target[0], element) if len(source) == 1 else cast(source, target, element)


__all__ = ["Matrix", "Shape", "cast", "decode", "encode", "matrices", "tensor_scale"]
