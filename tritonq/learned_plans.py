"""Launches of `kernels.learned` and `kernels.learned_loop`: slabs over which tensors agree, tiles, and plans."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tritonq import plans, tiling, tuning
from tritonq.formats import Format, Shape, get_format
from tritonq.launch import Plan
from tritonq.learned_reference import Learned, Parts, Wanted

_cached = functools.lru_cache(maxsize=4096)
_LARGEST_TILE = 8192  # elements of the largest group that stays in registers beside v and dy
# Elements of a tile, where the group does not ask for more, and of a thread. Small tiles end, and let others begin, at
# different times, so that loads and stores overlap.
CHOICES = {"qdq": (2048, 16), "backward": (2048, 16), "step": (2048, 16)}
_LOOP = (4096, 8)
_SIGNED = get_format("int8_g8_asym")  # only its keys: both extremes of a group

Slab = tuple[tiling.Matrix, ...]  # one for each tensor; all but strides and offset are the same
Shapes = tuple[Shape, ...]


@dataclass(frozen=True)
class Kind:
    """What a kernel is compiled for, besides types and strides."""

    mode: str
    given: bool
    has: tuple[bool, bool, bool]  # v, high, low
    wanted: Wanted = Wanted()  # noqa: RUF009

    def constants(self) -> tuple[Any, ...]:
        w = self.wanted
        return (self.given, *self.has, w.x, w.v, w.high, w.low, w.factor, *w.bounds)


def kind(mode: str, given: Learned, wanted: Wanted | None = None) -> Kind:
    has = (given.v is not None, given.high is not None, given.low is not None)
    return Kind(mode, given.given, has, wanted or Wanted())


def _slabs(shape: Shape, strides: Shapes, fmt: Format) -> list[Slab]:
    """Slabs [batch, N, K] of several tensors of one shape; one of a matrix each where their axes merge differently."""
    found = [plans._geometry(shape, own, fmt) for own in strides]
    if not _agree(found):
        found = [tiling.matrices(shape, own, fmt) for own in strides]
    if not _agree(found):
        found = [_apart(shape, own) for own in strides]
    return list(zip(*found, strict=True))


def _agree(found: list[list[tiling.Matrix]]) -> bool:
    extents = [[(m.index, m.batch, m.rows, m.columns) for m in slabs] for slabs in found]
    return all(each == extents[0] for each in extents)


def _apart(shape: Shape, strides: Shape) -> list[tiling.Matrix]:
    """Every matrix of the last two axes by itself."""
    result = []
    for index in itertools.product(*map(range, shape[:-2])):
        offset = sum(i * s for i, s in zip(index, strides, strict=False))
        result.append(tiling.Matrix(index, 1, shape[-2], shape[-1], (0, strides[-2], strides[-1]), offset))
    return result


def fits(fmt: Format, columns: int) -> bool:
    """Whether groups stay in the registers of a program beside v and dy."""
    if fmt.super_group:
        return True
    if fmt.group[0] == -1:
        return False
    rows, cols = tuning._padded_group(fmt, columns)
    return rows * cols <= _LARGEST_TILE


def split(fmt: Format, columns: int) -> bool:
    """Whether several programs may share a group, whose extremes are then found before."""
    return not fits(fmt, columns) and not tuning.fits_tile(fmt, columns)


def _scaled(tile: int) -> int:
    """A number of elements in units of `tuning.TILE`, which is larger in the interpreter."""
    return tile * tuning.TILE // 4096


def _config(rows: int, columns: int, fmt: Format, mode: str) -> tuple[tuning.Config, tuple[int, int]]:
    tile, per_thread = CHOICES[mode]
    choice = {"TILE": _scaled(tile), "PER_THREAD": per_thread}
    config, tiles = tuning.group_config(rows, columns, fmt, "qdq", choice)
    return {name: n for name, n in config.items() if name != "maxnreg"}, tiles


def _tile_plan(slab: Slab, fmt: Format, of: Kind, dtype: torch.dtype) -> Plan:
    from tritonq.kernels.learned import learned_kernel

    m = slab[0]
    config, tiles = _config(m.rows, m.columns, fmt, of.mode)
    strides = tuple(stride for own in slab for stride in own.strides)
    extents = (config[k] for k in ("S", "M", "R", "GROUPS", "W"))
    return Plan(
        learned_kernel,
        m.batch * tiles[0] * tiles[1],
        (m.rows, m.columns, *tiles, *strides),
        (fmt, of.mode, plans._limit(dtype), *of.constants(), plans._axes(m, tiles), *extents),
        {"num_warps": config["num_warps"]},
    )


@dataclass(frozen=True)
class _Extent:
    """Groups of a slab, as `kernels.stats` counts them."""

    rows: int
    cols: int
    all_rows: int
    per_column: int
    per_row: int


def _extent(m: tiling.Matrix, fmt: Format) -> tuple[_Extent, int]:
    """The extent of groups, and how many there are."""
    rows, cols = fmt.group
    if rows == -1:
        return _Extent(m.batch * m.rows, m.columns, m.batch * m.rows, 1, 1), 1
    per_column, per_row = -(-m.rows // rows), 1 if cols == -1 else -(-m.columns // cols)
    return _Extent(rows, m.columns if cols == -1 else cols, m.rows, per_column, per_row), m.batch * per_column * per_row


def _loop_plan(slab: Slab, fmt: Format, of: Kind, dtype: torch.dtype, device: torch.device) -> tuple[Plan, int, int]:
    """(launch, groups, splits)."""
    from tritonq.kernels.learned_loop import learned_loop_kernel

    m = slab[0]
    extent, groups = _extent(m, fmt)
    config = tuning.keys_config(
        extent.rows, extent.cols, {"TILE": _scaled(_LOOP[0]), "PER_THREAD": _LOOP[1], "BLOCK_N": _scaled(_LOOP[0])}
    )
    splits = 1
    if split(fmt, m.columns):
        splits = tuning.splits(groups, extent.rows, extent.cols, config, plans._multiprocessors(device))
    strides = tuple(stride for own in slab for stride in own.strides)
    geometry = (extent.rows, extent.cols, extent.all_rows, extent.per_column, extent.per_row, splits)
    flat = extent.rows == 1
    plan = Plan(
        learned_loop_kernel,
        groups * splits,
        (m.rows, m.columns, *geometry, *strides),
        (fmt, of.mode, plans._limit(dtype), *of.constants(), split(fmt, m.columns), flat, config["BLOCK_M"],
         config["BLOCK_N"]),
        {"num_warps": config["num_warps"]},
    )  # fmt: skip
    return plan, groups, splits


@dataclass(frozen=True)
class Launches:
    """One launch a slab; groups that several programs share take sums [groups, `splits`] and a last launch, if
    gradients of groups are wanted."""

    slabs: tuple[tuple[Slab, Plan], ...]
    groups: tuple[int, ...] = ()  # of each slab, where groups are split
    splits: tuple[int, ...] = ()
    finish: Plan | None = None


@_cached
def _launches(
    shape: Shape, strides: Shapes, types: tuple[torch.dtype, ...], fmt: Format, of: Kind, device: torch.device
) -> Launches:
    """`types` are those of all tensors: x first; the others only tell launches apart."""
    slabs = _slabs(shape, strides, fmt)
    if fits(fmt, shape[-1]):
        return Launches(tuple((slab, _tile_plan(slab, fmt, of, types[0])) for slab in slabs))
    found = [_loop_plan(slab, fmt, of, types[0], device) for slab in slabs]
    launches = tuple((slab, plan) for slab, (plan, _, _) in zip(slabs, found, strict=True))
    if not split(fmt, shape[-1]):
        return Launches(launches)
    groups, splits = tuple(n for _, n, _ in found), tuple(n for _, _, n in found)
    finish = None
    if of.wanted.groups:
        of_group = sum(splits) if fmt.group[0] == -1 else splits[0]
        finish = _finish_plan(groups[0] if fmt.group[0] == -1 else sum(groups), of_group, fmt, of)
    return Launches(launches, groups, splits, finish)


def _finish_plan(groups: int, splits: int, fmt: Format, of: Kind) -> Plan:
    from tritonq.kernels.learned_loop import learned_finish_kernel

    w = of.wanted
    lanes = min(1024, tuning._power(splits))
    constants = (fmt, of.mode, of.given, *of.has[1:], w.high, w.low, w.factor, *w.bounds[2:], lanes)
    return Plan(learned_finish_kernel, groups, (splits,), constants, {"num_warps": 4 if lanes > 32 else 1})


def _keys(x: Tensor, fmt: Format) -> Tensor:
    """Maximal keys of groups, int32 [groups, 2]."""
    signed = replace(_SIGNED, group=fmt.group)
    shape = fmt.scale_shape(tuple(x.shape))
    # The launch for a whole tensor counts its programs behind the keys, and leaves a scale that nobody reads.
    keys = torch.zeros(2 * torch.Size(shape).numel() + 16, dtype=torch.int32, device=x.device)
    by_group = keys[:-16].view(*shape, 2)
    for m, plan in plans._keys_plans(x.shape, x.stride(), x.dtype, signed, False, x.device):
        own = keys if fmt.group[0] == -1 else by_group[m.index]
        unread = keys[-12:].view(torch.bfloat16)
        plan(plans._view(x, m), own, unread[:1], keys[-8:].view(torch.uint8)[:1], x)
    return keys


def run(
    x: Tensor, fmt: Format, given: Learned, of: Kind, out: dict[str, Tensor], dy: Tensor | None, rates: Tensor | None
) -> None:
    """Of kind "qdq" y into out["y"]; else gradients into out["dx"], ["dv"], ["d_high"], ["d_low"], all contiguous."""
    v, after = x if given.v is None else given.v, x if dy is None else dy
    result = out.get("y", out.get("dx", x))
    dv = out.get("dv", v)
    high, low = (x if part is None else part for part in (given.high, given.low))
    d_high, d_low = out.get("d_high", high), out.get("d_low", low)
    divisor = x if given.tensor_scale is None else given.tensor_scale
    rates = x if rates is None else rates
    tensors = (x, v, after, result, dv, high, low, d_high, d_low, divisor, rates)
    types = tuple(t.dtype for t in tensors)
    strides = (tuple(x.stride()), tuple(v.stride()), tuple(after.stride()))
    found = _launches(tuple(x.shape), strides, types, fmt, of, x.device)
    own = _owner(fmt)
    keys = sums = x
    loops = not fits(fmt, x.shape[-1])
    if found.groups:
        keys = x if given.given else _keys(x, fmt)
        if of.wanted.groups:
            count = sum(g * s for g, s in zip(found.groups, found.splits, strict=True))
            sums = torch.empty((count, 2), dtype=torch.float32, device=x.device)
    begun = groups_before = 0
    for i, (slab, plan) in enumerate(found.slabs):
        m = slab[0]
        views = [plans._view(t, each) for t, each in zip((x, v, after), slab, strict=True)]
        parts = [own(t, m) for t in tensors[5:9]]
        arguments = [*views, *(plans._own(t, m) for t in (result, dv)), *parts, divisor, rates]
        if loops:
            own_keys = keys
            if found.groups and fmt.group[0] != -1 and not given.given:
                own_keys = keys[2 * groups_before :]
            arguments += [own_keys, sums[begun:]]
        plan(*arguments)
        if found.groups:
            begun += found.groups[i] * found.splits[i]
            groups_before += found.groups[i]
    if found.finish is not None:
        found.finish(high, low, d_high, d_low, divisor, rates, keys, sums)


def _owner(fmt: Format) -> Callable[[Tensor, tiling.Matrix], Tensor]:
    """What selects the groups of a slab."""
    if fmt.group[0] == -1:
        return lambda t, m: t
    return plans._own


# ----------------------------------------------------------------------------------------------------- packed codes

_PARTS = ("scale", "zero_point", "super_scale", "group_minimum", "super_minimum")  # as the kernel takes them


def _in_one_launch(fmt: Format, columns: int) -> bool:
    """Whether tiles hold whole groups, and nothing else, that begin at whole bytes."""
    if fmt.super_group or not fits(fmt, columns):
        return fmt.super_group > 0
    cols = fmt.group[1]
    return tuning.fits(fmt, columns) and (cols == -1 or cols & (cols - 1) == 0)


@_cached
def _quantize_plans(
    shape: Shape, strides: Shapes, types: tuple[torch.dtype, ...], fmt: Format, mode: str, of: Kind, aligned: bool
) -> tuple[tuple[Slab, Plan], ...]:
    from tritonq.kernels.learned_quantize import learned_quantize_kernel

    def plan(slab: Slab) -> Plan:
        m = slab[0]
        config, tiles = _config(m.rows, m.columns, fmt, "qdq")
        both = tuple(stride for own in slab for stride in own.strides)
        extents = (config[k] for k in ("S", "M", "R", "GROUPS", "W"))
        return Plan(
            learned_quantize_kernel,
            m.batch * tiles[0] * tiles[1],
            (m.rows, m.columns, fmt.row_bytes(m.columns), *tiles, *both),
            (fmt, mode, *of.has, *plans._packing(m, fmt, config, mode, aligned), plans._axes(m, tiles), *extents),
            {"num_warps": config["num_warps"]},
            (2, 6, 7, 8, 9, 10),
        )

    return tuple((slab, plan(slab)) for slab in _slabs(shape, strides, fmt))


@_cached
def _apply_plans(
    shape: Shape, strides: Shapes, types: tuple[torch.dtype, ...], fmt: Format, of: Kind, aligned: bool
) -> tuple[tuple[Slab, Plan], ...]:
    from tritonq.kernels.learned_quantize import learned_apply_kernel

    def plan(slab: Slab) -> Plan:
        m = slab[0]
        config = tuning.flat_config(m.rows, m.columns, fmt, "apply")
        tiles = -(-m.rows // config["BLOCK_M"]), -(-m.columns // config["BLOCK_N"])
        both = tuple(stride for own in slab for stride in own.strides)
        packing = plans._packing(m, fmt, config, "quantize", aligned)
        return Plan(
            learned_apply_kernel,
            m.batch * tiles[0] * tiles[1],
            (m.rows, m.columns, fmt.row_bytes(m.columns), *tiles, *both),
            (fmt, of.given, of.has[0], *packing, plans._axes(m, tiles), config["BLOCK_M"], config["BLOCK_N"]),
            {"num_warps": config["num_warps"]},
            (2, 3, 4),
        )

    return tuple((slab, plan(slab)) for slab in _slabs(shape, strides, fmt))


@_cached
def _choose_plan(groups: int, types: tuple[torch.dtype, ...], fmt: Format, of: Kind) -> Plan:
    from tritonq.kernels.learned_quantize import learned_choose_kernel

    return Plan(learned_choose_kernel, -(-groups // 256), (groups,), (fmt, *of.has[1:], 256), {"num_warps": 4}, (4, 5))


def quantize(x: Tensor, fmt: Format, given: Learned, parts: Parts) -> None:
    """Codes and scales of what `run` makes of x, into contiguous parts; scales that are given lie there."""
    of, qdata, scale = kind("quantize", given), parts["qdata"], parts["scale"]
    v, high, low = (x if t is None else t for t in (given.v, given.high, given.low))
    divisor = x if given.tensor_scale is None else given.tensor_scale
    shape, strides, types = tuple(x.shape), (tuple(x.stride()), tuple(v.stride())), (x.dtype, v.dtype)
    aligned, own = qdata.data_ptr() % 4 == 0, _owner(fmt)
    whole = not given.given and _in_one_launch(fmt, x.shape[-1])
    by_group = (*types, high.dtype, low.dtype)
    if given.given:
        pass  # scales are there
    elif whole or fits(fmt, x.shape[-1]):
        mode = "quantize" if whole else "scale"
        for slab, plan in _quantize_plans(shape, strides, by_group, fmt, mode, of, aligned):
            m, views = slab[0], [plans._view(t, each) for t, each in zip((x, v), slab, strict=True)]
            found = [own(parts.get(name, scale), m) for name in _PARTS]
            plan(*views, plans._own(qdata, m), own(high, m), own(low, m), divisor, *found)
    else:
        zero = parts.get("zero_point", scale)
        _choose_plan(scale.numel(), by_group, fmt, of)(_keys(x, fmt), high, low, divisor, scale, zero)
    if not whole:
        for slab, plan in _apply_plans(shape, strides, types, fmt, of, aligned):
            m, views = slab[0], [plans._view(t, each) for t, each in zip((x, v), slab, strict=True)]
            zero = parts.get("zero_point", scale)
            plan(*views, plans._own(qdata, m), own(scale, m), own(zero, m), divisor)


def forget() -> None:
    """Drop the plans that are kept."""
    for kept in (_launches, _quantize_plans, _apply_plans, _choose_plan):
        kept.cache_clear()


__all__ = ["CHOICES", "Kind", "Launches", "Parts", "fits", "forget", "kind", "quantize", "run"]
