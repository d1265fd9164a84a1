"""Quantize, dequantize and QDQ of plain tensors: check, allocate, plan, launch.

GPU tensors go to the Triton kernels, CPU tensors to the tiled torch path (`tritonq.tiling`); both give the same bits.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from tritonq import tiling, tuning
from tritonq.formats import Format, Shape, get_format
from tritonq.reference import Parts

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def allocate(fmt: Format, shape: Shape, device: torch.device) -> Parts:
    """Uninitialised parts of a tensor of `shape`."""
    return {name: torch.empty(s, dtype=d, device=device) for name, (s, d) in fmt.storage(shape).items()}


def check_input(x: Tensor, fmt: Format) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{fmt.name} quantizes bfloat16, float16, float32 and float64 tensors, got {x.dtype}; cast it first")
    fmt.scale_shape(tuple(x.shape))  # raises where the format cannot share scales over this shape


def _check_given(name: str, value: Tensor, fmt: Format, x: Tensor) -> Tensor:
    shape, dtype = fmt.storage(tuple(x.shape)).get(name, (None, None))
    if shape is None:
        raise ValueError(f"{fmt.name} has no {name}; leave it out")
    if tuple(value.shape) != shape and not (name == "tensor_scale" and value.numel() == 1):
        raise ValueError(f"{name} for {fmt.name} and a tensor of shape {tuple(x.shape)} has shape {shape}, got {tuple(value.shape)}")
    if value.dtype is not dtype:
        raise TypeError(f"{name} of {fmt.name} is stored as {dtype}, got {value.dtype}; cast it, it is then used verbatim")
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


def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


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
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.device.type == "meta":
        return y
    parts: Parts = {}
    needed = fmt.storage(tuple(x.shape))
    del needed["qdata"]
    if scale is None and uses_triton(x) and tuning.fits(fmt, tuple(x.shape)):
        needed = {k: v for k, v in needed.items() if k == "tensor_scale"}  # scales never leave the kernel
    parts = {name: torch.empty(s, dtype=d, device=x.device) for name, (s, d) in needed.items()}
    given = _fill_given(parts, x, fmt, scale, zero_point, tensor_scale)
    _run(x, fmt, parts, given, tensor_scale is not None, y)
    return y


def dequantize(parts: Parts, fmt: Format | str, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Values of `shape` and `dtype` (rounded once, from fp32; saturating) from contiguous parts."""
    fmt = get_format(fmt)
    qdata = parts["qdata"]
    if dtype not in FLOATS:
        raise TypeError(f"dequantize gives bfloat16, float16, float32 or float64, got {dtype}")
    y = torch.empty(shape, dtype=dtype, device=qdata.device)
    if y.numel() and y.device.type != "meta":
        if uses_triton(y):
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
    if uses_triton(x) and x.numel():
        out = torch.empty(1, dtype=torch.float32, device=x.device)
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

_OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}  # a fused multiply-add would round differently from torch


def _device_of(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _raw(part: Tensor) -> Tensor:
    """A part as integers of its width: kernels move bits, and sm_80 has no fp8 pointers."""
    return part.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[part.dtype.itemsize])


def _limit(dtype: torch.dtype) -> float:
    return torch.finfo(torch.float32 if dtype is torch.float64 else dtype).max


def _slabs(x: Tensor, fmt: Format, outputs: Parts) -> list[tuple[Tensor, tiling.Matrix, Parts]]:
    """[batch, N, K] slabs of x with the outputs that belong to each."""
    columns = x.shape[-1]
    flat_groups = fmt.group[1] > 0 and fmt.group[0] == 1 and columns % fmt.group[1] == 0
    if x.is_contiguous() and (flat_groups or fmt.group[0] == -1) and columns * fmt.bits % 8 == 0:
        n = x.numel()  # one long row: groups and bytes follow each other without a gap
        return [(x, tiling.Matrix((), 1, 1, n, (n, n, 1), 0), outputs)]
    slabs = []
    for m in tiling.matrices(x, fmt):
        own = {k: v if v.numel() == 1 else v[m.index] for k, v in outputs.items()}
        view = x.as_strided((m.batch, m.rows, m.columns), m.strides, x.storage_offset() + m.offset)
        slabs.append((view, m, own))
    return slabs


def _launch(x: Tensor, fmt: Format, parts: Parts, given: bool, y: Tensor | None) -> None:
    from tritonq.kernels.quantize import apply_kernel, group_kernel

    mode = "quantize" if y is None else "qdq"
    target = parts["qdata"] if y is None else y
    one_pass = tuning.fits(fmt, tuple(x.shape))
    if not given and not one_pass:
        _launch_scales(x, fmt, parts)
        given = True
    raw_target = target if y is not None else _raw(target)
    outputs = {"target": raw_target, **{k: _raw(v) for k, v in parts.items() if k in ("scale", "zero_point")}}
    divisor = parts.get("tensor_scale", raw_target)
    for view, m, own in _slabs(x, fmt, outputs):
        scale, zero = own.get("scale", own["target"]), own.get("zero_point", own["target"])
        shared = {"FMT": fmt, "MODE": mode, "LIMIT": _limit(x.dtype)}
        if given:
            config = tuning.flat_config(m.rows, m.columns, fmt)
            tiles = -(-m.rows // config["BLOCK_M"]), -(-m.columns // config["BLOCK_N"])
            apply_kernel[(m.batch * tiles[0] * tiles[1],)](
                view, own["target"], scale, zero, divisor, m.rows, m.columns, *tiles, *m.strides, **shared, **config, **_OPTIONS
            )  # fmt: skip
        else:
            config, tiles = tuning.group_config(m.rows, m.columns, fmt)
            group_kernel[(m.batch * tiles[0] * tiles[1],)](
                view, own["target"], scale, zero, divisor, m.rows, m.columns, *tiles, *m.strides, **shared, **config, **_OPTIONS
            )  # fmt: skip


def _launch_scales(x: Tensor, fmt: Format, parts: Parts) -> None:
    """Scales alone: groups that share bytes with their neighbours in tiles, larger ones through their keys."""
    from tritonq.kernels.quantize import group_kernel
    from tritonq.kernels.stats import choose_kernel

    scale, zero = _raw(parts["scale"]), parts.get("zero_point", _raw(parts["scale"]))
    divisor = parts.get("tensor_scale", scale)
    if tuning.fits_tile(fmt, tuple(x.shape)):
        for view, m, own in _slabs(x, fmt, {"scale": scale, "zero_point": zero}):
            config, tiles = tuning.group_config(m.rows, m.columns, fmt)
            group_kernel[(m.batch * tiles[0] * tiles[1],)](
                view, own["scale"], own["scale"], own["zero_point"], divisor, m.rows, m.columns, *tiles, *m.strides,
                FMT=fmt, MODE="scale", LIMIT=0.0, **config, **_OPTIONS,
            )  # fmt: skip
        return
    keys = torch.zeros((parts["scale"].numel(), 2), dtype=torch.int32, device=x.device).view(torch.uint32)
    _launch_keys(x, fmt, keys, finite=False)
    groups = parts["scale"].numel()
    choose_kernel[(-(-groups // 256),)](keys, scale, zero, divisor, groups, FMT=fmt, BLOCK=256, **_OPTIONS)


def _launch_keys(x: Tensor, fmt: Format, keys: Tensor, finite: bool) -> None:
    from tritonq.kernels.stats import keys_kernel

    rows, cols = fmt.group
    whole = finite or rows == -1
    for view, m, own in _slabs(x, fmt, {"keys": keys.view(*fmt.scale_shape(tuple(x.shape)), 2) if not whole else keys}):
        if whole:
            extents = (m.batch * m.rows, m.columns, m.batch * m.rows)
            per_column = per_row = groups = 1
        else:
            extents = (rows, m.columns if cols == -1 else cols, m.rows)
            per_column, per_row = -(-m.rows // rows), 1 if cols == -1 else -(-m.columns // cols)
            groups = m.batch * per_column * per_row
        config = tuning.keys_config(extents[0], extents[1])
        splits = tuning.splits(groups, extents[0], extents[1], config)
        keys_kernel[(groups * splits,)](
            view, keys if whole else own["keys"], m.rows, m.columns, *extents, per_column, per_row, splits, *m.strides,
            FMT=fmt, FINITE=finite, **config, **_OPTIONS,
        )  # fmt: skip


def _launch_tensor_scale(x: Tensor, fmt: Format, out: Tensor) -> None:
    from tritonq.kernels.stats import tensor_scale_kernel

    with _device_of(x):
        keys = torch.zeros((1, 2), dtype=torch.int32, device=x.device).view(torch.uint32)
        _launch_keys(x, fmt, keys, finite=True)
        tensor_scale_kernel[(1,)](keys, out, FMT=fmt, **_OPTIONS)


def _launch_dequantize(parts: Parts, fmt: Format, y: Tensor) -> None:
    from tritonq.kernels.dequantize import dequantize_kernel

    outputs = {"y": y, **{k: _raw(v) for k, v in parts.items() if k != "tensor_scale"}}
    divisor = parts.get("tensor_scale", y)
    with _device_of(y):
        for _, m, own in _slabs(y, fmt, outputs):
            config = tuning.flat_config(m.rows, m.columns, fmt)
            tiles = -(-m.rows // config["BLOCK_M"]), -(-m.columns // config["BLOCK_N"])
            dequantize_kernel[(m.batch * tiles[0] * tiles[1],)](
                own["qdata"], own["scale"], own.get("zero_point", own["scale"]), divisor, own["y"],
                m.rows, m.columns, *tiles, FMT=fmt, LIMIT=_limit(y.dtype), **config, **_OPTIONS,
            )  # fmt: skip
