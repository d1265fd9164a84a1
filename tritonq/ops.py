"""Quantize, dequantize and QDQ of plain tensors: check, allocate, plan, launch.

GPU tensors go to the Triton kernels, CPU tensors to the tiled torch path (`tritonq.tiling`); both give the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor

from tritonq import tiling, tuning
from tritonq.formats import Format, Shape, get_format
from tritonq.launch import launch
from tritonq.memory import empty
from tritonq.reference import Parts

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def allocate(fmt: Format, shape: Shape, device: torch.device) -> Parts:
    """Uninitialised parts of a tensor of `shape`."""
    return {name: empty(s, d, device) for name, (s, d) in fmt.storage(shape).items()}


_SCALES = ("scale", "zero_point", "tensor_scale")


def _allocate_scales(fmt: Format, x: Tensor, names: tuple[str, ...]) -> Parts:
    """Uninitialised parts besides the codes, those of `names` that the format has."""
    storage = fmt.storage(tuple(x.shape))
    return {name: empty(s, d, x.device) for name, (s, d) in storage.items() if name in names}


def check_input(x: Tensor, fmt: Format) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{fmt.name} quantizes bfloat16, float16, float32 and float64 tensors, got {x.dtype}; cast it first"
        )
    fmt.scale_shape(tuple(x.shape))  # raises where the format cannot share scales over this shape


def _check_given(name: str, value: Tensor, fmt: Format, x: Tensor) -> Tensor:
    shape, dtype = fmt.storage(tuple(x.shape)).get(name, (None, None))
    if shape is None:
        raise ValueError(f"{fmt.name} has no {name}; leave it out")
    if tuple(value.shape) != shape and not (name == "tensor_scale" and value.numel() == 1):
        raise ValueError(
            f"{name} for {fmt.name} and a tensor of shape {tuple(x.shape)} has shape {shape}, got {tuple(value.shape)}"
        )
    if value.dtype is not dtype:
        raise TypeError(
            f"{name} of {fmt.name} is stored as {dtype}, got {value.dtype}; cast it, it is then used verbatim"
        )
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device} and the tensor on {x.device}; move one of them")
    return value.reshape(shape)


def _fill_given(
    parts: Parts, x: Tensor, fmt: Format, scale: Tensor | None, zero_point: Tensor | None, tensor_scale: Tensor | None
) -> bool:
    """Copy precomputed parts into place; whether the scales are among them."""
    if fmt.zero_point and (scale is None) != (zero_point is None):
        raise ValueError(f"{fmt.name} needs scale and zero_point together, or neither")
    for name, value in (("scale", scale), ("zero_point", zero_point), ("tensor_scale", tensor_scale)):
        if value is not None:
            parts[name].copy_(_check_given(name, value, fmt, x)) if name in parts else _check_given(name, value, fmt, x)
    return scale is not None


def uses_triton(x: Tensor) -> bool:
    """Whether kernels run for this tensor: on a GPU with Triton installed, or under Triton's interpreter."""
    if not _triton_installed():
        return False
    return x.device.type in ("cuda", "xpu") or (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


@functools.cache
def _triton_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


def quantize(
    x: Tensor,
    fmt: Format | str,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    out: Parts | None = None,
) -> Parts:
    """Parts of x by name, as `fmt.storage(x.shape)` describes them; `out` receives them where it is given.

    Args:
        x: floating tensor of >= 1 dimension, any strides, any size.
        scale, zero_point, tensor_scale: precomputed parts, used verbatim.

    Raises:
        ValueError: unknown format, or parts of another shape. TypeError: x is not floating.
    """
    fmt = get_format(fmt)
    check_input(x, fmt)
    parts = allocate(fmt, tuple(x.shape), x.device) if out is None else out
    if x.device.type == "meta":
        return parts
    given = _fill_given(parts, x, fmt, scale, zero_point, tensor_scale)
    _run(x, fmt, parts, given, tensor_scale is not None, None)
    return parts


def qdq(
    x: Tensor,
    fmt: Format | str,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    """dequantize(quantize(x)) of x's shape and dtype, contiguous, without codes in memory."""
    fmt = get_format(fmt)
    check_input(x, fmt)
    y = empty(x.shape, x.dtype, x.device)
    if x.device.type == "meta":
        return y
    inside = scale is None and uses_triton(x) and tuning.fits(fmt, x.shape[-1])  # scales never leave the kernel
    parts = _allocate_scales(fmt, x, ("tensor_scale",) if inside else _SCALES)
    given = _fill_given(parts, x, fmt, scale, zero_point, tensor_scale)
    _run(x, fmt, parts, given, tensor_scale is not None, y)
    return y


def qdq_backward(
    x: Tensor,
    dy: Tensor,
    fmt: Format | str,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    """dy where x / scale lies within the element's range, 0 where QDQ clipped it; the scales are computed again."""
    fmt = get_format(fmt)
    check_input(x, fmt)
    dx = empty(x.shape, dy.dtype, x.device)
    if x.device.type == "meta" or x.numel() == 0:
        return dx
    parts = _allocate_scales(fmt, x, _SCALES)
    given = _fill_given(parts, x, fmt, scale, zero_point, tensor_scale)
    if fmt.tensor_scale and tensor_scale is None:
        parts["tensor_scale"].copy_(_tensor_scale(x, fmt))
    if not given:
        if uses_triton(x):
            with _device_of(x):
                _launch_scales(x, fmt, parts)
        else:
            tiling.choose(x, fmt, parts)
    tiling.clip_gradient(x, dy.contiguous(), fmt, parts, dx)
    return dx


def dequantize(parts: Parts, fmt: Format | str, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Values of `shape` and `dtype` (rounded once, from fp32; saturating) from contiguous parts."""
    fmt = get_format(fmt)
    qdata = parts["qdata"]
    if dtype not in FLOATS:
        raise TypeError(f"dequantize gives bfloat16, float16, float32 or float64, got {dtype}")
    y = empty(shape, dtype, qdata.device)
    if y.numel() and y.device.type != "meta":
        if uses_triton(y):
            with _device_of(y):
                _launch_dequantize(parts, fmt, y)
        else:
            tiling.decode(fmt, parts, y)
    return y


def tensor_scale(x: Tensor, fmt: Format | str) -> Tensor:
    """The tensor-wide divisor that `fmt` (one with tensor_scale) gives x, fp32 [1]: scale.max * element.max / amax."""
    fmt = get_format(fmt)
    check_input(x, fmt)
    if not fmt.tensor_scale:
        raise ValueError(f"{fmt.name} has no tensor_scale")
    return _tensor_scale(x, fmt)


def _tensor_scale(x: Tensor, fmt: Format) -> Tensor:
    if uses_triton(x) and x.numel():
        out = torch.empty(1, dtype=torch.float32, device=x.device)
        with _device_of(x):
            _launch_tensor_scale(x, fmt, out)
        return out
    return tiling.tensor_scale(x, fmt)


def _run(x: Tensor, fmt: Format, parts: Parts, given: bool, given_tensor_scale: bool, y: Tensor | None) -> None:
    if x.numel() == 0 or not uses_triton(x):
        if fmt.tensor_scale and not given_tensor_scale:
            parts["tensor_scale"].copy_(tiling.tensor_scale(x, fmt))
        if x.numel():
            tiling.encode(x, fmt, parts, given, y)
        elif not given and "scale" in parts:
            _empty_scales(x, fmt, parts)
        return
    with _device_of(x):
        if fmt.tensor_scale and not given_tensor_scale:
            _launch_tensor_scale(x, fmt, parts["tensor_scale"])
        _launch(x, fmt, parts, given, y)


def _empty_scales(x: Tensor, fmt: Format, parts: Parts) -> None:
    """Scales of groups without elements are those of zeros."""
    from tritonq.codecs import scale as scales

    zero = torch.zeros(parts["scale"].shape, device=x.device)
    chosen, zero_point = scales.choose(zero, zero, fmt, parts.get("tensor_scale"))
    parts["scale"].copy_(chosen)
    if zero_point is not None:
        parts["zero_point"].copy_(zero_point)


# ------------------------------------------------------------------------------------------------------- launching


def _device_of(x: Tensor) -> Any:
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _NO_CONTEXT


_NO_CONTEXT = contextlib.nullcontext()


Plan = tuple[int, tuple[Any, ...], tuple[Any, ...]]  # programs, integer arguments, (constants, warps)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _raw(part: Tensor) -> Tensor:
    """A part as integers of its width: kernels move bits, and sm_80 has no fp8 pointers."""
    integer = _INTEGERS[part.dtype.itemsize]
    return part if part.dtype is integer else part.view(integer)


_LIMITS = {d: torch.finfo(torch.float32 if d is torch.float64 else d).max for d in FLOATS}


@functools.lru_cache(maxsize=4096)
def _geometry(shape: Shape, strides: Shape, fmt: Format) -> list[tiling.Matrix]:
    """[batch, N, K] slabs of a tensor, at best one long row: groups and bytes then follow each other without a gap."""
    columns = shape[-1]
    whole_groups = fmt.group[0] == -1 or (fmt.group[0] == 1 and fmt.group[1] > 0 and columns % fmt.group[1] == 0)
    if whole_groups and columns * fmt.bits % 8 == 0 and tiling.is_contiguous(shape, strides):
        n = math.prod(shape)
        return [tiling.Matrix((), 1, 1, n, (n, n, 1), 0)]
    return tiling.matrices(shape, strides, fmt)


def _own(part: Tensor, m: tiling.Matrix) -> Tensor:
    """The part of one slab; parts of one element belong to all of them."""
    return part[m.index] if m.index and part.numel() > 1 else part


def _view(x: Tensor, m: tiling.Matrix) -> Tensor:
    """x from where the slab begins; kernels get the strides themselves."""
    if m.offset == 0:
        return x
    return x.as_strided((m.batch, m.rows, m.columns), m.strides, x.storage_offset() + m.offset)


def _partial(m: tiling.Matrix, fmt: Format) -> bool:
    """Whether a row of codes ends inside a byte."""
    return m.columns * fmt.bits % 8 != 0


@functools.lru_cache(maxsize=4096)
def _grouped_plan(m: tiling.Matrix, fmt: Format, mode: str, limit: float) -> Plan:
    """Programs, integer arguments and constants of `group_kernel` for one slab."""
    config, tiles = tuning.group_config(m.rows, m.columns, fmt, mode)
    flat = m.batch * tiles[0] == 1
    constants = (fmt, mode, limit, _partial(m, fmt), flat, *(config[k] for k in ("S", "M", "R", "GROUPS", "W")))
    return (
        m.batch * tiles[0] * tiles[1],
        (m.rows, m.columns, fmt.row_bytes(m.columns), *tiles, *m.strides),
        (constants, config["num_warps"]),
    )


@functools.lru_cache(maxsize=4096)
def _row_plan(m: tiling.Matrix, fmt: Format, mode: str, limit: float) -> Plan:
    """The same for `row_kernel`."""
    config = tuning.row_config()
    sizes = (m.rows, m.columns, fmt.row_bytes(m.columns), *m.strides)
    return m.batch * m.rows, sizes, ((fmt, mode, limit, _partial(m, fmt), config["BLOCK_N"]), config["num_warps"])


@functools.lru_cache(maxsize=4096)
def _flat_plan(m: tiling.Matrix, fmt: Format, mode: str, limit: float) -> Plan:
    """The same for `apply_kernel` and, with no mode, `dequantize_kernel`."""
    config = tuning.flat_config(m.rows, m.columns, fmt)
    tiles = -(-m.rows // config["BLOCK_M"]), -(-m.columns // config["BLOCK_N"])
    blocks = (m.batch * tiles[0] == 1, config["BLOCK_M"], config["BLOCK_N"])
    sizes = (m.rows, m.columns, fmt.row_bytes(m.columns), *tiles)
    if mode:
        return (
            m.batch * tiles[0] * tiles[1],
            (*sizes, *m.strides),
            ((fmt, mode, limit, _partial(m, fmt), *blocks), config["num_warps"]),
        )
    return m.batch * tiles[0] * tiles[1], sizes, ((fmt, limit, *blocks), config["num_warps"])


def _start(kernel: Any, plan: Plan, *tensors: Tensor) -> None:
    programs, integers, (constants, warps) = plan
    launch(kernel, programs, (*tensors, *integers), constants, warps)


def _launch(x: Tensor, fmt: Format, parts: Parts, given: bool, y: Tensor | None) -> None:
    from tritonq.kernels.quantize import apply_kernel, group_kernel, row_kernel

    mode = "quantize" if y is None else "qdq"
    if not given and not tuning.fits(fmt, x.shape[-1]):
        _launch_scales(x, fmt, parts)
        given = True
    target = _raw(parts["qdata"]) if y is None else y
    scale = _raw(parts["scale"]) if "scale" in parts else target
    zero = parts.get("zero_point", target)
    divisor = parts.get("tensor_scale", target)
    limit = _LIMITS[x.dtype]
    for m in _geometry(x.shape, x.stride(), fmt):
        own = (_view(x, m), _own(target, m), _own(scale, m), _own(zero, m), divisor)
        if given:
            _start(apply_kernel, _flat_plan(m, fmt, mode, limit), *own)
        elif tuning.loops_over_rows(fmt, m.columns):
            _start(row_kernel, _row_plan(m, fmt, mode, limit), *own)
        else:
            _start(group_kernel, _grouped_plan(m, fmt, mode, limit), *own)


def _launch_scales(x: Tensor, fmt: Format, parts: Parts) -> None:
    """Scales alone: groups that share bytes with their neighbours in tiles, larger ones through their keys."""
    from tritonq.kernels.quantize import group_kernel
    from tritonq.kernels.stats import choose_kernel

    scale = _raw(parts["scale"])
    zero = parts.get("zero_point", scale)
    divisor = parts.get("tensor_scale", scale)
    if tuning.fits_tile(fmt, x.shape[-1]):
        for m in _geometry(x.shape, x.stride(), fmt):
            own = (_view(x, m), _own(scale, m), _own(scale, m), _own(zero, m), divisor)
            _start(group_kernel, _grouped_plan(m, fmt, "scale", 0.0), *own)
        return
    groups = scale.numel()
    keys = torch.zeros((groups, 2), dtype=torch.int32, device=x.device)
    _launch_keys(x, fmt, keys, finite=False)
    launch(choose_kernel, -(-groups // 256), (keys, scale, zero, divisor, groups), (fmt, 256), 4)


def _launch_keys(x: Tensor, fmt: Format, keys: Tensor, finite: bool) -> None:
    """Maximal keys of groups (or, with `finite`, of the finite elements of the tensor) into zero-filled keys
    [groups, 2]."""
    from tritonq.kernels.stats import keys_kernel

    rows, cols = fmt.group
    whole = finite or rows == -1
    if not whole:
        keys = keys.view(*fmt.scale_shape(tuple(x.shape)), 2)
    for m in _geometry(x.shape, x.stride(), _WHOLE if whole else fmt):
        if whole:
            extents = (m.batch * m.rows, m.columns, m.batch * m.rows)
            per_column = per_row = groups = 1
        else:
            extents = (rows, m.columns if cols == -1 else cols, m.rows)
            per_column, per_row = -(-m.rows // rows), 1 if cols == -1 else -(-m.columns // cols)
            groups = m.batch * per_column * per_row
        config = tuning.keys_config(extents[0], extents[1])
        splits = tuning.splits(groups, extents[0], extents[1], config)
        own = keys if whole else keys[m.index]
        integers = (m.rows, m.columns, *extents, per_column, per_row, splits, *m.strides)
        constants = (fmt, finite, config["BLOCK_M"], config["BLOCK_N"])
        tensors = (_view(x, m), own)
        launch(keys_kernel, groups * splits, (*tensors, *integers), constants, config["num_warps"])


_WHOLE = get_format("fp8_e4m3_tensor")  # only its geometry: one group, whole bytes


def _launch_tensor_scale(x: Tensor, fmt: Format, out: Tensor) -> None:
    from tritonq.kernels.stats import tensor_scale_kernel

    keys = torch.zeros((1, 2), dtype=torch.int32, device=x.device)
    _launch_keys(x, fmt, keys, finite=True)
    launch(tensor_scale_kernel, 1, (keys, out), (fmt,), 1)


def _launch_dequantize(parts: Parts, fmt: Format, y: Tensor) -> None:
    from tritonq.kernels.dequantize import dequantize_kernel

    qdata, scale = _raw(parts["qdata"]), _raw(parts["scale"])
    zero, divisor = parts.get("zero_point", scale), parts.get("tensor_scale", y)
    for m in _geometry(y.shape, y.stride(), fmt):
        own = (_own(qdata, m), _own(scale, m), _own(zero, m), divisor, _own(y, m))
        _start(dequantize_kernel, _flat_plan(m, fmt, "", _LIMITS[y.dtype]), *own)
