"""From an op on a tensor to kernel launches: which kernel, over which slabs, in which tiles.

Plans depend on shapes, strides, types, the format and the kind of rounding only, so they are made once and kept; the
seed of stochastic rounding comes with the call.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from tritonq import tiling, tuning, tuning_cache
from tritonq.codecs import philox
from tritonq.formats import Format, Shape, get_format
from tritonq.launch import Plan
from tritonq.reference import Parts

Plans = tuple[tuple[tiling.Matrix, Plan], ...]

_ONE_GROUP = get_format("fp8_e4m3_tensor")  # only its geometry: one group, whole bytes
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
    whole_groups = fmt.group[0] == -1 or (fmt.group[0] == 1 and fmt.group[1] > 0 and columns % fmt.group[1] == 0)
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


def _stochastic(m: tiling.Matrix, fmt: Format, shape: Shape) -> _Rounding:
    """Four neighbours share a counter where those of each tile and row begin at a multiple of four, else they take two
    counters."""
    cols, first = fmt.group[1], m.first(shape)
    whole_tiles = cols & (cols - 1) == 0 or cols < 0 or cols % 4 == 0
    whole_rows = m.columns % 4 == 0 or m.batch * m.rows == 1
    return (1 if whole_tiles and whole_rows and first % 4 == 0 else 2), (first,)


def _group_plan(
    m: tiling.Matrix, fmt: Format, mode: str, dtype: torch.dtype, aligned: bool, device: torch.device,
    rounding: _Rounding = _NEAREST,
) -> Plan:  # fmt: skip
    from tritonq.kernels.quantize import group_kernel

    config, tiles = tuning.group_config(m.rows, m.columns, fmt, mode, _choice(mode, m, fmt, dtype, device))
    partial, flat = m.columns * fmt.bits % 8 != 0, m.batch * tiles[0] == 1
    words = aligned and mode == "quantize" and tuning.in_words(fmt, m.columns, config)
    extents = (config[k] for k in ("S", "M", "R", "GROUPS", "W"))
    return Plan(
        group_kernel,
        m.batch * tiles[0] * tiles[1],
        (*rounding[1], m.rows, m.columns, fmt.row_bytes(m.columns), *tiles, *m.strides),
        (fmt, mode, rounding[0], _limit(dtype), partial, flat, words, *extents),
        _options(config, dtype, rounding[0]),
        (2, 3) if mode == "qdq" else (1, 2, 3),
    )


def _row_plan(
    m: tiling.Matrix, fmt: Format, mode: str, dtype: torch.dtype, aligned: bool, device: torch.device,
    rounding: _Rounding,
) -> Plan:  # fmt: skip
    from tritonq.kernels.quantize import row_kernel

    config = tuning.row_config(_choice(f"row_{mode}", m, fmt, dtype, device))
    words = aligned and mode == "quantize" and tuning.in_words(fmt, m.columns, config)
    return Plan(
        row_kernel,
        m.batch * m.rows,
        (*rounding[1], m.rows, m.columns, fmt.row_bytes(m.columns), *m.strides),
        (fmt, mode, rounding[0], _limit(dtype), m.columns * fmt.bits % 8 != 0, words, config["BLOCK_N"]),
        _options(config, dtype, rounding[0]),
        (2, 3) if mode == "qdq" else (1, 2, 3),
    )


def _apply_plan(
    m: tiling.Matrix, fmt: Format, mode: str, dtype: torch.dtype, aligned: bool, device: torch.device,
    rounding: _Rounding,
) -> Plan:  # fmt: skip
    from tritonq.kernels.quantize import apply_kernel

    op = "apply" if mode == "quantize" else "apply_qdq"
    config = tuning.flat_config(m.rows, m.columns, fmt, _choice(op, m, fmt, dtype, device))
    tiles = -(-m.rows // config["BLOCK_M"]), -(-m.columns // config["BLOCK_N"])
    partial, flat = m.columns * fmt.bits % 8 != 0, m.batch * tiles[0] == 1
    words = aligned and mode == "quantize" and tuning.in_words(fmt, m.columns, config)
    return Plan(
        apply_kernel,
        m.batch * tiles[0] * tiles[1],
        (*rounding[1], m.rows, m.columns, fmt.row_bytes(m.columns), *tiles, *m.strides),
        (fmt, mode, rounding[0], _limit(dtype), partial, flat, words, config["BLOCK_M"], config["BLOCK_N"]),
        _options(config, dtype, rounding[0]),
        (2, 3) if mode == "qdq" else (1, 2, 3),
    )


def _dequantize_plan(m: tiling.Matrix, fmt: Format, dtype: torch.dtype, aligned: bool, device: torch.device) -> Plan:
    from tritonq.kernels.dequantize import dequantize_kernel

    config = tuning.flat_config(m.rows, m.columns, fmt, _choice("dequantize", m, fmt, dtype, device))
    tiles = -(-m.rows // config["BLOCK_M"]), -(-m.columns // config["BLOCK_N"])
    words = aligned and tuning.in_words(fmt, m.columns, config)
    return Plan(
        dequantize_kernel,
        m.batch * tiles[0] * tiles[1],
        (m.rows, m.columns, fmt.row_bytes(m.columns), *tiles),
        (fmt, _limit(dtype), m.batch * tiles[0] == 1, words, config["BLOCK_M"], config["BLOCK_N"]),
        _options(config, dtype),
        (0, 1, 2),
    )


@_cached
def _encode_plans(
    shape: Shape, strides: Shape, dtype: torch.dtype, fmt: Format, mode: str, given: bool, aligned: bool,
    device: torch.device, stochastic: bool = False,
) -> Plans:  # fmt: skip
    def plan(m: tiling.Matrix) -> Plan:
        rounding = _stochastic(m, fmt, shape) if stochastic else _NEAREST
        if given:
            return _apply_plan(m, fmt, mode, dtype, aligned, device, rounding)
        if tuning.loops_over_rows(fmt, m.columns, stochastic):
            return _row_plan(m, fmt, mode, dtype, aligned, device, rounding)
        return _group_plan(m, fmt, mode, dtype, aligned, device, rounding)

    return tuple((m, plan(m)) for m in _geometry(shape, strides, fmt))


@_cached
def single(
    shape: Shape, strides: Shape, dtype: torch.dtype, fmt: Format, mode: str, device: torch.device
) -> Plan | None:
    """The one launch that quantizes a tensor of floats ("quantize", "qdq") with nothing given, if one is enough."""
    fmt.scale_shape(shape)  # raises where the format cannot share scales over this shape
    floats = dtype.is_floating_point and dtype.itemsize > 1
    if not floats or fmt.tensor_scale or math.prod(shape) == 0 or not tuning.fits(fmt, shape[-1]):
        return None
    (m, plan), *others = _encode_plans(shape, strides, dtype, fmt, mode, False, True, device, False)
    return None if others or m.index or m.offset else plan


@_cached
def _decode_plans(
    shape: Shape, strides: Shape, dtype: torch.dtype, fmt: Format, aligned: bool, device: torch.device
) -> Plans:
    return tuple((m, _dequantize_plan(m, fmt, dtype, aligned, device)) for m in _geometry(shape, strides, fmt))


@_cached
def _keys_plans(
    shape: Shape, strides: Shape, dtype: torch.dtype, fmt: Format, finite: bool, device: torch.device
) -> Plans:
    from tritonq.kernels.stats import keys_kernel

    rows, cols = fmt.group
    whole = finite or rows == -1
    result = []
    for m in _geometry(shape, strides, _ONE_GROUP if whole else fmt):
        if whole:
            extents = (m.batch * m.rows, m.columns, m.batch * m.rows)
            per_column = per_row = groups = 1
        else:
            extents = (rows, m.columns if cols == -1 else cols, m.rows)
            per_column, per_row = -(-m.rows // rows), 1 if cols == -1 else -(-m.columns // cols)
            groups = m.batch * per_column * per_row
        config = tuning.keys_config(extents[0], extents[1], _choice("keys", m, fmt, dtype, device))
        splits = tuning.splits(groups, extents[0], extents[1], config)
        integers = (m.rows, m.columns, *extents, per_column, per_row, splits, *m.strides)
        constants = (fmt, finite, config["BLOCK_M"], config["BLOCK_N"])
        result.append((m, Plan(keys_kernel, groups * splits, integers, constants, _options(config, torch.float32))))
    return tuple(result)


@_cached
def _choose_plan(groups: int, fmt: Format) -> Plan:
    from tritonq.kernels.stats import choose_kernel

    return Plan(choose_kernel, -(-groups // 256), (groups,), (fmt, 256), {"num_warps": 4}, (1, 2))


@_cached
def _tensor_scale_plan(fmt: Format) -> Plan:
    from tritonq.kernels.stats import tensor_scale_kernel

    return Plan(tensor_scale_kernel, 1, (), (fmt,), {"num_warps": 1})


def forget() -> None:
    """Drop the plans that are kept: what they were made from (tile sizes, measured choices) has changed."""
    for kept in (_encode_plans, single, _decode_plans, _keys_plans, _choose_plan, _tensor_scale_plan, _scale_plans):
        kept.cache_clear()


def encode(x: Tensor, fmt: Format, parts: Parts, given: bool, y: Tensor | None, seed: int | None = None) -> None:
    """Codes and scales into `parts`, or values into `y`; scales that are `given` are only read. With a seed, rounding
    is stochastic."""
    mode = "quantize" if y is None else "qdq"
    if not given and not tuning.fits(fmt, x.shape[-1], seed is not None):
        scales(x, fmt, parts)
        given = True
    target = parts["qdata"] if y is None else y
    scale = parts.get("scale", target)
    zero, divisor = parts.get("zero_point", scale), parts.get("tensor_scale", x)
    aligned = target.data_ptr() % 4 == 0  # to 32-bit words
    words = () if seed is None else philox.halves(seed)
    for m, plan in _encode_plans(x.shape, x.stride(), x.dtype, fmt, mode, given, aligned, x.device, seed is not None):
        if m.index or m.offset:
            plan(_view(x, m), _own(target, m), _own(scale, m), _own(zero, m), divisor, seed=words)
        else:
            plan(x, target, scale, zero, divisor, seed=words)


def decode(parts: Parts, fmt: Format, y: Tensor) -> None:
    """Values into contiguous `y`."""
    qdata, scale = parts["qdata"], parts["scale"]
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
    keys = torch.zeros((scale.numel(), 2), dtype=torch.int32, device=x.device)
    _keys(x, fmt, keys, finite=False)
    _choose_plan(scale.numel(), fmt)(keys, scale, zero, divisor)


@_cached
def _scale_plans(shape: Shape, strides: Shape, dtype: torch.dtype, fmt: Format, device: torch.device) -> Plans:
    return tuple((m, _group_plan(m, fmt, "scale", dtype, False, device)) for m in _geometry(shape, strides, fmt))


def _keys(x: Tensor, fmt: Format, keys: Tensor, finite: bool) -> None:
    """Maximal keys of groups (or, with `finite`, of the finite elements of the tensor) into zero-filled keys
    [groups, 2]."""
    whole = finite or fmt.group[0] == -1
    if not whole:
        keys = keys.view(*fmt.scale_shape(tuple(x.shape)), 2)
    for m, plan in _keys_plans(x.shape, x.stride(), x.dtype, fmt, finite, x.device):
        plan(_view(x, m), keys if whole else keys[m.index])


def tensor_scale(x: Tensor, fmt: Format, out: Tensor) -> None:
    """The tensor-wide divisor into out, fp32 [1]."""
    keys = torch.zeros((1, 2), dtype=torch.int32, device=x.device)
    _keys(x, fmt, keys, finite=True)
    _tensor_scale_plan(fmt)(keys, out)
