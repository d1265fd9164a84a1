"""From many tensors to a few launches of `kernels.grouped`, whatever the number of tensors.

A `Program` is made from shapes, strides and places of results, once, and kept; a call adds where the tensors lie. Its
table goes to the device in one copy from pinned memory, and stays there for the next call with tensors that lie
together in the same way. So calls do not wait for the device. A CUDA graph holds the copy, from memory that is never
freed.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tritonq import plans, tiling, tuning, tuning_cache
from tritonq.formats import Format, Shape
from tritonq.launch import Plan
from tritonq.tiling import Matrix

_KEPT = 8  # tables of a program: places that its tensors take turns in
_TURNED_ROWS = 32  # rows of a transposed tile of channels at most: two sectors of bf16
_TURNED_TILE = tuning.LARGEST_TILE // 2  # elements of such a tile: 32 a thread
_ROWS = 32  # of a transposed tile of `grouped_apply_kernel`
_ALIGNED = 16


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


@dataclass(frozen=True)
class Step:
    """One launch: rows first:last of the table, and which of the tensors it takes."""

    plan: Plan
    first: int
    last: int
    tensors: tuple[str, ...]


@dataclass
class Program:
    """Launches over a table whose entries lack where the tensors lie.

    Attributes:
        keys: groups and tensors whose maxima are collected in memory.
        divisors: tensor scales that are computed.
    """

    steps: tuple[Step, ...]
    table: Tensor  # int64 [entries, fields] on the CPU
    sources: Tensor  # int64 [entries]: the tensor of each
    keys: int
    divisors: int
    uploaded: OrderedDict[Any, Tensor] = field(default_factory=OrderedDict)
    captured: dict[tuple[int, ...], Tensor] = field(default_factory=dict)  # what CUDA graphs copy, by the same offsets


# ------------------------------------------------------------------------------------------------------- entries


def _matrix(m: Matrix) -> Matrix:
    """Axes of one element get the stride that says most about the others."""
    batch, row, col = m.strides
    col = 1 if m.columns == 1 and row != 1 else col  # a single column of neighbours is one of tall tiles
    row = (0 if col == 1 else 1) if m.rows == 1 else row
    return Matrix(m.index, m.batch, m.rows, m.columns, (0 if m.batch == 1 else batch, row, col), m.offset)


def _entry(view: View, m: Matrix, fmt: Format, divisor: int) -> Entry:
    m = _matrix(m)
    fields = {"side": view.side, "divisor": divisor, "row_bytes": fmt.row_bytes(m.columns), **dict(view.parts)}
    for name, (shape, dtype) in fmt.storage(view.shape).items() if m.index else ():
        if math.prod(shape) > 1:
            steps = tiling.contiguous_strides(shape)
            fields[name] += dtype.itemsize * sum(i * s for i, s in zip(m.index, steps, strict=False))
    return Entry(m, view.source, m.strides[2] != 1, fields)


def _no_elements(view: View, fmt: Format) -> Matrix:
    """Stands for a tensor without elements, whose groups may have scales all the same."""
    return Matrix((), 1, math.prod(view.shape[:-1]) if fmt.group == (1, -1) else 0, 0, (0, 0, 1), 0)


def _entries(view: View, fmt: Format, divisor: int) -> list[Entry]:
    if math.prod(view.shape) == 0:
        scales = math.prod(fmt.scale_shape(view.shape)) > 0
        return [_entry(view, _no_elements(view, fmt), fmt, divisor)] if scales or fmt.tensor_scale else []
    return [_entry(view, m, fmt, divisor) for m in plans._geometry(view.shape, view.strides, fmt)]


# --------------------------------------------------------------------------------------------------------- tiles


@dataclass(frozen=True)
class _Tiling:
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


_Choice = dict[str, int] | None


def _by_size(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: -entry.size)


def _group_tiling(entries: list[Entry], fmt: Format, mode: str, choice: _Choice, beside: _Tiling | None) -> _Tiling:
    """Tiles for entries of neighbouring columns: of the choices for single ones that which covers all with the fewest
    lanes. `beside` others in one launch, which share the number of warps, a thread has as much to do as usual."""
    total, cols = sum(entry.size for entry in entries), fmt.group[1]
    widest = max(entry.matrix.columns for entry in entries)
    sizes = dict.fromkeys((e.matrix.rows, widest if cols == -1 else e.matrix.columns) for e in _by_size(entries))
    least = tuning.TILE // 4  # lanes that a program costs, however few it has
    if beside is not None:
        choice = {"TILE": max(tuning.TILE, beside.lanes // 2)}
    choice = choice or tuning._group_choice(total, fmt, mode)
    whole = cols != -1 and all(entry.matrix.columns % cols == 0 for entry in entries)
    found: list[tuple[int, int, _Tiling]] = []
    for rows, columns in list(sizes)[:8]:
        config = tuning.group_config(max(1, rows), max(1, columns), fmt, mode, choice)[0]
        if config["S"] > 1 and cols == tuning._power(cols) and not whole:  # slices are of whole groups
            config.update(S=1, W=config["S"] * config["W"])
        own = _Tiling(config, fmt)
        if all(own != seen for _, _, seen in found):
            programs = sum(own.programs(entry.matrix) for entry in entries)
            found.append((programs * max(least, own.lanes), len(found), own))
    return min(found)[2]


def _turned_group_tiling(entries: list[Entry], fmt: Format) -> _Tiling:
    """Tiles for entries of neighbouring rows, as `tuning.both_config` has them; of channels as many rows as fit."""
    largest = _by_size(entries)[0].matrix
    r, c = tuning._padded_group(fmt, max(1, max(entry.matrix.columns for entry in entries)))
    c = max(c, 8) if fmt.group[1] == -1 else c
    group_rows, group_columns = -(-largest.rows // fmt.group[0]), -(-largest.columns // max(1, fmt.group[1]))
    groups = max(min(max(1, tuning.WRITTEN_COLUMNS // c), tuning._power(group_columns)), 8 // c, fmt.super_group // c)
    if fmt.group[1] == -1 or fmt.super_group:
        m = min(_TURNED_ROWS // (2 if fmt.super_group else 1), max(1, _TURNED_TILE // (c * groups)))
    else:
        m = max(1, tuning.TILE // (2 * r * c * groups))
    m = min(m, tuning._power(group_rows))
    own = _Tiling({"S": 1, "M": m, "R": r, "GROUPS": groups, "W": c}, fmt)
    per_thread = 32 if r == 1 and own.lanes > 2 * tuning.TILE else 16  # turning a tile takes registers
    warps = tuning._warps(own.lanes, None if r > 1 and own.lanes > 2 * tuning.TILE else per_thread)
    return _Tiling({**own.config, "num_warps": warps}, fmt)


def _too_long(view: View, fmt: Format) -> bool:
    """Whether rows that are groups fit no tile of `grouped_kernel`."""
    turned = view.strides[-1] != 1 and fmt.group == (1, -1)
    columns = view.shape[-1]
    return tuning.loops_over_rows(fmt, columns) or (turned and tuning._power(columns) > _TURNED_TILE)


def _apply_tiling(entries: list[Entry], fmt: Format, choice: _Choice) -> _Tiling:
    m = _by_size(entries)[0].matrix
    return _Tiling(tuning.flat_config(m.rows, m.columns, fmt, "apply", choice), None)


def _known(entries: list[Entry], own: _Tiling, aligned: bool, bytes_of: Iterable[str]) -> int:
    """What 16 divides in all of them: bits as in `kernels.grouped`."""
    flat = all(e.matrix.batch == 1 and own.tiles(e.matrix)[0] <= 1 for e in entries)
    return _numbers(entries, aligned, bytes_of) | 8 * flat


def _numbers(entries: list[Entry], aligned: bool, bytes_of: Iterable[str]) -> int:
    def all_of(numbers: Iterable[int]) -> bool:
        return all(n % _ALIGNED == 0 for n in numbers)

    other = [(e.matrix.strides[0], e.matrix.strides[2 if e.turned else 1], e.matrix.offset) for e in entries]
    sizes = aligned and all(map(all_of, other))
    extents = all_of(e.matrix.rows if e.turned else e.matrix.columns for e in entries)
    names = [name for name in bytes_of if name in entries[0].fields]
    offsets = all(all_of((e.fields["row_bytes"], *[e.fields[name] for name in names])) for e in entries)
    return sizes + 2 * extents + 4 * offsets


def _unit(entries: list[Entry]) -> bool:
    return all(e.matrix.strides[1 if e.turned else 2] == 1 for e in entries)


_PARTS = ("qdata", "scale", "zero_point", "group_minimum", "super_scale", "super_minimum")


def _kind(entries: list[Entry], own: _Tiling | None, fmt: Format, aligned: bool, parts: Sequence[str]) -> list[int]:
    """UNIT, KNOWN, PARTIAL and WORDS of a kernel for one kind of entries."""
    if own is None:
        return [False, 0, False, False]
    partial = any(e.matrix.columns * fmt.bits % 8 for e in entries)
    words = all(tuning.in_words(fmt, e.matrix.columns, own.config) and e.fields["qdata"] % 4 == 0 for e in entries)
    return [_unit(entries), _known(entries, own, aligned, parts), partial, words]


# ------------------------------------------------------------------------------------------------------ programs


class _Builder:
    """Collects launches and the rows of their table."""

    def __init__(self, fmt: Format, dtype: torch.dtype, aligned: bool, device: torch.device) -> None:
        self.fmt, self.dtype, self.aligned, self.device = fmt, dtype, aligned, device
        self.rows: list[dict[str, int]] = []
        self.sources: list[int] = []
        self.steps: list[Step] = []
        self.keys = 0

    def _choice(self, op: str, entries: list[Entry]) -> _Choice:
        if not entries:
            return None
        largest = _by_size(entries)[0].matrix
        rows = sum(entry.size for entry in entries) // max(1, largest.columns)
        return tuning_cache.lookup(op, self.fmt, self.dtype, rows, largest.columns, largest.strides[2], self.device)

    def _add(self, entry: Entry, count: int, start: int, tiles: tuple[int, int] = (1, 1), **more: int) -> int:
        m = entry.matrix
        self.rows.append(
            {
                "start": start, "turned": int(entry.turned), "x": m.offset, "rows": m.rows, "columns": m.columns,
                "stride_batch": m.strides[0], "stride_row": m.strides[1], "stride_col": m.strides[2],
                "tiles_m": max(1, tiles[0]), "tiles_n": max(1, tiles[1]), **entry.fields, **more,
            }
        )  # fmt: skip
        self.sources.append(entry.source)
        return start + count

    def _launch(
        self, kernel: Any, programs: int, first: int, constants: Sequence[Any], options: dict[str, int], tensors: str
    ) -> None:
        count = len(self.rows) - first
        plan = Plan(kernel, programs, (count,), (self.fmt, *constants), options)
        self.steps.append(Step(plan, first, len(self.rows), tuple(tensors.split())))

    def _tiles(self, entries: list[Entry], own: _Tiling | None, other: _Tiling | None) -> tuple[int, int]:
        first, start = len(self.rows), 0
        for entry in entries:
            tiling_of = other if entry.turned else own
            assert tiling_of is not None
            tiles = tiling_of.tiles(entry.matrix)
            start = self._add(entry, max(1, entry.matrix.batch * math.prod(tiles)), start, tiles)
        return first, start

    def _options(self, own: _Tiling | None, other: _Tiling | None) -> dict[str, int]:
        if own is None or other is None:
            single = own or other
            assert single is not None
            return plans._options(single.config, self.dtype)
        return {"num_warps": max(own.config["num_warps"], other.config["num_warps"])}

    def groups(self, entries: list[Entry], mode: str) -> None:
        """Tiles of whole groups: codes and scales, or scales alone."""
        from tritonq.kernels import grouped

        if not entries:
            return
        straight, turned = [e for e in entries if not e.turned], [e for e in entries if e.turned]
        choice = self._choice(mode, straight)
        other = _turned_group_tiling(turned, self.fmt) if turned else None
        own = _group_tiling(straight, self.fmt, mode, choice, other) if straight else None
        first, programs = self._tiles(entries, own, other)
        extents = [own.config[k] if own else 0 for k in ("S", "M", "GROUPS", "W")]
        others = [other.config[k] if other else 0 for k in ("M", "GROUPS", "W")]
        kinds = (
            *_kind(straight, own, self.fmt, self.aligned, _PARTS), *extents,
            *_kind(turned, other, self.fmt, self.aligned, _PARTS), *others,
        )  # fmt: skip
        options = self._options(own, other)
        if self.fmt.super_group:
            self._launch(grouped.grouped_super_kernel, programs, first, kinds, options, "x rows columns table")
        else:
            r = (own or other).config["R"]  # type: ignore[union-attr]
            tensors = "x rows columns divisors table"
            self._launch(grouped.grouped_kernel, programs, first, (mode, r, *kinds), options, tensors)

    def apply(self, entries: list[Entry]) -> None:
        """Codes, of scales that are there."""
        from tritonq.kernels import grouped

        if not entries:
            return
        straight, turned = [e for e in entries if not e.turned], [e for e in entries if e.turned]
        own = _apply_tiling(straight, self.fmt, self._choice("apply", straight)) if straight else None
        warps = tuning._warps(tuning.TILE)
        blocks = {"BLOCK_M": _ROWS, "BLOCK_N": tuning.TILE // 2 // _ROWS, "num_warps": warps}
        other = _Tiling(blocks, None) if turned else None
        first, programs = self._tiles(entries, own, other)
        kinds: list[Any] = []
        for some, tiling_of in ((straight, own), (turned, other)):
            kinds += _kind(some, tiling_of, self.fmt, self.aligned, ("qdata",))
            kinds += [tiling_of.config[k] if tiling_of else 0 for k in ("BLOCK_M", "BLOCK_N")]
        tensors = "x rows columns divisors table"
        self._launch(grouped.grouped_apply_kernel, programs, first, kinds, self._options(own, other), tensors)

    def extremes(self, entries: list[tuple[Entry, int]], finite: bool, whole: bool) -> None:
        """Scales by the extremes of groups that programs share, or with `finite` tensor scales. Entries of a number
        share the groups that begin at it, one group if they are `whole` tensors."""
        from tritonq.kernels import grouped

        if not entries:
            return
        geometry = [self._groups_of(entry.matrix, whole) for entry, _ in entries]
        straight = [(e, g) for (e, _), g in zip(entries, geometry, strict=True) if not e.turned]
        turned = [(e, g) for (e, _), g in zip(entries, geometry, strict=True) if e.turned]
        configs: dict[bool, dict[str, int]] = {}
        if straight:
            entry, extents = max(straight, key=lambda pair: pair[0].size)
            configs[False] = tuning.keys_config(extents[0], extents[1], self._choice("keys", [entry]))
        if turned:
            rows = max(extents[0] for _, extents in turned)
            block = min(64, tuning._power(rows))
            configs[True] = {"BLOCK_M": block, "BLOCK_N": tuning.TILE // 2 // block, "num_warps": 4}
        tiles = [
            max(1, math.prod(-(-n // configs[e.turned][k]) for n, k in zip(g[:2], ("BLOCK_M", "BLOCK_N"), strict=True)))
            for (e, _), g in zip(entries, geometry, strict=True)
        ]
        all_tiles = sum(n * g[5] for n, g in zip(tiles, geometry, strict=True))
        shared = 8 * plans._multiprocessors(self.device)
        splits = [max(1, min(n, -(-n * shared // all_tiles))) for n in tiles]
        programs: dict[int, int] = {}
        for (_, slot), n in zip(entries, splits, strict=True):
            programs[slot] = programs.get(slot, 0) + n if whole else n
        first, start = len(self.rows), 0
        for (entry, slot), g, n in zip(entries, geometry, splits, strict=True):
            names = ("group_rows", "group_cols", "all_rows", "groups_per_column", "groups_per_row")
            more = {**dict(zip(names, g[:5], strict=True)), "splits": n, "programs": programs[slot], "slot": slot}
            start = self._add(entry, n * g[5], start, (1, 1), **more)
        constants: list[Any] = [finite]
        for turn, some in ((False, straight), (True, turned)):
            if not some:
                constants += [False, 0, 0, 0]
                continue
            known = _numbers([e for e, _ in some], self.aligned, ()) & 3
            if any(g[1] % _ALIGNED for _, g in some):  # ends of groups
                known &= ~2
            flat = all(g[2] == 1 and g[5] == 1 for _, g in some)
            constants += [_unit([e for e, _ in some]), known | 8 * flat, configs[turn]["BLOCK_M"]]
            constants += [configs[turn]["BLOCK_N"]]
        options = {"num_warps": max(config["num_warps"] for config in configs.values())}
        tensors = "x rows columns divisors keys table"
        self._launch(grouped.grouped_keys_kernel, start, first, constants, options, tensors)

    def _groups_of(self, m: Matrix, whole: bool) -> tuple[int, ...]:
        """Rows and columns of a group, all rows, groups in a column, in a row, and of all of the slab."""
        if whole:
            return m.batch * m.rows, m.columns, m.batch * m.rows, 1, 1, 1
        rows, cols = self.fmt.group
        per_column, per_row = -(-m.rows // rows), 1 if cols == -1 else -(-m.columns // cols)
        return rows, m.columns if cols == -1 else cols, m.rows, per_column, per_row, m.batch * per_column * per_row

    def whole_tensor(self, view: View, divisor: int) -> list[Entry]:
        """Slabs of a tensor, in any order of its elements."""
        if math.prod(view.shape) == 0:
            slabs = [Matrix((), 1, 0, 0, (0, 0, 1), 0)]
        else:
            shape, strides = view.shape, view.strides
            if len(shape) > 1 and strides[-2] == 1:
                shape, strides = (*shape[:-2], shape[-1], shape[-2]), (*strides[:-2], strides[-1], strides[-2])
            slabs = [_matrix(m) for m in plans._geometry(shape, strides, plans._ONE_GROUP)]
        entries = []
        for m in slabs:
            parts = {name: start for name, start in view.parts if name != "qdata"}
            fields = {"side": view.side, "divisor": divisor, "row_bytes": 0, **parts}
            entries.append(Entry(m, view.source, m.strides[2] != 1, fields))
        return entries


@functools.lru_cache(maxsize=512)
def program(
    wanted: Views, fmt: Format, dtype: torch.dtype, aligned: bool, device: torch.device, scales: str
) -> Program:
    """The launches that quantize what is wanted.

    Args:
        aligned: 16 divides the numbers of elements between the tensors.
        scales: tensor scales are "own" of each tensor, one of all ("shared"), or given: "one", or one "each".
    """
    build, views = _Builder(fmt, dtype, aligned, device), wanted.all
    tensors = 1 + max(v.source for v in views)
    first = {view.source: view for view in reversed(views)}  # a tensor's first view
    computed = fmt.tensor_scale and scales in ("own", "shared")
    divisors = {source: source if scales in ("own", "each") else 0 for source in first}
    if computed:
        found = [(e, divisors[s]) for s, v in sorted(first.items()) for e in build.whole_tensor(v, divisors[s])]
        build.extremes(found, True, True)
        build.keys = tensors
    one_pass, by_tiles, by_keys, wholes = [], [], [], []
    for view in views:
        columns, entries = view.shape[-1], _entries(view, fmt, divisors[view.source])
        if fmt.group[0] == -1:
            wholes.append((view, entries))
        elif fmt.super_group or (tuning.fits(fmt, columns) and not _too_long(view, fmt)):
            one_pass += entries
        elif tuning.fits_tile(fmt, columns) and not _too_long(view, fmt):
            by_tiles += entries
        else:
            by_keys += entries
    build.groups(one_pass, "quantize")
    build.groups(by_tiles, "scale")
    shared = []
    for entry in by_keys:
        shared.append((entry, build.keys))
        build.keys += build._groups_of(entry.matrix, False)[5]
    build.extremes(shared, False, False)
    found = []
    for source, view in sorted(first.items()) if fmt.group[0] == -1 else ():
        found += [(entry, build.keys) for entry in build.whole_tensor(view, divisors[source])]
        build.keys += 1
    build.extremes(found, False, True)
    later = [_with_scales(entry, entry.fields) for entry in (*by_tiles, *by_keys)]
    for view, entries in wholes:
        parts = {"side": first[view.source].side, **dict(first[view.source].parts)}
        later += [_with_scales(entry, parts) for entry in entries]
    build.apply(later)
    from tritonq.kernels import grouped

    table = torch.zeros((len(build.rows), grouped.FIELDS.value), dtype=torch.int64)
    names = {name: grouped.place(name) for name in {name for row in build.rows for name in row}}
    values = table.numpy()
    for i, row in enumerate(build.rows):
        for name, value in row.items():
            values[i, names[name]] = value
    sources = torch.tensor(build.sources, dtype=torch.int64)
    return Program(tuple(build.steps), table, sources, build.keys, tensors if computed else 0)


def _with_scales(entry: Entry, of: dict[str, int]) -> Entry:
    """An entry whose scales are those of another."""
    more = {"from_side": of["side"], "from_scale": of["scale"], "from_zero_point": of.get("zero_point", 0)}
    return Entry(entry.matrix, entry.source, entry.turned, {**entry.fields, **more})


# ------------------------------------------------------------------------------------------------------- running

_arenas: list[Tensor] = []  # pinned memory that CUDA graphs read at every replay, so never freed; the last has room
_room = 0  # bytes of the last that are left
_ARENA, _RESERVE = 1 << 20, 1 << 18
_lock = threading.RLock()  # threads share tables and arenas


def _reserve(nbytes: int) -> None:
    """Have room for so many bytes: while a graph is captured is no time to allocate it."""
    global _room
    if _room < nbytes:
        with torch.inference_mode(False):  # to be written in any mode
            _arenas.append(torch.empty(max(_ARENA, 4 * nbytes), dtype=torch.uint8, pin_memory=True))
        _room = _arenas[-1].numel()


def _kept_memory(nbytes: int) -> Tensor:
    """Pinned bytes that are never handed out again."""
    global _room
    _reserve(nbytes)
    _room -= nbytes
    return _arenas[-1][_room : _room + nbytes]


def _filled(of: Program, offsets: tuple[int, ...], target: Tensor) -> Tensor:
    """The table of tensors that lie `offsets` elements after the first, and zeros for the keys, which kernels leave
    behind as zeros."""
    from tritonq.kernels import grouped

    entries = len(of.table)
    target[entries:].zero_()
    target[:entries].copy_(of.table)
    target[:entries, grouped.place("x")] += torch.tensor(offsets, dtype=torch.int64)[of.sources]
    return target


def _table(of: Program, offsets: tuple[int, ...], device: torch.device) -> Tensor:
    with _lock:
        return _table_of(of, offsets, device)


def _table_of(of: Program, offsets: tuple[int, ...], device: torch.device) -> Tensor:
    """The table on the device. Each stream has one of its own, so that no call waits for another stream, or shares keys
    with what runs there."""
    width = of.table.shape[1]
    rows = len(of.table) + -(-3 * of.keys // (2 * width))
    if device.type != "cuda":
        return _filled(of, offsets, torch.empty((rows, width), dtype=torch.int64)).to(device)
    if torch.cuda.is_current_stream_capturing():
        kept = of.captured.get(offsets)
        if kept is None:
            kept = _kept_memory(8 * rows * width).view(torch.int64).view(rows, width)
            of.captured[offsets] = _filled(of, offsets, kept)
        return kept.to(device, non_blocking=True)
    key = (device, torch.cuda.current_stream(device).cuda_stream, offsets)
    found = of.uploaded.get(key)
    if found is not None:
        of.uploaded.move_to_end(key)
        return found
    _reserve(max(_RESERVE, 8 * rows * width))
    host = torch.empty((rows, width), dtype=torch.int64, pin_memory=True)
    found = of.uploaded[key] = _filled(of, offsets, host).to(device, non_blocking=True)
    if len(of.uploaded) > _KEPT:
        of.uploaded.popitem(last=False)
    return found


def run(tensors: Sequence[Tensor], views: Views, fmt: Format, buffers: tuple[Tensor, Tensor],
        divisors: Tensor | None, scales: str) -> None:  # fmt: skip
    """Fill both buffers (uint8) with the parts of `views` of `tensors`, which share a device and a dtype; scales as in
    `program`, with `divisors` (fp32) those that are given."""
    size = tensors[0].element_size()
    pointers = [t.data_ptr() if t.numel() else 0 for t in tensors]
    anchor = next((i for i, p in enumerate(pointers) if p and p % 16 == 0), None)
    if anchor is None:
        anchor = next((i for i, p in enumerate(pointers) if p), 0)
    if any(p and (p - pointers[anchor]) % size for p in pointers):  # not a whole number of elements apart
        tensors = [t.clone() if p and p % size else t for t, p in zip(tensors, pointers, strict=True)]
        return run(tensors, views, fmt, buffers, divisors, scales)
    offsets = tuple((p - pointers[anchor]) // size if p else 0 for p in pointers)
    device = tensors[anchor].device
    of = program(views, fmt, tensors[0].dtype, all(n % _ALIGNED == 0 for n in offsets), device, scales)
    if not of.steps:
        return
    table = _table(of, offsets, device)
    given: dict[str, Tensor] = {"x": tensors[anchor], "rows": buffers[0], "columns": buffers[1]}
    given["keys"] = table[len(of.table) :].view(torch.int32)
    if divisors is None:
        divisors = torch.empty(max(1, of.divisors), dtype=torch.float32, device=device)
    given["divisors"] = divisors
    for step in of.steps:
        step.plan(*[table[step.first : step.last] if name == "table" else given[name] for name in step.tensors])


plans.FORGOTTEN.append(program.cache_clear)  # programs hold tile sizes and measured choices
