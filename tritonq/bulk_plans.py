"""From many tensors to a few launches of `kernels.grouped`, whatever the number of tensors.

A `Program` is made from shapes, strides and places of results, once, and kept; a call adds where the tensors lie
(`bulk_tables`).
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tritonq import plans, tuning, tuning_cache
from tritonq.bulk_tiles import (
    ALIGNED,
    PARTS,
    Choice,
    Entry,
    Tiling,
    Views,
    apply_tiling,
    by_size,
    entries_of,
    group_tiling,
    kind,
    multiples,
    too_long,
    turned_group_tiling,
    unit,
    whole_tensor,
)  # fmt: skip
from tritonq.formats import Format
from tritonq.launch import Plan
from tritonq.tiling import Matrix

_ROWS = 32  # of a transposed tile of `grouped_apply_kernel`


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


class _Builder:
    """Collects launches and the rows of their table."""

    def __init__(self, fmt: Format, dtype: torch.dtype, aligned: bool, device: torch.device) -> None:
        self.fmt, self.dtype, self.aligned, self.device = fmt, dtype, aligned, device
        self.rows: list[dict[str, int]] = []
        self.sources: list[int] = []
        self.steps: list[Step] = []
        self.keys = 0

    def _choice(self, op: str, entries: list[Entry]) -> Choice:
        """What was measured for a tensor of as many elements, if anything."""
        if not entries:
            return None
        largest, total = by_size(entries)[0].matrix, sum(entry.size for entry in entries)
        columns = max(1, total if largest.batch * largest.rows == 1 else largest.columns)
        rows = max(1, total // columns)
        return tuning_cache.lookup(op, self.fmt, self.dtype, rows, columns, largest.strides[2], self.device)

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
        scale = min((count << 31) // programs, (1 << 31) - 1)  # where kernels look for an entry first
        plan = Plan(kernel, programs, (count, scale), (self.fmt, *constants), options)
        self.steps.append(Step(plan, first, len(self.rows), tuple(tensors.split())))

    def _tiles(self, entries: list[Entry], own: Tiling | None, other: Tiling | None) -> tuple[int, int]:
        first, start = len(self.rows), 0
        for entry in entries:
            tiling_of = other if entry.turned else own
            assert tiling_of is not None
            tiles = tiling_of.tiles(entry.matrix)
            start = self._add(entry, max(1, entry.matrix.batch * math.prod(tiles)), start, tiles)
        return first, start

    def _options(self, own: Tiling | None, other: Tiling | None) -> dict[str, int]:
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
        other = turned_group_tiling(turned, self.fmt) if turned else None
        own = group_tiling(straight, self.fmt, mode, choice, other) if straight else None
        first, programs = self._tiles(entries, own, other)
        extents = [own.config[k] if own else 0 for k in ("S", "M", "GROUPS", "W")]
        others = [other.config[k] if other else 0 for k in ("M", "GROUPS", "W")]
        kinds = (
            *kind(straight, own, self.fmt, self.aligned, PARTS), *extents,
            *kind(turned, other, self.fmt, self.aligned, PARTS), *others,
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
        own = apply_tiling(straight, self.fmt, self._choice("apply", straight)) if straight else None
        warps = tuning._warps(tuning.TILE)
        blocks = {"BLOCK_M": _ROWS, "BLOCK_N": tuning.TILE // 2 // _ROWS, "num_warps": warps}
        other = Tiling(blocks, None) if turned else None
        first, programs = self._tiles(entries, own, other)
        kinds: list[Any] = []
        for some, tiling_of in ((straight, own), (turned, other)):
            kinds += kind(some, tiling_of, self.fmt, self.aligned, ("qdata",))
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
            ends = all(e.matrix.columns % ALIGNED == 0 and g[1] % ALIGNED == 0 for e, g in some)  # of groups
            known = multiples([e for e, _ in some], self.aligned, ()) & 1 | 2 * ends
            flat = all(g[2] == 1 and g[5] == 1 for _, g in some)
            constants += [unit([e for e, _ in some]), known | 8 * flat, configs[turn]["BLOCK_M"]]
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
        found = [(e, divisors[s]) for s, v in sorted(first.items()) for e in whole_tensor(v, divisors[s])]
        build.extremes(found, True, True)
        build.keys = tensors
    one_pass, by_tiles, by_keys, wholes = [], [], [], []
    for view in views:
        columns, entries = view.shape[-1], entries_of(view, fmt, divisors[view.source])
        if fmt.group[0] == -1:
            wholes.append((view, entries))
        elif fmt.super_group or (tuning.fits(fmt, columns) and not too_long(view, fmt)):
            one_pass += entries
        elif tuning.fits_tile(fmt, columns) and not too_long(view, fmt):
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
        found += [(entry, build.keys) for entry in whole_tensor(view, divisors[source])]
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


plans.FORGOTTEN.append(program.cache_clear)  # programs hold tile sizes and measured choices
