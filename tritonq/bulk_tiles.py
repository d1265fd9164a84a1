"""What a launch over many tensors goes through: entries of its table, and into which tiles they are cut."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tritonq import plans, tiling, tuning
from tritonq.formats import Format, Shape
from tritonq.tiling import Matrix

ALIGNED = 16  # what the compiler likes to know that numbers are multiples of
_TURNED_ROWS = 32  # rows of a transposed tile of channels at most: two sectors of bf16
_TURNED_TILE = tuning.LARGEST_TILE // 2  # elements of such a tile: 32 a thread
Choice = dict[str, int] | None  # of `tuning`


@dataclass(frozen=True)
class View:
    """A tensor, or its transpose, that is quantized: number `source` of the tensors.

    Attributes:
        side: 0 or 1, which of two buffers takes its parts.
        parts: (name, byte offset) of each in that buffer.
    """

    source: int
    side: int
    shape: Shape
    strides: Shape
    parts: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class Views:
    """Views, hashed by identity: a program is looked up at every call."""

    all: tuple[View, ...]


@dataclass(frozen=True)
class Entry:
    """A slab of a view, and the fields of its row in the table that do not follow from tiles."""

    matrix: Matrix
    source: int
    turned: bool
    fields: dict[str, int]

    @property
    def size(self) -> int:
        return self.matrix.batch * self.matrix.rows * self.matrix.columns


def normalised(m: Matrix) -> Matrix:
    """Axes of one element get the stride that says most about the others."""
    batch, row, col = m.strides
    col = 1 if m.columns == 1 and row != 1 else col  # a single column of neighbours is one of tall tiles
    row = (0 if col == 1 else 1) if m.rows == 1 else row
    return Matrix(m.index, m.batch, m.rows, m.columns, (0 if m.batch == 1 else batch, row, col), m.offset)


def _entry(view: View, m: Matrix, fmt: Format, divisor: int) -> Entry:
    m = normalised(m)
    fields = {"side": view.side, "divisor": divisor, "row_bytes": fmt.row_bytes(m.columns), **dict(view.parts)}
    for name, (shape, dtype) in fmt.storage(view.shape).items() if m.index else ():
        if math.prod(shape) > 1:
            steps = tiling.contiguous_strides(shape)
            fields[name] += dtype.itemsize * sum(i * s for i, s in zip(m.index, steps, strict=False))
    return Entry(m, view.source, m.strides[2] != 1, fields)


def _no_elements(view: View, fmt: Format) -> Matrix:
    """Stands for a tensor without elements, whose groups may have scales all the same."""
    return Matrix((), 1, math.prod(view.shape[:-1]) if fmt.group == (1, -1) else 0, 0, (0, 0, 1), 0)


def entries_of(view: View, fmt: Format, divisor: int) -> list[Entry]:
    if math.prod(view.shape) == 0:
        scales = math.prod(fmt.scale_shape(view.shape)) > 0
        return [_entry(view, _no_elements(view, fmt), fmt, divisor)] if scales or fmt.tensor_scale else []
    return [_entry(view, m, fmt, divisor) for m in plans._geometry(view.shape, view.strides, fmt)]


def whole_tensor(view: View, divisor: int) -> list[Entry]:
    """Slabs of a tensor, in any order of its elements."""
    if math.prod(view.shape) == 0:
        slabs = [Matrix((), 1, 0, 0, (0, 0, 1), 0)]
    else:
        shape, strides = view.shape, view.strides
        if len(shape) > 1 and strides[-2] == 1:
            shape, strides = (*shape[:-2], shape[-1], shape[-2]), (*strides[:-2], strides[-1], strides[-2])
        slabs = [normalised(m) for m in plans._geometry(shape, strides, plans._ONE_GROUP)]
    entries = []
    for m in slabs:
        parts = {name: start for name, start in view.parts if name != "qdata"}
        fields = {"side": view.side, "divisor": divisor, "row_bytes": 0, **parts}
        entries.append(Entry(m, view.source, m.strides[2] != 1, fields))
    return entries


# --------------------------------------------------------------------------------------------------------- tiles


@dataclass(frozen=True)
class Tiling:
    """How entries of one kind are cut: extents of a tile in groups, or in elements where `fmt` is None."""

    config: dict[str, int]
    fmt: Format | None

    def tiles(self, m: Matrix) -> tuple[int, int]:
        if self.fmt is None:
            return -(-m.rows // self.config["BLOCK_M"]), -(-m.columns // self.config["BLOCK_N"])
        rows, cols = self.fmt.group
        group_rows, group_columns = -(-m.rows // rows), 1 if cols == -1 else -(-m.columns // cols)
        return -(-group_rows // self.config["M"]), -(-group_columns // self.config["GROUPS"])

    def programs(self, m: Matrix) -> int:
        return max(1, m.batch * math.prod(self.tiles(m)))

    @property
    def lanes(self) -> int:
        """Elements of a tile of groups, padding included."""
        return math.prod(self.config[k] for k in ("S", "M", "R", "GROUPS", "W"))


def by_size(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: -entry.size)


def group_tiling(entries: list[Entry], fmt: Format, mode: str, choice: Choice, beside: Tiling | None) -> Tiling:
    """Tiles for entries of neighbouring columns: of the choices for single ones that which covers all with the fewest
    lanes. `beside` others in one launch, which share the number of warps, a thread has as much to do as usual."""
    total, cols = sum(entry.size for entry in entries), fmt.group[1]
    widest = max(entry.matrix.columns for entry in entries)
    sizes = dict.fromkeys((e.matrix.rows, widest if cols == -1 else e.matrix.columns) for e in by_size(entries))
    least = tuning.TILE // 4  # lanes that a program costs, however few it has
    if beside is not None:
        choice = {"TILE": max(tuning.TILE, beside.lanes // 2)}
    choice = choice or tuning._group_choice(total, fmt, mode)
    whole = cols != -1 and all(entry.matrix.columns % cols == 0 for entry in entries)
    found: list[tuple[int, int, Tiling]] = []
    for rows, columns in list(sizes)[:8]:
        config = tuning.group_config(max(1, rows), max(1, columns), fmt, mode, choice)[0]
        if config["S"] > 1 and cols == tuning._power(cols) and not whole:  # slices are of whole groups
            config.update(S=1, W=config["S"] * config["W"])
        own = Tiling(config, fmt)
        if all(own != seen for _, _, seen in found):
            programs = sum(own.programs(entry.matrix) for entry in entries)
            found.append((programs * max(least, own.lanes), len(found), own))
    return min(found)[2]


def turned_group_tiling(entries: list[Entry], fmt: Format) -> Tiling:
    """Tiles for entries of neighbouring rows, as `tuning.both_config` has them; of channels as many rows as fit."""
    largest = by_size(entries)[0].matrix
    r, c = tuning._padded_group(fmt, max(1, max(entry.matrix.columns for entry in entries)))
    c = max(c, 8) if fmt.group[1] == -1 else c
    group_rows, group_columns = -(-largest.rows // fmt.group[0]), -(-largest.columns // max(1, fmt.group[1]))
    groups = max(min(max(1, tuning.WRITTEN_COLUMNS // c), tuning._power(group_columns)), 8 // c, fmt.super_group // c)
    if fmt.group[1] == -1 or fmt.super_group:
        m = min(_TURNED_ROWS // (2 if fmt.super_group else 1), max(1, _TURNED_TILE // (c * groups)))
    else:
        m = max(1, tuning.TILE // (2 * r * c * groups))
    m = min(m, tuning._power(group_rows))
    own = Tiling({"S": 1, "M": m, "R": r, "GROUPS": groups, "W": c}, fmt)
    per_thread = 32 if r == 1 and own.lanes > 2 * tuning.TILE else 16  # turning a tile takes registers
    warps = tuning._warps(own.lanes, None if r > 1 and own.lanes > 2 * tuning.TILE else per_thread)
    return Tiling({**own.config, "num_warps": warps}, fmt)


def too_long(view: View, fmt: Format) -> bool:
    """Whether rows that are groups fit no tile of `grouped_kernel`."""
    turned = view.strides[-1] != 1 and fmt.group == (1, -1)
    columns = view.shape[-1]
    return tuning.loops_over_rows(fmt, columns) or (turned and tuning._power(columns) > _TURNED_TILE)


def apply_tiling(entries: list[Entry], fmt: Format, choice: Choice) -> Tiling:
    m = by_size(entries)[0].matrix
    return Tiling(tuning.flat_config(m.rows, m.columns, fmt, "apply", choice), None)


def _known(entries: list[Entry], own: Tiling, aligned: bool, bytes_of: Iterable[str]) -> int:
    """What 16 divides in all of them: bits as in `kernels.grouped`."""
    flat = all(e.matrix.batch == 1 and own.tiles(e.matrix)[0] <= 1 for e in entries)
    return multiples(entries, aligned, bytes_of) | 8 * flat


def multiples(entries: list[Entry], aligned: bool, bytes_of: Iterable[str]) -> int:
    def all_of(numbers: Iterable[int]) -> bool:
        return all(n % ALIGNED == 0 for n in numbers)

    other = [(e.matrix.strides[0], e.matrix.strides[2 if e.turned else 1], e.matrix.offset) for e in entries]
    sizes = aligned and all(map(all_of, other))
    extents = all_of(e.matrix.rows if e.turned else e.matrix.columns for e in entries)
    names = [name for name in bytes_of if name in entries[0].fields]
    offsets = all(all_of((e.fields["row_bytes"], *[e.fields[name] for name in names])) for e in entries)
    return sizes + 2 * extents + 4 * offsets


def unit(entries: list[Entry]) -> bool:
    return all(e.matrix.strides[1 if e.turned else 2] == 1 for e in entries)


PARTS = ("qdata", "scale", "zero_point", "group_minimum", "super_scale", "super_minimum")


def kind(entries: list[Entry], own: Tiling | None, fmt: Format, aligned: bool, parts: Sequence[str]) -> list[int]:
    """UNIT, KNOWN, PARTIAL and WORDS of a kernel for one kind of entries."""
    if own is None:
        return [False, 0, False, False]
    partial = any(e.matrix.columns * fmt.bits % 8 for e in entries)
    words = all(tuning.in_words(fmt, e.matrix.columns, own.config) and e.fields["qdata"] % 4 == 0 for e in entries)
    return [unit(entries), _known(entries, own, aligned, parts), partial, words]
