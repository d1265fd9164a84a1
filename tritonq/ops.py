"""Quantize, dequantize and QDQ of plain tensors: check, allocate, plan, launch.

GPU tensors go to the Triton kernels, CPU tensors to the tiled torch path (`tritonq.tiling`); both give the same bits.

The same functions are operators of torch (`tritonq.operators`). Whoever traces (compile and export, fake tensors,
dispatch modes, function transforms) is sent there; eager calls save themselves the dispatcher.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tritonq import learned_plans, meeting, memory, plans, rotation, scale_tiles, tiles, tiling, tuning
from tritonq.formats import SUPER_PARTS, ElementType, Format, Shape, get_format, minifloat
from tritonq.layout import Layout
from tritonq.learned_reference import Learned, Wanted
from tritonq.memory import empty, empty_on_gpu
from tritonq.reference import Parts

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def allocate(fmt: Format, shape: Shape, device: torch.device) -> Parts:
    """Uninitialised parts of a tensor of `shape`."""
    return {name: empty(s, d, device) for name, (s, d) in fmt.storage(shape).items()}


_SCALES = ("scale", "zero_point", "tensor_scale", *SUPER_PARTS)


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


def _check_given(name: str, value: Tensor, fmt: Format, x: Tensor, anywhere: bool = False) -> Tensor:
    shape, dtype = fmt.storage(tuple(x.shape)).get(name, (None, None))
    if shape is None:
        raise ValueError(f"{fmt.name} has no {name}; leave it out")
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} of {fmt.name} is a tensor of {dtype}, got {type(value).__name__}")
    check_shape(name, value, shape, fmt, x)
    if value.dtype is not dtype:
        raise TypeError(
            f"{name} of {fmt.name} is stored as {dtype}, got {value.dtype}; cast it, it is then used verbatim"
        )
    if not anywhere:
        check_device(name, value, x)
    return value.reshape(shape)


def check_shape(name: str, value: Tensor, shape: Shape, fmt: Format, x: Tensor) -> None:
    """ValueError unless what goes with x has its shape; of a tensor scale any shape of one element will do."""
    if tuple(value.shape) != shape and not (name == "tensor_scale" and value.numel() == 1):
        raise ValueError(
            f"{name} for {fmt.name} and a tensor of shape {tuple(x.shape)} has shape {shape}, got {tuple(value.shape)}"
        )


def check_device(name: str, value: Tensor, x: Tensor) -> None:
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device} and the tensor on {x.device}; move one of them")


def _checked_out(out: Parts, fmt: Format, x: Tensor) -> Parts:
    for name, (shape, dtype) in fmt.storage(tuple(x.shape)).items():
        part = out.get(name)
        if part is None:
            raise ValueError(f"out lacks {name}; {fmt.name} has {', '.join(fmt.storage(tuple(x.shape)))}")
        if tuple(part.shape) != shape or part.dtype is not dtype or part.device != x.device or not part.is_contiguous():
            raise ValueError(
                f"out[{name!r}] has to be a contiguous {dtype} tensor of shape {shape} on {x.device}, got {part.dtype} "
                f"{tuple(part.shape)} with strides {part.stride()} on {part.device}"
            )
    return out


def _checked_given(
    x: Tensor,
    fmt: Format,
    scale: Tensor | None,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    *,
    anywhere: bool = False,
) -> Parts:
    """Precomputed parts by name, contiguous; on x's device unless they may lie `anywhere`."""
    if fmt.super_group and scale is not None:
        raise ValueError(
            f"{fmt.name} quantizes its scales again, in super-groups of {fmt.super_group} elements, and takes none "
            "that are given; leave scale out, or pass a format without super-groups"
        )
    if fmt.zero_point and (scale is None) != (zero_point is None):
        raise ValueError(f"{fmt.name} needs scale and zero_point together, or neither")
    given = (("scale", scale), ("zero_point", zero_point), ("tensor_scale", tensor_scale))
    return {
        name: _check_given(name, value, fmt, x, anywhere).contiguous() for name, value in given if value is not None
    }


def _fill_given(
    parts: Parts, x: Tensor, fmt: Format, scale: Tensor | None, zero_point: Tensor | None, tensor_scale: Tensor | None
) -> bool:
    """Copy precomputed parts into place; whether the scales are among them."""
    for name, value in _checked_given(x, fmt, scale, zero_point, tensor_scale).items():
        if name in parts:
            parts[name].copy_(value)
    return scale is not None


def check_search(search: str | bool | None, importance: Tensor | None, x: Tensor, fmt: Format, given: bool) -> bool:
    """Whether scales are searched for; raises where that makes no sense. `given`: a scale is."""
    if search not in (None, False, "mse"):
        raise ValueError(f"search is None (the scale rule of the format) or 'mse', got {search!r}")
    if search and given:
        raise ValueError("a scale that is passed in is used as it is; leave out scale, or search")
    if search and fmt.super_group:
        raise ValueError(f"{fmt.name} quantizes its scales again and has no search; leave search out")
    if importance is None:
        return bool(search)
    if not search:
        raise ValueError("importance weighs the errors of a scale search; pass search='mse' with it")
    if not isinstance(importance, Tensor) or not importance.is_floating_point():
        raise TypeError(
            f"importance is a floating tensor, got {getattr(importance, 'dtype', type(importance).__name__)}"
        )
    if tuple(importance.shape) != (x.shape[-1],):
        raise ValueError(
            f"importance has one weight a column, shape ({x.shape[-1]},) for a tensor of shape {tuple(x.shape)}, got "
            f"{tuple(importance.shape)}"
        )
    check_device("importance", importance, x)
    return True


def _weights(importance: Tensor | None, fmt: Format) -> Tensor | None:
    """fp32 weights, those of each group times a power of two that brings the largest near 1."""
    if importance is None:
        return None
    weights = importance.detach().to(torch.float32)
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        bad = int((~(torch.isfinite(weights) & (weights >= 0))).sum())
        raise ValueError(f"importance has {bad} weights that are negative or not finite; weights are >= 0")
    columns = fmt.group[1] if fmt.group[1] > 0 else weights.numel()
    groups = torch.nn.functional.pad(weights, (0, -weights.numel() % max(1, columns))).view(-1, max(1, columns))
    exponent = torch.frexp(groups.amax(1, keepdim=True)).exponent
    return torch.ldexp(groups, -exponent).view(-1)[: weights.numel()].contiguous()


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


def traced(x: Tensor) -> bool:
    """Whether a call has to be an operator that others can see, instead of a launch."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def _name(fmt: Format) -> str:
    """The name by which an operator finds the format again."""
    if not torch.compiler.is_compiling() and get_format(fmt.name) != fmt:
        raise ValueError(f"{fmt.name!r} names another format in the registry; register yours under a name of its own")
    return fmt.name


def _bits(part: Tensor) -> Tensor:
    """8-bit floats pass through operators as bytes: torch can do little more with them than cast."""
    return part.view(torch.uint8) if part.dtype.itemsize == 1 and part.dtype.is_floating_point else part


def _typed(values: Sequence[Tensor | None], fmt: Format, shape: Shape) -> Parts:
    """Parts by name, in their own dtypes again."""
    storage = fmt.storage(shape).items()
    return {name: v.view(dtype) for (name, (_, dtype)), v in zip(storage, values, strict=True) if v is not None}


def _only_launch(x: Tensor, fmt: Format, mode: str) -> plans.Single | None:
    """What to do for an eager call on the current GPU that is a single launch with nothing to check first."""
    if traced(x) or not x.is_cuda or x.is_neg() or not _triton_installed():
        return None
    if x.get_device() != torch._C._cuda_getDevice():
        return None
    return plans.single(x.shape, x.stride(), x.dtype, fmt, mode, x.device)


ROUNDINGS = ("nearest", "stochastic")


def _draw(generator: torch.Generator | None = None) -> Tensor:
    """A seed: one int64 >= 0 on the CPU. Only a generator of another device has to be waited for."""
    device = "cpu" if generator is None else generator.device
    return torch.randint((1 << 63) - 1, (), generator=generator, dtype=torch.int64, device=device).cpu()


def _seed(rounding: str, generator: torch.Generator | None, x: Tensor) -> Tensor | None:
    """The seed of a call, drawn from `generator` or torch's own for the CPU; None for rounding to nearest."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"unknown rounding {rounding!r}; there is {', '.join(map(repr, ROUNDINGS))}")
    if rounding == "nearest":
        return None
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator has to be a torch.Generator, got {type(generator).__name__}")
    if generator is None and traced(x):
        return torch.ops.tritonq.seed(torch.empty(0))
    return _draw(generator)


def _value(seed: Tensor | None) -> int | None:
    return None if seed is None else int(seed)


def quantize(
    x: Tensor,
    fmt: Format | str,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
    search: str | bool | None = None,
    importance: Tensor | None = None,
    v: Tensor | None = None,
    min_scale: Tensor | None = None,
    max_scale: Tensor | None = None,
    out: Parts | None = None,
    swizzled: bool = False,
) -> Parts:
    """Parts of x by name, as `fmt.storage(x.shape)` describes them; `out` receives them where it is given.

    Args:
        x: floating tensor of >= 1 dimension, any strides, any size.
        scale, zero_point, tensor_scale: precomputed parts, used verbatim.
        rounding: "nearest", or "stochastic", see `tritonq.quantize`.
        generator: where stochastic rounding draws its seed.
        search: "mse" takes the scale (and zero point) of each group with the smallest squared error (of rounding to
            nearest), see `tritonq.codecs.search`; None or False the format's rule.
        importance: weights [K] >= 0 of the columns in that error; the result does not depend on their unit.
        v, min_scale, max_scale: tuning parameters as `tritonq.qdq` takes them: the parts dequantize to what that gives,
            bit for bit.
        swizzled: write the scales as `swizzle` orders them, for the matrix multiplications of Blackwell; formats with
            one byte a scale and groups of one row, x of >= 2 dimensions, without `scale` or `out`.

    Raises:
        ValueError: unknown format or rounding, or parts of another shape. TypeError: x is not floating.
    """
    fmt = get_format(fmt)
    if v is not None or min_scale is not None or max_scale is not None:
        from tritonq import learned_ops

        if search or importance is not None or rounding != "nearest" or swizzled:
            raise ValueError(
                "v, min_scale and max_scale take rounding to nearest, no search, and scales in their order"
            )
        given = learned_ops.check(x, fmt, v, min_scale, max_scale, scale, zero_point, tensor_scale)
        return learned_ops.quantized(x, fmt, given, out)
    if swizzled:
        if not (scale is None and zero_point is None and out is None):
            raise ValueError("swizzled orders scales as they are computed; swizzle those that are given, and leave out")
        return _quantize_in_tiles(x, fmt, tensor_scale, rounding, generator, search, importance)
    if (
        out is None
        and rounding == "nearest"
        and not search
        and importance is None
        and scale is None
        and zero_point is None
        and tensor_scale is None
    ):
        single = _only_launch(x, fmt, "quantize")
        if single is not None:
            parts = {name: empty_on_gpu(*storage) for name, storage in single.outputs}
            chosen = parts["scale"]
            single.launch.five(x, parts["qdata"], chosen, parts.get("zero_point", chosen), x)
            return parts
    check_input(x, fmt)
    searched = check_search(search, importance, x, fmt, scale is not None)
    seed = _seed(rounding, generator, x)
    if traced(x):
        scale = None if scale is None else _bits(scale)
        values = torch.ops.tritonq.quantize(
            x.detach(), _name(fmt), scale, zero_point, tensor_scale, searched, importance, seed
        )
        made = _typed(values, fmt, tuple(x.shape))
        return made if out is None else {name: part.copy_(made[name]) for name, part in out.items()}
    return _quantize(
        x, fmt, scale, zero_point, tensor_scale, search=searched, importance=importance, seed=_value(seed), out=out
    )


@torch.no_grad()
def _quantize(
    x: Tensor,
    fmt: Format,
    scale: Tensor | None,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    *,
    search: bool = False,
    importance: Tensor | None = None,
    seed: int | None = None,
    out: Parts | None = None,
) -> Parts:
    x = x.resolve_neg()  # kernels read memory as it is
    parts = allocate(fmt, tuple(x.shape), x.device) if out is None else _checked_out(out, fmt, x)
    if x.device.type == "meta":
        return parts
    weights = _weights(importance, fmt)  # refused before anything is written
    given = _fill_given(parts, x, fmt, scale, zero_point, tensor_scale)
    _run(x, fmt, parts, given, tensor_scale is not None, None, search=search, weights=weights, seed=seed)
    return parts


def searched_scales(
    x: Tensor,
    fmt: Format,
    *,
    tensor_scale: Tensor | None = None,
    search: str | bool | None = "mse",
    importance: Tensor | None = None,
) -> Parts:
    """The parts that `quantize` with a search gives, but the codes."""
    check_input(x, fmt)
    if traced(x) or fmt.super_group or x.numel() == 0 or x.is_meta:
        parts = quantize(x, fmt, tensor_scale=tensor_scale, search=search, importance=importance)
        return {name: part for name, part in parts.items() if name != "qdata"}
    check_search(search, importance, x, fmt, False)
    return _searched_scales(x, fmt, tensor_scale, importance)


@torch.no_grad()
def _searched_scales(x: Tensor, fmt: Format, tensor_scale: Tensor | None, importance: Tensor | None) -> Parts:
    x, weights = x.resolve_neg(), _weights(importance, fmt)
    parts = _allocate_scales(fmt, x, _SCALES)
    if tensor_scale is None and fmt.tensor_scale:
        tensor_scale = _tensor_scale(x, fmt)
    _fill_given(parts, x, fmt, None, None, tensor_scale)
    _choose_scales(x, fmt, parts, True, weights)
    return parts


def _quantize_in_tiles(
    x: Tensor,
    fmt: Format,
    tensor_scale: Tensor | None,
    rounding: str,
    generator: torch.Generator | None,
    search: str | bool | None,
    importance: Tensor | None,
) -> Parts:
    """`quantize` with swizzled scales."""
    check_input(x, fmt)
    scale_tiles.check_format(fmt)
    scale_tiles.swizzled_shape(fmt.scale_shape(tuple(x.shape)))  # raises where x has no rows
    if search or importance is not None:
        parts = quantize(
            x, fmt, tensor_scale=tensor_scale, rounding=rounding, generator=generator, search=search,
            importance=importance,
        )  # fmt: skip
        return {**parts, "scale": scale_tiles.swizzle(parts["scale"])}
    seed = _seed(rounding, generator, x)
    if traced(x):
        values = torch.ops.tritonq.quantize_swizzled(x.detach(), _name(fmt), tensor_scale, seed)
        return _typed(values, fmt, tuple(x.shape))
    return _quantize_swizzled(x, fmt, tensor_scale, seed=_value(seed))


@torch.no_grad()
def _quantize_swizzled(x: Tensor, fmt: Format, tensor_scale: Tensor | None, *, seed: int | None = None) -> Parts:
    if not uses_triton(x) or x.numel() == 0 or not tuning.fits(fmt, x.shape[-1], seed is not None):
        parts = _quantize(x, fmt, None, None, tensor_scale, seed=seed)
        return {**parts, "scale": scale_tiles.swizzle(parts["scale"])}
    x = x.resolve_neg()
    storage = fmt.storage(tuple(x.shape))
    storage["scale"] = (scale_tiles.swizzled_shape(storage["scale"][0]), storage["scale"][1])
    parts = {name: empty(shape, dtype, x.device) for name, (shape, dtype) in storage.items()}
    _fill_given(parts, x, fmt, None, None, tensor_scale)
    with _device_of(x):
        if fmt.tensor_scale and tensor_scale is None:
            plans.tensor_scale(x, fmt, parts["tensor_scale"])
        plans.encode_swizzled(x, fmt, parts, seed)
    return parts


def quantize_both(
    x: Tensor,
    fmt: Format | str,
    *,
    tensor_scale: Tensor | None = None,
    out: tuple[Parts, Parts] | None = None,
) -> tuple[Parts, Parts]:
    """(quantize(x), quantize(x.mT)), bit for bit; on a GPU in one launch that reads x once where that is possible.

    What training in 8 or 4 bits needs: the matrices of forward and backward contract different axes of one tensor, and
    groups run along the axis that is contracted.

    Args:
        x: floating tensor [..., N, K], any strides, any size.
        tensor_scale: precomputed, used verbatim for both.
        out: the parts to fill, those of x and those of x.mT.

    Raises:
        ValueError: unknown format, or fewer than two dimensions. TypeError: x is not floating.
    """
    fmt = get_format(fmt)
    check_both(x, fmt)
    if traced(x):
        values = torch.ops.tritonq.quantize_both(x.detach(), _name(fmt), tensor_scale)
        shapes, count = (tuple(x.shape), tuple(x.mT.shape)), len(values) // 2
        made = (_typed(values[:count], fmt, shapes[0]), _typed(values[count:], fmt, shapes[1]))
        if out is None:
            return made
        for side, parts in zip(out, made, strict=True):
            for name, part in side.items():
                part.copy_(parts[name])
        return out
    return _quantize_both(x, fmt, tensor_scale, out)


def check_both(x: Tensor, fmt: Format) -> None:
    check_input(x, fmt)
    if x.ndim < 2:
        raise ValueError(
            f"rows and columns are quantized of tensors of >= 2 dimensions, got shape {tuple(x.shape)}; reshape it, or "
            "use quantize"
        )


@torch.no_grad()
def _quantize_both(
    x: Tensor, fmt: Format, tensor_scale: Tensor | None, out: tuple[Parts, Parts] | None = None
) -> tuple[Parts, Parts]:
    x = x.resolve_neg()
    if out is None:
        out = (allocate(fmt, tuple(x.shape), x.device), allocate(fmt, tuple(x.mT.shape), x.device))
    else:
        out = (_checked_out(out[0], fmt, x), _checked_out(out[1], fmt, x.mT))
    if x.device.type == "meta":
        return out
    given = tensor_scale is not None
    for side, view in zip(out, (x, x.mT), strict=True):
        _fill_given(side, view, fmt, None, None, tensor_scale)
    if uses_triton(x) and x.numel() and tuning.fits_both(fmt):
        with _device_of(x):
            plans.encode_both(x, fmt, *out, given)
        return out
    # Groups that fit no tile in both directions, or only a padded one: two single quantizations.
    _run(x, fmt, out[0], False, given, None)
    if fmt.tensor_scale:
        out[1]["tensor_scale"].copy_(out[0]["tensor_scale"])
    _run(x.mT, fmt, out[1], False, True, None)
    return out


def qdq(
    x: Tensor,
    fmt: Format | str,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """dequantize(quantize(x)) of x's shape and dtype, contiguous, without codes in memory; arguments as `quantize`.
    `out`, contiguous, receives it where it is given."""
    fmt = get_format(fmt)
    if scale is None and zero_point is None and tensor_scale is None and rounding == "nearest":
        single = _only_launch(x, fmt, "qdq")
        if single is not None:
            y = empty_on_gpu(*single.outputs[0][1]) if out is None else _checked_values(out, x.shape, x.dtype, x.device)
            single.launch.five(x, y, y, y, x)
            return y
    check_input(x, fmt)
    seed = _seed(rounding, generator, x)
    if traced(x):
        scale = None if scale is None else _bits(scale)
        made = torch.ops.tritonq.qdq(x, _name(fmt), scale, zero_point, tensor_scale, seed)
        return made if out is None else out.copy_(made)
    if out is not None:
        _checked_values(out, x.shape, x.dtype, x.device)
    return _qdq(x, fmt, scale, zero_point, tensor_scale, seed=_value(seed), out=out)


def _checked_values(out: Tensor, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    if out.shape != shape or out.dtype is not dtype or out.device != device or not out.is_contiguous():
        raise ValueError(
            f"out has to be a contiguous {dtype} tensor of shape {tuple(shape)} on {device}, got {out.dtype} "
            f"{tuple(out.shape)} with strides {out.stride()} on {out.device}"
        )
    return out


@torch.no_grad()
def _qdq(
    x: Tensor,
    fmt: Format,
    scale: Tensor | None,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    *,
    seed: int | None = None,
    first: int = 0,
    out: Tensor | None = None,
    tile: bool = False,
) -> Tensor:
    x = x.resolve_neg()
    y = empty(x.shape, x.dtype, x.device) if out is None else out
    if x.device.type == "meta":
        return y
    one_pass = tuning.fits(fmt, x.shape[-1], seed is not None)
    inside = scale is None and uses_triton(x) and one_pass  # scales never leave the kernel
    given = _checked_given(x, fmt, scale, zero_point, tensor_scale)
    names = ("tensor_scale",) if inside else tuple(name for name in _SCALES if name not in given)
    scratch = 0 if inside or "scale" in given else _scale_bytes(fmt, tuple(x.shape), names)
    if scratch > max(memory.budget(), _SMALL) and not tile:
        return _qdq_in_tiles(x, fmt, given.get("tensor_scale"), seed, first, y, scratch)
    try:
        parts = {**_allocate_scales(fmt, x, names), **given}
    except torch.OutOfMemoryError:
        if tile or not scratch:
            raise
        return _qdq_in_tiles(x, fmt, given.get("tensor_scale"), seed, first, y, scratch)
    _run(x, fmt, parts, "scale" in given, "tensor_scale" in given, y, seed=seed, first=first)
    return y


_SMALL = 1 << 20  # bytes of scales that any budget allows


def _scale_bytes(fmt: Format, shape: Shape, names: tuple[str, ...]) -> int:
    return sum(math.prod(s) * d.itemsize for name, (s, d) in fmt.storage(shape).items() if name in names)


def _qdq_in_tiles(
    x: Tensor, fmt: Format, tensor_scale: Tensor | None, seed: int | None, first: int, y: Tensor, scratch: int
) -> Tensor:
    """QDQ that leaves its scales in memory for a while, of as many elements as the budget and the device allow."""
    if fmt.tensor_scale and tensor_scale is None:
        tensor_scale = _tensor_scale(x, fmt)

    def step(tile: tiles.Tile) -> None:
        piece, target = tile.of_strided(x), tile.of_values(y)
        _qdq(piece, fmt, None, None, tensor_scale, seed=seed, first=first + tile.first, out=target, tile=True)

    limit = x.numel() * max(memory.budget(), _SMALL) // (2 * scratch)
    tiles.in_tiles(tiles.Tiles(tuple(x.shape), x.stride(), fmt), limit, x.device, step)
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
    if traced(x) or traced(dy):
        scale = None if scale is None else _bits(scale)
        return torch.ops.tritonq.qdq_backward(x, dy, _name(fmt), scale, zero_point, tensor_scale)
    return _qdq_backward(x, dy, fmt, scale, zero_point, tensor_scale)


_DX = Wanted(x=True)  # and no parameter's gradient


@torch.no_grad()
def _qdq_backward(
    x: Tensor,
    dy: Tensor,
    fmt: Format,
    scale: Tensor | None,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
) -> Tensor:
    x, dy = x.resolve_neg(), dy.resolve_neg()
    dx = empty(x.shape, dy.dtype, x.device)
    if x.device.type == "meta" or x.numel() == 0:
        return dx
    if fmt.tensor_scale and tensor_scale is None:
        tensor_scale = _tensor_scale(x, fmt)
    if uses_triton(x):
        given = _checked_given(x, fmt, scale, zero_point, tensor_scale)
        high = _bits(given["scale"]) if "scale" in given else None
        own = Learned(None, high, given.get("zero_point"), scale is not None, given.get("tensor_scale"))
        with _device_of(x):
            learned_plans.run(x, fmt, own, learned_plans.kind("backward", own, _DX), {"dx": dx}, dy, None)
        return dx
    parts = _allocate_scales(fmt, x, _SCALES)
    if not _fill_given(parts, x, fmt, scale, zero_point, tensor_scale):
        _choose_scales(x, fmt, parts)
    tiling.clip_gradient(x, dy.contiguous(), fmt, parts, dx)
    return dx


def dequantize(
    parts: Parts, fmt: Format | str, shape: Shape, dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """Values of `shape` and `dtype` (rounded once, from fp32; saturating) from contiguous parts, in `out` (contiguous)
    where it is given."""
    fmt = get_format(fmt)
    qdata = parts["qdata"]
    if dtype not in FLOATS:
        raise TypeError(f"dequantize gives bfloat16, float16, float32 or float64, got {dtype}")
    if traced(qdata):
        given = [parts.get(name) for name in ("zero_point", "tensor_scale")]
        supers = {name: parts[name] for name in SUPER_PARTS if name in parts}
        made = torch.ops.tritonq.dequantize(
            _bits(qdata), _bits(parts["scale"]), *given, _name(fmt), shape, dtype, **supers
        )
        return made if out is None else out.copy_(made)
    if out is not None:
        _checked_values(out, shape, dtype, qdata.device)
    if qdata.is_cuda and _triton_installed() and qdata.get_device() == torch._C._cuda_getDevice():
        shape = tuple(shape)
        single = plans.single_decode(shape, dtype, fmt, qdata.data_ptr() % 4 == 0, qdata.device)
        if single is not None and all(map(Tensor.is_contiguous, parts.values())):
            y = empty_on_gpu(*single.outputs[0][1]) if out is None else out
            scale = parts["scale"]
            single.launch.five(qdata, scale, parts.get("zero_point", scale), parts.get("tensor_scale", y), y)
            return y
    return _dequantize(parts, fmt, shape, dtype, out)


def dequantize_buffer(buf: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """`dequantize` of parts that lie in one buffer. Where that is a single launch it takes addresses: a view of each
    part would cost more host time than the rest."""
    if not traced(buf) and buf.is_cuda and _triton_installed() and buf.get_device() == torch._C._cuda_getDevice():
        offsets, start = layout.offsets, buf.data_ptr()
        if offsets is not None and start % 16 == 0 and dtype in FLOATS:
            single = plans.single_decode(layout.shape, dtype, layout.format, True, buf.device)
            launch = None if single is None else single.launch.ready(buf)
            if single is not None and launch is not None:
                y = empty_on_gpu(*single.outputs[0][1])
                values, scale = y.data_ptr(), start + offsets["scale"]
                zero = start + offsets["zero_point"] if "zero_point" in offsets else scale
                divisor = start + offsets["tensor_scale"] if "tensor_scale" in offsets else values
                launch(start + offsets["qdata"], scale, zero, divisor, values)
                return y
    parts = {name: part.contiguous() for name, part in layout.parts(buf).items()}
    return dequantize(parts, layout.format, layout.shape, dtype)


@torch.no_grad()
def _dequantize(parts: Parts, fmt: Format, shape: Shape, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    parts = {name: part.contiguous() for name, part in parts.items()}
    y = empty(shape, dtype, parts["qdata"].device) if out is None else out
    if y.numel() and y.device.type != "meta":
        if uses_triton(y):
            with _device_of(y):
                plans.decode(parts, fmt, y)
        else:
            tiling.decode(fmt, parts, y)
    return y


def tensor_scale(x: Tensor, fmt: Format | str) -> Tensor:
    """The tensor-wide divisor that `fmt` (one with tensor_scale) gives x, fp32 [1]: scale.max * element.max / amax."""
    fmt = get_format(fmt)
    check_input(x, fmt)
    if not fmt.tensor_scale:
        raise ValueError(f"{fmt.name} has no tensor_scale")
    if traced(x):
        return torch.ops.tritonq.tensor_scale(x.detach(), _name(fmt))
    return _tensor_scale(x, fmt)


@torch.no_grad()
def _tensor_scale(x: Tensor, fmt: Format) -> Tensor:
    x = x.resolve_neg()
    if uses_triton(x) and x.numel():
        out = torch.empty(1, dtype=torch.float32, device=x.device)
        with _device_of(x):
            plans.tensor_scale(x, fmt, out)
        return out
    return tiling.tensor_scale(x, fmt)


def hadamard(
    x: Tensor, *, seed: int | None = None, signs: Sequence[int] | Tensor | None = None, inverse: bool = False
) -> Tensor:
    """The random Hadamard transform of blocks of 16 along the last axis; see `tritonq.hadamard`."""
    return torch.ops.tritonq.hadamard(x, check_hadamard(x, seed, signs), inverse)


def check_hadamard(x: Tensor, seed: int | None, signs: Sequence[int] | Tensor | None) -> int:
    """The signs as bits; raises where x cannot be rotated."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"hadamard rotates bfloat16, float16, float32 and float64 tensors, got {x.dtype}; cast it first"
        )
    rotation.check_shape(tuple(x.shape))
    return rotation.sign_bits(seed, signs)


def _hadamard(x: Tensor, signs: int, inverse: bool, out: Tensor | None = None) -> Tensor:
    x = x.resolve_neg()
    y = empty(x.shape, x.dtype, x.device) if out is None else out
    if x.numel():
        if uses_triton(x):
            with _device_of(x):
                plans.hadamard(x, signs, inverse, y)
        else:
            own = tiles.Tiles(tuple(x.shape), x.stride(), plans._BLOCKS)
            while (tile := own.take(rotation.STEP)) is not None:
                rotation.hadamard(tile.of_strided(x), signs, inverse, tile.of_values(y))
    return y


def cast(x: Tensor, ebits: int, mbits: int, special: str, signed: bool, *, in_place: bool = False) -> Tensor:
    """x rounded to numbers of `minifloat(ebits, mbits, special, signed)`, of at most 8 bits, in x's dtype;
    `tritonq.ste.cast` says how. Strides are those that torch's elementwise functions give; in place, x is returned."""
    if traced(x):
        y: Tensor = torch.ops.tritonq.cast(x, ebits, mbits, special, signed)
        return x.copy_(y) if in_place else y
    return _cast(x, minifloat(ebits, mbits, special, signed), in_place)


@torch.no_grad()
def _cast(x: Tensor, element: ElementType, in_place: bool = False) -> Tensor:
    if in_place:
        if torch._debug_has_internal_overlap(x) == 1:
            raise RuntimeError(
                f"elements of x, of shape {tuple(x.shape)} and strides {x.stride()}, share memory; clone it first"
            )
        torch.autograd.graph.increment_version(x)
        if x.is_neg():
            return x.copy_(_cast(x.resolve_neg(), element))
    y = x if in_place else torch.empty_like(x)
    if x.numel() and x.device.type != "meta":
        source, target = x.resolve_neg(), y
        if not y.is_contiguous():
            order = sorted(range(y.ndim), key=y.stride, reverse=True)  # in which the elements of y lie in memory
            source, target = source.permute(order), y.permute(order)
        if uses_triton(x):
            with _device_of(x):
                plans.cast(source if x.ndim else source.view(1), element, target if x.ndim else target.view(1))
        else:
            tiling.cast(source, target, element)
    return y


def _run(
    x: Tensor,
    fmt: Format,
    parts: Parts,
    given: bool,
    given_tensor_scale: bool,
    y: Tensor | None,
    *,
    search: bool = False,
    weights: Tensor | None = None,
    seed: int | None = None,
    first: int = 0,
) -> None:
    """Codes, or values of `y`; parts["scale"] and what goes with it are there if `given`. `weights`: see `_weights`."""
    triton = uses_triton(x) and x.numel() > 0
    with _device_of(x):
        over_all = fmt.tensor_scale or fmt.group[0] == -1
        at_once = triton and over_all and not (given or given_tensor_scale or search or first)
        if at_once and plans.encode_at_once(x, fmt, parts, y, seed, functools.partial(meeting.slots, x.device)):
            return
        if fmt.tensor_scale and not given_tensor_scale:
            if triton:
                plans.tensor_scale(x, fmt, parts["tensor_scale"])
            else:
                parts["tensor_scale"].copy_(tiling.tensor_scale(x, fmt))
        if x.numel() == 0:
            if not given and "scale" in parts:
                _empty_scales(x, fmt, parts)
            return
        if search:
            _choose_scales(x, fmt, parts, True, weights)
        encode = plans.encode if triton else tiling.encode
        encode(x, fmt, parts, given or search, y, seed=seed, first=first)


def _choose_scales(x: Tensor, fmt: Format, parts: Parts, search: bool = False, weights: Tensor | None = None) -> None:
    """Scales (and zero points) alone, by the rule or by a search; the tensor scale is there."""
    triton = uses_triton(x)
    with _device_of(x):
        (plans.scales if triton else tiling.choose)(x, fmt, parts)
        if search:
            (plans.best_scales if triton else tiling.search)(x, fmt, parts, weights)


def _empty_scales(x: Tensor, fmt: Format, parts: Parts) -> None:
    """Scales of groups without elements are those of zeros."""
    if parts["scale"].numel() == 0:
        return
    from tritonq.codecs import scale as scales

    zero = torch.zeros(parts["scale"].shape, device=x.device)
    chosen, zero_point = scales.choose(zero, zero, fmt, parts.get("tensor_scale"))
    parts["scale"].copy_(chosen)
    if zero_point is not None:
        parts["zero_point"].copy_(zero_point)


def _device_of(x: Tensor) -> Any:
    if x.is_cuda and x.get_device() != torch._C._cuda_getDevice():
        return torch.cuda.device(x.device)
    return _NO_CONTEXT


_NO_CONTEXT = contextlib.nullcontext()
