"""From an op on a tensor to kernel launches: which kernel, over which slabs, in which tiles.

Plans depend on shapes, strides, types, the format and the kind of rounding only, so they are made once and kept; the
seed of stochastic rounding comes with the call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonq import scale_tiles, tiling, tuning, tuning_cache
from tritonq.codecs import philox, search
from tritonq.formats import ElementType, Format, Shape, get_format
from tritonq.launch import Plan
from tritonq.reference import Parts

Plans = tuple[tuple[tiling.Matrix, Plan], ...]

_ONE_GROUP = get_format("fp8_e4m3_tensor")  # only its geometry: one group, whole bytes
_BLOCKS = get_format("int8_g16")  # only its geometry: whole blocks of 16 in rows
_MATRICES = get_format("fp8_e4m3_b2x2")  # only its geometry: matrices stay whole
_cached = functools.lru_cache(maxsize=4096)


def _options(config: tuning.Config, dtype: torch.dtype, counters: int = 0) -> dict[str, int]:
    """Compiler options of a configuration. The random numbers of stochastic rounding, from so many `counters` for four
    elements, take registers that it did not count with: 32 elements a thread, or 16."""
    options = {"num_warps": config["num_warps"]}
    if counters:
        extents = (n for name, n in config.items() if name not in options and name != "maxnreg")
        options["num_warps"] = min(16, max(config["num_warps"], math.prod(extents) * counters // 1024))
    elif "maxnreg" in config and torch.version.hip is None and dtype.itemsize <= 4:
        options["maxnreg"] = config["maxnreg"]
    return options


def _limit(dtype: torch.dtype) -> float:
    return torch.finfo(torch.float32 if dtype is torch.float64 else dtype).max


def _geometry(shape: Shape, strides: Shape, fmt: Format) -> list[tiling.Matrix]:
    """[batch, N, K] slabs of a tensor, at best one long row: groups and bytes then follow each other without a gap."""
    columns = shape[-1]
    rows, cols = fmt.group[0], fmt.super_group or fmt.group[1]
    whole_groups = rows == -1 or (rows == 1 and cols > 0 and columns % cols == 0)
    if whole_groups and columns * fmt.bits % 8 == 0 and tiling.is_contiguous(shape, strides):
        n = math.prod(shape)
        return [tiling.Matrix((), 1, 1, n, (n, n, 1), 0)]
    return tiling.matrices(shape, strides, fmt)


def _choice(op: str, m: tiling.Matrix, fmt: Format, dtype: torch.dtype, device: torch.device) -> tuning.Choice | None:
    """What was measured for this GPU, if anything."""
    return tuning_cache.lookup(op, fmt, dtype, m.batch * m.rows, m.columns, m.strides[2], device)


def _own(part: Tensor, m: tiling.Matrix) -> Tensor:
    """The part of one slab; parts of one element belong to all of them."""
    return part[m.index] if m.index and part.numel() > 1 else part


def _view(x: Tensor, m: tiling.Matrix) -> Tensor:
    """x from where the slab begins; kernels get the strides themselves."""
    if m.offset == 0:
        return x
    return x.as_strided((m.batch, m.rows, m.columns), m.strides, x.storage_offset() + m.offset)


_Rounding = tuple[int, tuple[int | None, ...]]  # ROUNDING of the kernels, and their integers that belong to it
_NEAREST: _Rounding = (0, (None, None, None))  # no seed, no first element


def _stochastic(m: tiling.Matrix, fmt: Format, shape: Shape, before: int) -> _Rounding:
    """Four neighbours share a counter where those of each tile and row begin at a multiple of four, else they take two
    counters. The tensor of `shape` is what follows `before` elements of a larger one."""
    cols, first = fmt.group[1], before + m.first(shape)
    whole_tiles = cols & (cols - 1) == 0 or cols < 0 or cols % 4 == 0
    whole_rows = m.columns % 4 == 0 or m.batch * m.rows == 1
    return (1 if whole_tiles and whole_rows and first % 4 == 0 else 2), (first,)


def _packing(m: tiling.Matrix, fmt: Format, config: tuning.Config, mode: str, aligned: bool) -> tuple[bool, bool]:
    """PARTIAL and WORDS of a kernel: whether the last byte of a row is not full, whether codes move as 32-bit words."""
    words = aligned and mode == "quantize" and tuning.in_words(fmt, m.columns, config)
    return m.columns * fmt.bits % 8 != 0, words


def _axes(m: tiling.Matrix, tiles: tuple[int, int]) -> int:
    """AXES of the kernels: how many numbers tell one tile from the others, at least 1. Rows of one tile count as a
    batch: they are at the limit of their registers, and spill if their loads start earlier."""
    if m.batch * tiles[0] == 1:
        return 1
    return 2 if m.batch == 1 and tiles[1] > 1 else 3


def _group_plan(
    m: tiling.Matrix, fmt: Format, mode: str, dtype: torch.dtype, aligned: bool, device: torch.device,
    rounding: _Rounding = _NEAREST, swizzled: bool = False,
) -> Plan:  # fmt: skip
    from tritonq.kernels.quantize import group_kernel

    config, tiles = tuning.group_config(m.rows, m.columns, fmt, mode, _choice(mode, m, fmt, dtype, device))
    if swizzled:
        rows, columns = scale_tiles.padded(m.rows, -(-m.columns // fmt.group[1]))
        tiles = -(-rows // config["M"]), -(-columns // config["GROUPS"])
    (partial, words), axes = _packing(m, fmt, config, mode, aligned), _axes(m, tiles)
    extents = (config[k] for k in ("S", "M", "R", "GROUPS", "W"))
    return Plan(
        group_kernel,
        m.batch * tiles[0] * tiles[1],
        (*rounding[1], m.rows, m.columns, fmt.row_bytes(m.columns), *tiles, *m.strides),
        (fmt, mode, rounding[0], _limit(dtype), partial, axes, words, *extents, swizzled),
        _options(config, dtype, rounding[0]),
        (2, 3) if mode == "qdq" else (1, 2, 3),
        waits=True,
    )


def _super_group_plan(
    m: tiling.Matrix, fmt: Format, mode: str, dtype: torch.dtype, aligned: bool, device: torch.device,
    rounding: _Rounding,
) -> Plan:  # fmt: skip
    from tritonq.kernels.super_groups import super_group_kernel

    config, tiles = tuning.group_config(m.rows, m.columns, fmt, mode, _choice(mode, m, fmt, dtype, device))
    (partial, words), axes = _packing(m, fmt, config, mode, aligned), _axes(m, tiles)
    return Plan(
        super_group_kernel,
        m.batch * tiles[0] * tiles[1],
        (*rounding[1], m.rows, m.columns, fmt.row_bytes(m.columns), *tiles, *m.strides),
        (fmt, mode, rounding[0], _limit(dtype), partial, axes, words, *(config[k] for k in ("S", "M", "GROUPS", "W"))),
        _options(config, dtype, rounding[0]),
        (2, 3, 4, 5) if mode == "qdq" else (1, 2, 3, 4, 5),
        waits=True,
    )


def _row_plan(
    m: tiling.Matrix, fmt: Format, mode: str, dtype: torch.dtype, aligned: bool, device: torch.device,
    rounding: _Rounding,
) -> Plan:  # fmt: skip
    from tritonq.kernels.quantize import row_kernel

    config = tuning.row_config(_choice(f"row_{mode}", m, fmt, dtype, device))
    partial, words = _packing(m, fmt, config, mode, aligned)
    return Plan(
        row_kernel,
        m.batch * m.rows,
        (*rounding[1], m.rows, m.columns, fmt.row_bytes(m.columns), *m.strides),
        (fmt, mode, rounding[0], _limit(dtype), partial, words, config["BLOCK_N"]),
        _options(config, dtype, rounding[0]),
        (2, 3) if mode == "qdq" else (1, 2, 3),
        waits=True,
    )


def _apply_plan(
    m: tiling.Matrix, fmt: Format, mode: str, dtype: torch.dtype, aligned: bool, device: torch.device,
    rounding: _Rounding, own: bool,
) -> Plan:  # fmt: skip
    from tritonq.kernels.quantize import apply_kernel

    op = "apply" if mode == "quantize" else "apply_qdq"
    config = tuning.flat_config(m.rows, m.columns, fmt, op, _choice(op, m, fmt, dtype, device))
    tiles = -(-m.rows // config["BLOCK_M"]), -(-m.columns // config["BLOCK_N"])
    (partial, words), axes = _packing(m, fmt, config, mode, aligned), _axes(m, tiles)
    return Plan(
        apply_kernel,
        m.batch * tiles[0] * tiles[1],
        (*rounding[1], m.rows, m.columns, fmt.row_bytes(m.columns), *tiles, *m.strides),
        (fmt, mode, rounding[0], _limit(dtype), partial, axes, words, config["BLOCK_M"], config["BLOCK_N"], own),
        _options(config, dtype, rounding[0]),
        (2, 3) if mode == "qdq" else (1, 2, 3),
        waits=True,
    )


def _dequantize_plan(m: tiling.Matrix, fmt: Format, dtype: torch.dtype, aligned: bool, device: torch.device) -> Plan:
    if fmt.super_group:
        from tritonq.kernels.super_groups import super_dequantize_kernel as kernel
    else:
        from tritonq.kernels.dequantize import dequantize_kernel as kernel

    choice = _choice("dequantize", m, fmt, dtype, device)
    config = tuning.flat_config(m.rows, m.columns, fmt, "dequantize", choice)
    tiles = -(-m.rows // config["BLOCK_M"]), -(-m.columns // config["BLOCK_N"])
    words = aligned and tuning.in_words(fmt, m.columns, config)
    return Plan(
        kernel,
        m.batch * tiles[0] * tiles[1],
        (m.rows, m.columns, fmt.row_bytes(m.columns), *tiles),
        (fmt, _limit(dtype), _axes(m, tiles), words, config["BLOCK_M"], config["BLOCK_N"]),
        _options(config, dtype),
        (0, 1, 2, 3, 4) if fmt.super_group else (0, 1, 2),
        waits=True,
    )


@_cached
def _encode_plans(
    shape: Shape, strides: Shape, dtype: torch.dtype, fmt: Format, mode: str, given: bool, aligned: bool,
    device: torch.device, stochastic: bool = False, own: bool = False, first: int = 0,
) -> Plans:  # fmt: skip
    """`given`: scales are only read; `own`: they are what the rule gives; `first`: index of the first element."""

    def plan(m: tiling.Matrix) -> Plan:
        rounding = _stochastic(m, fmt, shape, first) if stochastic else _NEAREST
        if fmt.super_group:
            return _super_group_plan(m, fmt, mode, dtype, aligned, device, rounding)
        if given:
            return _apply_plan(m, fmt, mode, dtype, aligned, device, rounding, own)
        if tuning.loops_over_rows(fmt, m.columns, stochastic):
            return _row_plan(m, fmt, mode, dtype, aligned, device, rounding)
        return _group_plan(m, fmt, mode, dtype, aligned, device, rounding)

    return tuple((m, plan(m)) for m in _geometry(shape, strides, fmt))


def _plans_from(first: int) -> Callable[..., Plans]:
    """`_encode_plans`, which keeps what begins a tensor: tiles further on hardly come again."""
    return _encode_plans if first == 0 else _encode_plans.__wrapped__


def _both_plan(m: tiling.Matrix, fmt: Format, dtype: torch.dtype, aligned: bool) -> Plan:
    from tritonq.kernels.both import both_kernel

    own, tiles, other, other_tiles = tuning.both_config(m.rows, m.columns, fmt)
    partial = [extent * fmt.bits % 8 != 0 for extent in (m.columns, m.rows)]  # along which codes are packed
    words = [aligned and tuning.in_words(fmt, *side) for side in ((m.columns, own), (m.rows, other))]
    counts = [m.batch * math.prod(each) for each in (tiles, other_tiles)]
    extents = (own["S"], own["M"], own["GROUPS"], other["M"], other["GROUPS"], own["R"], own["W"], other["W"])
    return Plan(
        both_kernel,
        sum(counts),
        (m.rows, m.columns, fmt.row_bytes(m.columns), fmt.row_bytes(m.rows), *tiles, *other_tiles, *counts, *m.strides),
        (fmt, *partial, *words, *extents),
        _options(own, dtype),
        (1, 2, 3, 4, 5, 6),
    )


@_cached
def _both_plans(shape: Shape, strides: Shape, dtype: torch.dtype, fmt: Format, aligned: bool) -> Plans:
    return tuple((m, _both_plan(m, fmt, dtype, aligned)) for m in tiling.matrices(shape, strides, _MATRICES))


Storage = tuple[Shape, Shape, torch.dtype]  # shape, strides and dtype of a tensor


@dataclass(frozen=True)
class Single:
    """An op that is a single launch: it, and the tensors it fills, by name."""

    launch: Plan
    outputs: tuple[tuple[str, Storage], ...]


def _contiguous(shape: Shape, dtype: torch.dtype) -> Storage:
    return tuple(shape), tiling.contiguous_strides(shape), dtype


@_cached
def single(
    shape: Shape, strides: Shape, dtype: torch.dtype, fmt: Format, mode: str, device: torch.device
) -> Single | None:
    """The one launch that quantizes a tensor of floats ("quantize", "qdq") with nothing given, if one is enough."""
    fmt.scale_shape(shape)  # raises where the format cannot share scales over this shape
    floats = dtype.is_floating_point and dtype.itemsize > 1
    if not floats or fmt.tensor_scale or fmt.super_group or math.prod(shape) == 0 or not tuning.fits(fmt, shape[-1]):
        return None
    (m, plan), *others = _encode_plans(shape, strides, dtype, fmt, mode, False, True, device, False)
    if others or m.index or m.offset:
        return None
    if mode == "qdq":
        return Single(plan, (("y", _contiguous(shape, dtype)),))
    return Single(plan, tuple((name, _contiguous(*storage)) for name, storage in fmt.storage(tuple(shape)).items()))


@_cached
def _decode_plans(
    shape: Shape, strides: Shape, dtype: torch.dtype, fmt: Format, aligned: bool, device: torch.device
) -> Plans:
    return tuple((m, _dequantize_plan(m, fmt, dtype, aligned, device)) for m in _geometry(shape, strides, fmt))


@_cached
def single_decode(shape: Shape, dtype: torch.dtype, fmt: Format, aligned: bool, device: torch.device) -> Single | None:
    """The one launch that dequantizes contiguous parts, if one is enough."""
    if fmt.super_group or math.prod(shape) == 0:
        return None
    (m, plan), *others = _decode_plans(shape, tiling.contiguous_strides(shape), dtype, fmt, aligned, device)
    return None if others or m.index else Single(plan, (("y", _contiguous(shape, dtype)),))


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128


@_cached
def _keys_plans(
    shape: Shape, strides: Shape, dtype: torch.dtype, fmt: Format, finite: bool, device: torch.device
) -> Plans:
    from tritonq.kernels.stats import keys_kernel

    rows, cols = fmt.group
    whole = finite or rows == -1
    slabs = _geometry(shape, strides, _ONE_GROUP if whole else fmt)
    result = []
    for m in slabs:
        if whole:
            extents = (m.batch * m.rows, m.columns, m.batch * m.rows)
            per_column = per_row = groups = 1
        else:
            extents = (rows, m.columns if cols == -1 else cols, m.rows)
            per_column, per_row = -(-m.rows // rows), 1 if cols == -1 else -(-m.columns // cols)
            groups = m.batch * per_column * per_row
        config = tuning.keys_config(extents[0], extents[1], _choice("keys", m, fmt, dtype, device))
        splits = tuning.splits(groups, extents[0], extents[1], config, _multiprocessors(device))
        integers = (m.rows, m.columns, *extents, per_column, per_row, splits, *m.strides)
        kind = (finite, groups == 1 and extents[0] == 1, whole and m is slabs[-1])
        constants = (fmt, *kind, config["BLOCK_M"], config["BLOCK_N"])
        bits, options = () if finite else (2, 3), _options(config, torch.float32)
        result.append((m, Plan(keys_kernel, groups * splits, integers, constants, options, bits, waits=True)))
    return tuple(result)


@_cached
def _choose_plan(groups: int, fmt: Format) -> Plan:
    from tritonq.kernels.stats import choose_kernel

    return Plan(choose_kernel, -(-groups // 256), (groups,), (fmt, 256), {"num_warps": 4}, (1, 2))


def forget() -> None:
    """Drop the plans that are kept: what they were made from (tile sizes, measured choices) has changed."""
    for kept in (
        _encode_plans, single, _decode_plans, single_decode, _keys_plans, _choose_plan, _scale_plans,
        _search_plans, _pick_plans, _both_plans, _swizzled_plans, _hadamard_plans, _cast_plans, _at_once_plan,
    ):  # fmt: skip
        kept.cache_clear()
    for more in FORGOTTEN:
        more()


FORGOTTEN: list[Callable[[], None]] = []  # what else was made from them, in modules to the right


def encode(
    x: Tensor, fmt: Format, parts: Parts, given: bool, y: Tensor | None, seed: int | None = None, first: int = 0
) -> None:
    """Codes and scales into `parts`, or values into `y`; scales that are `given` are only read. With a seed, rounding
    is stochastic, and `first` is the index of the first element of x in the tensor that it is a tile of."""
    mode = "quantize" if y is None else "qdq"
    first = 0 if seed is None else first
    if fmt.super_group:
        return _encode_super_groups(x, fmt, parts, mode, parts["qdata"] if y is None else y, seed, first)
    own = not given and not tuning.fits(fmt, x.shape[-1], seed is not None)
    if own:
        scales(x, fmt, parts)
    target = parts["qdata"] if y is None else y
    scale = parts.get("scale", target)
    zero, divisor = parts.get("zero_point", scale), parts.get("tensor_scale", x)
    aligned = target.data_ptr() % 4 == 0  # to 32-bit words
    words = () if seed is None else philox.halves(seed)
    found = _plans_from(first)(
        x.shape, x.stride(), x.dtype, fmt, mode, given or own, aligned, x.device, seed is not None, own, first
    )
    for m, plan in found:
        if m.index or m.offset:
            plan(_view(x, m), _own(target, m), _own(scale, m), _own(zero, m), divisor, seed=words)
        else:
            plan(x, target, scale, zero, divisor, seed=words)


def _encode_super_groups(
    x: Tensor, fmt: Format, parts: Parts, mode: str, target: Tensor, seed: int | None, first: int = 0
) -> None:
    """One launch a slab; `target` takes codes or values, and stands in for parts that are not written."""
    scales = [parts.get(name, target) for name in _SUPER_SCALES]
    aligned = target.data_ptr() % 4 == 0
    words = () if seed is None else philox.halves(seed)
    shape, stochastic = (x.shape, x.stride(), x.dtype), seed is not None
    for m, plan in _plans_from(first)(*shape, fmt, mode, False, aligned, x.device, stochastic, False, first):
        plan(_view(x, m), _own(target, m), *[_own(part, m) for part in scales], seed=words)


_SUPER_SCALES = ("scale", "super_scale", "group_minimum", "super_minimum")  # as the kernels take them


@_cached
def _swizzled_plans(
    shape: Shape, strides: Shape, dtype: torch.dtype, fmt: Format, aligned: bool, device: torch.device,
    stochastic: bool = False,
) -> Plans:  # fmt: skip
    def plan(m: tiling.Matrix) -> Plan:
        rounding = _stochastic(m, fmt, shape, 0) if stochastic else _NEAREST
        return _group_plan(m, fmt, "quantize", dtype, aligned, device, rounding, swizzled=True)

    return tuple((m, plan(m)) for m in tiling.matrices(shape, strides, _MATRICES))


def encode_swizzled(x: Tensor, fmt: Format, parts: Parts, seed: int | None = None) -> None:
    """Codes, and scales in tiles of 128 x 4. With a seed, rounding is stochastic."""
    qdata, scale, divisor = parts["qdata"], parts["scale"], parts.get("tensor_scale", x)
    aligned = qdata.data_ptr() % 4 == 0
    words = () if seed is None else philox.halves(seed)
    for m, plan in _swizzled_plans(x.shape, x.stride(), x.dtype, fmt, aligned, x.device, seed is not None):
        own = _own(scale, m)
        plan(_view(x, m), _own(qdata, m), own, own, divisor, seed=words)


def encode_both(x: Tensor, fmt: Format, parts: Parts, other: Parts, given_tensor_scale: bool) -> None:
    """Codes and scales of x into `parts` and of x.mT into `other`, read once."""
    if x.stride(-1) != 1 and x.stride(-2) == 1:  # the rows of a tile are what is contiguous
        x, parts, other = x.mT, other, parts
    if fmt.tensor_scale and not given_tensor_scale:
        tensor_scale(x, fmt, parts["tensor_scale"])  # the kernel copies it to `other`
    aligned = (parts["qdata"].data_ptr() | other["qdata"].data_ptr()) % 4 == 0  # to 32-bit words
    sides = (parts, other)
    own = [p for side in sides for p in (side["qdata"], side["scale"], side.get("zero_point", side["scale"]))]
    divisors = [side.get("tensor_scale", x) for side in sides]
    for m, plan in _both_plans(x.shape, x.stride(), x.dtype, fmt, aligned):
        plan(_view(x, m), *(_own(part, m) for part in own), *divisors)


@_cached
def _hadamard_plans(
    shape: Shape, strides: Shape, dtype: torch.dtype, bits: int, inverse: bool, device: torch.device
) -> Plans:
    from tritonq.kernels.hadamard import hadamard_kernel

    result = []
    for m in _geometry(shape, strides, _BLOCKS):
        blocks, per_row = m.batch * m.rows * m.columns // 16, m.columns // 16
        config = tuning.hadamard_config(blocks)
        programs, integers = -(-blocks // config["BLOCKS"]), (m.rows, blocks, per_row, bits, *m.strides)
        constants = (inverse, config["BLOCKS"])
        result.append((m, Plan(hadamard_kernel, programs, integers, constants, _options(config, dtype))))
    return tuple(result)


def hadamard(x: Tensor, bits: int, inverse: bool, y: Tensor) -> None:
    """Rotated blocks of 16 into contiguous y."""
    for m, plan in _hadamard_plans(x.shape, x.stride(), x.dtype, bits, inverse, x.device):
        plan(_view(x, m), _own(y, m))


@_cached
def _cast_plans(
    shape: Shape, strides: Shape, dtype: torch.dtype, element: ElementType, in_place: bool, device: torch.device
) -> Plans:
    from tritonq.kernels.cast import cast_kernel

    result = []
    for m in _geometry(shape, strides, _ONE_GROUP):
        config = tuning.cast_config(m.rows, m.columns)
        tiles = -(-m.rows // config["BLOCK_M"]), -(-m.columns // config["BLOCK_N"])
        target = m.strides if in_place else (m.rows * m.columns, m.columns, 1)
        integers = (m.rows, m.columns, *tiles, *m.strides, *target)
        constants = (element, _limit(dtype), _axes(m, tiles), config["BLOCK_M"], config["BLOCK_N"])
        programs = m.batch * tiles[0] * tiles[1]
        result.append((m, Plan(cast_kernel, programs, integers, constants, _options(config, dtype))))
    return tuple(result)


def cast(x: Tensor, element: ElementType, y: Tensor) -> None:
    """x rounded to numbers of a minifloat into y, contiguous or x itself."""
    in_place = y.data_ptr() == x.data_ptr()
    for m, plan in _cast_plans(x.shape, x.stride(), x.dtype, element, in_place, x.device):
        view = _view(x, m)
        plan(view, view if in_place else _own(y, m))


def decode(parts: Parts, fmt: Format, y: Tensor) -> None:
    """Values into contiguous `y`."""
    qdata, scale = parts["qdata"], parts["scale"]
    if fmt.super_group:
        scales = [parts.get(name, scale) for name in _SUPER_SCALES]
        aligned = qdata.data_ptr() % 4 == 0
        for m, plan in _decode_plans(y.shape, y.stride(), y.dtype, fmt, aligned, y.device):
            plan(_own(qdata, m), *[_own(part, m) for part in scales], _own(y, m))
        return
    zero, divisor = parts.get("zero_point", scale), parts.get("tensor_scale", y)
    aligned = qdata.data_ptr() % 4 == 0
    for m, plan in _decode_plans(y.shape, y.stride(), y.dtype, fmt, aligned, y.device):
        if m.index:
            plan(_own(qdata, m), _own(scale, m), _own(zero, m), divisor, _own(y, m))
        else:
            plan(qdata, scale, zero, divisor, y)


def scales(x: Tensor, fmt: Format, parts: Parts) -> None:
    """Scales alone: groups that share bytes with their neighbours in tiles, larger ones through their keys."""
    scale = parts["scale"]
    zero, divisor = parts.get("zero_point", scale), parts.get("tensor_scale", x)
    if tuning.fits_tile(fmt, x.shape[-1]):
        for m, plan in _scale_plans(x.shape, x.stride(), x.dtype, fmt, x.device):
            plan(_view(x, m), _own(scale, m), _own(scale, m), _own(zero, m), divisor)
        return
    if fmt.group[0] == -1:
        return _of_whole_tensor(x, fmt, False, scale, zero, divisor)
    keys = torch.zeros((scale.numel(), 2), dtype=torch.int32, device=x.device)
    by_group = keys.view(*fmt.scale_shape(tuple(x.shape)), 2)
    for m, plan in _keys_plans(x.shape, x.stride(), x.dtype, fmt, False, x.device):
        plan(_view(x, m), by_group[m.index], keys, keys, divisor)
    _choose_plan(scale.numel(), fmt)(keys, scale, zero, divisor)


@_cached
def _scale_plans(shape: Shape, strides: Shape, dtype: torch.dtype, fmt: Format, device: torch.device) -> Plans:
    return tuple((m, _group_plan(m, fmt, "scale", dtype, False, device)) for m in _geometry(shape, strides, fmt))


@_cached
def _search_plans(
    shape: Shape, strides: Shape, dtype: torch.dtype, fmt: Format, weighted: bool
) -> tuple[tuple[tiling.Matrix, tuple[Plan, ...]], ...]:
    """Per slab one launch a stage. Slabs keep the rows of the tensor, over which importance repeats."""
    from tritonq.kernels.search import errors_kernel, search_kernel

    whole = fmt.group[0] == -1
    result = []
    for m in tiling.matrices(shape, strides, fmt):
        columns = m.columns if fmt.group[1] == -1 else fmt.group[1]
        groups = m.batch * -(-m.rows // max(1, fmt.group[0])) * -(-m.columns // columns)
        full = columns % search.BLOCK == 0 and m.columns % columns == 0
        launches = []
        for i, stage in enumerate(search.stages(fmt)):
            config = tuning.search_config(stage.count, groups)
            mirror = () if whole else (i == 0 and search.tries_both_signs(fmt),)
            extents = (config[k] for k in "MQL")
            constants = (full, weighted, search.fraction(fmt), stage.step, stage.below, *mirror, *extents)
            launches.append(
                Plan(
                    errors_kernel if whole else search_kernel,
                    -(-groups // config["M"]),
                    (m.rows, m.columns, groups, *m.strides),
                    (fmt, *constants),
                    {"num_warps": config["num_warps"]},
                    (2, 3),
                )
            )
        result.append((m, tuple(launches)))
    return tuple(result)


@_cached
def _pick_plans(fmt: Format) -> tuple[Plan, ...]:
    from tritonq.kernels.search import pick_kernel

    plans = []
    for stage in search.stages(fmt):
        config = tuning.search_config(stage.count, 1)
        constants = (fmt, stage.step, stage.below, config["Q"], config["L"])
        plans.append(Plan(pick_kernel, 1, (), constants, {"num_warps": 1}, (1, 2)))
    return tuple(plans)


def best_scales(x: Tensor, fmt: Format, parts: Parts, importance: Tensor | None) -> None:
    """Replace scales (and zero points) that the rule chose by the best of a search; importance fp32 [K]."""
    scale = parts["scale"]
    zero, divisor = parts.get("zero_point", scale), parts.get("tensor_scale", x)
    weights = x if importance is None else importance
    slabs = _search_plans(x.shape, x.stride(), x.dtype, fmt, importance is not None)
    if fmt.group[0] != -1:
        for m, plans in slabs:
            for plan in plans:
                plan(_view(x, m), weights, _own(scale, m), _own(zero, m), divisor)
        return
    for i, pick in enumerate(_pick_plans(fmt)):
        errors = torch.zeros((search.ANCHORS, search.stages(fmt)[i].count), dtype=torch.int64, device=x.device)
        for m, plans in slabs:
            plans[i](_view(x, m), weights, scale, zero, divisor, errors)
        pick(errors, scale, zero, divisor)


@_cached
def _at_once_plan(
    shape: Shape, strides: Shape, dtype: torch.dtype, fmt: Format, mode: str, aligned: bool, device: torch.device,
    stochastic: bool,
) -> tuple[Plan, int] | None:  # fmt: skip
    """The launch, and how many slots its programs meet in."""
    whole = fmt.group[0] == -1
    if whole == fmt.tensor_scale or not (whole or tuning.fits(fmt, shape[-1], stochastic)):
        return None
    m = _geometry(shape, strides, fmt)[0]
    if m.columns != math.prod(shape) or m.strides[2] != 1 or m.offset:
        return None
    alone = stochastic or dtype.itemsize > 4
    found = tuning.at_once_config(m.columns, fmt, mode, _multiprocessors(device), alone)
    if found is None:
        return None
    from tritonq.kernels.at_once import at_once_kernel

    config, tiles = found
    rounding = _stochastic(m, fmt, shape, 0) if stochastic else _NEAREST
    partial, words = _packing(m, fmt, config, mode, aligned)
    extents = (1, 1, 1, 1, 1) if whole else tuple(config[k] for k in ("S", "M", "R", "GROUPS", "W"))
    block, slots = config["BLOCK_N"] if whole else math.prod(extents), max(32, 1 << (tiles - 1).bit_length())
    plan = Plan(
        at_once_kernel,
        tiles,
        (*rounding[1], m.columns, fmt.row_bytes(m.columns), tiles),
        (fmt, mode, rounding[0], _limit(dtype), partial, words, block, slots, *extents),
        {**_options(config, dtype, rounding[0]), "maxnreg": config["maxnreg"], "launch_cooperative_grid": True},
        (2, 3) if mode == "qdq" else (1, 2, 3),
    )
    return plan, slots


def encode_at_once(
    x: Tensor,
    fmt: Format,
    parts: Parts,
    y: Tensor | None,
    seed: int | None,
    slots: Callable[[int], Tensor | None],
) -> bool:
    """`encode` with the tensor-wide scale, which is not given, in one launch; False, and nothing done, where that is
    impossible. `slots` gives as many as asked for, or None, where there is a launch (`tritonq.meeting`)."""
    target, mode = (parts["qdata"], "quantize") if y is None else (y, "qdq")
    aligned = target.data_ptr() % 4 == 0
    found = _at_once_plan(x.shape, x.stride(), x.dtype, fmt, mode, aligned, x.device, seed is not None)
    where = None if found is None else slots(found[1])
    if found is None or where is None:
        return False
    scale = parts.get("scale", target)
    words = () if seed is None else philox.halves(seed)
    zero, divisor = parts.get("zero_point", scale), parts.get("tensor_scale", x)
    try:
        found[0](x, target, scale, zero, divisor, where, seed=words)
    except RuntimeError as error:
        if "cooperative" not in str(error):
            raise
        return False  # a part of a GPU that holds fewer programs than its multiprocessors suggest; nothing was launched
    return True


def _of_whole_tensor(x: Tensor, fmt: Format, finite: bool, scale: Tensor, zero: Tensor, divisor: Tensor) -> None:
    """The one scale (and zero point) of a tensor; with `finite` its tensor scale, of its finite elements."""
    keys = torch.zeros(3, dtype=torch.int32, device=x.device)  # two keys, and how many programs have ended
    for m, plan in _keys_plans(x.shape, x.stride(), x.dtype, fmt, finite, x.device):
        plan(_view(x, m), keys, scale, zero, divisor)


def tensor_scale(x: Tensor, fmt: Format, out: Tensor) -> None:
    """The tensor-wide divisor into out, fp32 [1]."""
    _of_whole_tensor(x, fmt, True, out, out, out)
