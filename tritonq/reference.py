"""Quantize, dequantize and QDQ in plain torch: the oracle of the tests and, tile by tile, the CPU path.

Everything is computed in fp32 with IEEE division, on groups: views of the tensor that put the elements of one scale on
axes of their own, [..., rows of groups, r, columns of groups, c].

Formats with super-groups pass what `super_scale.load` gives in place of stored scales: fp32 factors as `scale` and the
minima of groups, if they have any, as `zero_point`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tritonq.codecs import pack as bits
from tritonq.codecs import philox, super_scale
from tritonq.codecs import scale as scales
from tritonq.codecs.scratch import buffer
from tritonq.formats import ElementType, Format, Shape

Parts = dict[str, Tensor]


def to_float32(x: Tensor) -> Tensor:
    """A contiguous fp32 copy; finite fp64 numbers beyond fp32 saturate instead of becoming infinite."""
    y = buffer("x", x, torch.float32).copy_(x)
    if x.dtype is torch.float64:
        largest = torch.finfo(torch.float32).max
        y = torch.where(torch.isinf(y) & torch.isfinite(x), torch.full_like(y, largest).copysign_(y), y)
    return y


def to_odd(x: Tensor) -> Tensor:
    """A contiguous fp32 copy; fp64 is rounded to odd (towards zero, and the last bit set where that was inexact), after
    which rounding to half of its bits or fewer gives what rounding x gives (Boldo, Melquiond 2008)."""
    y = buffer("x", x, torch.float32).copy_(x)
    if x.dtype is torch.float64:
        back, bits = y.to(torch.float64), y.view(torch.int32)
        bits.sub_((back.abs() > x.abs()).to(torch.int32)).bitwise_or_((back != x).to(torch.int32))
    return y


def cast(x: Tensor, element: ElementType, dtype: torch.dtype) -> Tensor:
    """x rounded to numbers of a minifloat, fp32: half to even, saturating at its range and that of `dtype`; NaN
    stays."""
    values = to_odd(x)
    bad = torch.isnan(values)
    y: Tensor = element.codec.round_ref(values, element.zero_code, element)
    largest = torch.finfo(dtype).max
    if element.max > largest:
        y.clamp_(-largest, largest)
    return y.masked_fill_(bad, torch.nan)


def _padding(shape: Shape, fmt: Format) -> tuple[int, int]:
    rows, cols = fmt.group
    right = -shape[-1] % cols if cols > 0 else 0
    return right, (-shape[-2] % rows if rows > 1 else 0)


def grouped(x: Tensor, fmt: Format) -> Tensor:
    """x as groups: [1, n] (per tensor), [..., 1, K] (a row), [..., K/g, g], or [..., N/r, r, K/c, c]; zeros fill
    short groups."""
    rows, cols = fmt.group
    if rows == -1:
        return x.reshape(1, -1)
    if cols == -1:
        return x.unsqueeze(-2)
    right, bottom = _padding(tuple(x.shape), fmt)
    if right or bottom:
        x = torch.nn.functional.pad(x, (0, right, 0, bottom) if rows > 1 else (0, right))
    x = x.unflatten(-1, (-1, cols)) if x.shape[-1] else x.reshape(*x.shape[:-1], 0, cols)
    return x.unflatten(-3, (-1, rows)) if rows > 1 else x


def ungrouped(groups: Tensor, shape: Shape, fmt: Format) -> Tensor:
    """Inverse of `grouped`."""
    rows, cols = fmt.group
    if rows == -1:
        return groups.reshape(shape)
    if cols == -1:
        return groups.squeeze(-2)
    x = groups.flatten(-2)
    if rows > 1:
        x = x.flatten(-3, -2)[..., : shape[-2], :]
    return x[..., : shape[-1]]


def spread(per_group: Tensor, fmt: Format) -> Tensor:
    """A tensor of the scale's shape, shaped to broadcast against `grouped(x)`."""
    rows = fmt.group[0]
    if rows == -1:
        return per_group.reshape(1, 1)
    per_group = per_group.unsqueeze(-1)
    return per_group.unsqueeze(-3) if rows > 1 else per_group


def group_range(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Largest and smallest element of each group (NaN where one is NaN); rules that only look at |x| get (a, -a). They
    lie in buffers: those of the next tile overwrite them."""
    groups = grouped(x, fmt)
    axes = (-3, -1) if fmt.group[0] > 1 else (-1,)
    if groups.shape[-1] == 0:
        zero = x.new_zeros(fmt.scale_shape(tuple(x.shape)))
        return zero, zero
    if fmt.scale.signed_range:
        return _extreme(torch.amax, "high", groups, axes), _extreme(torch.amin, "low", groups, axes)
    largest = _extreme(torch.amax, "high", torch.abs(groups, out=buffer("work", groups)), axes)
    return largest, torch.neg(largest, out=buffer("low", largest))


def _extreme(reduction: Callable[..., Tensor], name: str, groups: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A reduction of groups along their axes, in the buffer of that name."""
    like = groups[..., 0, :, 0] if len(axes) == 2 else groups[..., 0]
    return reduction(groups, axes, out=buffer(name, like))


def tensor_scale(x: Tensor, fmt: Format) -> Tensor:
    """The tensor-wide divisor over the finite elements of x, fp32 [1]."""
    return scales.choose_tensor_scale(finite_amax(to_float32(x)), fmt)


def finite_amax(x: Tensor) -> Tensor:
    """Largest finite magnitude of an fp32 tensor, a scalar tensor."""
    if x.numel() == 0:
        return x.new_zeros(())
    x = torch.abs(x, out=buffer("work", x))
    amax = x.amax()
    return amax if bool(torch.isfinite(amax)) else x.masked_fill_(~torch.isfinite(x), 0.0).amax()


def _largest(factor: Tensor) -> float:
    """Largest magnitude, or NaN."""
    return float(factor.abs().amax()) if factor.numel() else 0.0


def _divided(
    x: Tensor, factor: Tensor, minimum: Tensor | None, top: float, fmt: Format, given: bool
) -> tuple[Tensor, Tensor | None]:
    """(x + minimum) / scale by group (overwrites x), and where the result has to be NaN although its scale is not.

    `top` is the largest scale. A scale that was computed from x is NaN where x is not finite, so x itself is looked at
    only if scales were given.
    """
    finite = math.isfinite(top)
    if given and finite and x.numel():
        finite = bool((factor != 0).all())
    if given and finite and x.numel():
        finite = bool(torch.isfinite(x.amax())) and bool(torch.isfinite(x.amin()))
    groups = grouped(x, fmt)
    if minimum is not None:
        groups = groups.add_(minimum)
    if finite:
        return groups.div_(factor), None
    lost = ~torch.isfinite(groups) & ~torch.isnan(factor) if fmt.element.nan_code >= 0 else None
    groups = groups / factor
    return groups.masked_fill_(torch.isnan(groups), 0.0), lost


def _zero(zero_point: Tensor | None, fmt: Format) -> tuple[Tensor | int, Tensor | None]:
    """(code of 0, minimum to subtract or None) by group."""
    if zero_point is None or fmt.minimum:
        return fmt.zero_code, None if zero_point is None else spread(zero_point, fmt)
    return spread(zero_point.to(torch.float32), fmt), None


def _stochastic(groups: Tensor, u: Tensor | None, zero: Tensor | int, fmt: Format) -> Tensor:
    """Quotients by group rounded stochastically; as they are without random numbers u."""
    if u is None:
        return groups
    rounded: Tensor = fmt.element.codec.stochastic_ref(groups, grouped(u, fmt), zero, fmt.element)
    return rounded


def encode(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, tensor_scale: Tensor | None, fmt: Format, given: bool = True,
    u: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Packed qdata of an fp32 tensor (overwritten); `given` unless the scales were computed from x. With `u`, random
    numbers of x's shape (overwritten), rounding is stochastic."""
    shape = tuple(x.shape)
    zero, minimum = _zero(zero_point, fmt)
    factor = spread(scales.load(scale, fmt, tensor_scale), fmt)
    groups, lost = _divided(x, factor, minimum, _largest(factor), fmt, given)
    groups = _stochastic(groups, u, zero, fmt)
    codes = fmt.element.codec.encode_ref(groups, zero, fmt.element)
    if lost is not None:
        codes = codes.masked_fill_(lost, fmt.element.nan_code)
    codes = ungrouped(codes, shape, fmt)
    if fmt.sign_flip:
        codes = codes ^ fmt.sign_flip
    return bits.pack(codes, fmt.bits).view(fmt.qdtype)


def decode(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    fmt: Format,
    shape: Shape,
    dtype: torch.dtype,
) -> Tensor:
    """fp32 values, within the finite range of `dtype`, of packed qdata of a tensor of `shape`."""
    codes = bits.unpack(qdata.view(torch.uint8), fmt.bits, shape[-1])
    if fmt.sign_flip:
        codes = codes ^ fmt.sign_flip
    zero, minimum = _zero(zero_point, fmt)
    values = fmt.element.codec.decode_ref(grouped(codes, fmt), zero, fmt.element)
    factor = spread(scales.load(scale, fmt, tensor_scale), fmt)
    values = _above(values.mul_(factor), minimum)
    values = _saturate(values, _largest(factor), minimum, fmt, dtype)
    return ungrouped(values, tuple(shape), fmt)


def encode_decode(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    fmt: Format,
    dtype: torch.dtype,
    given: bool = True,
    u: Tensor | None = None,
) -> Tensor:
    """decode(encode(x)) without codes; overwrites x and u."""
    shape = tuple(x.shape)
    zero, minimum = _zero(zero_point, fmt)
    factor = spread(scales.load(scale, fmt, tensor_scale), fmt)
    top = _largest(factor)
    groups, lost = _divided(x, factor, minimum, top, fmt, given)
    groups = _stochastic(groups, u, zero, fmt)
    values = _above(fmt.element.codec.round_ref(groups, zero, fmt.element).mul_(factor), minimum)
    values = _saturate(values, top, minimum, fmt, dtype)
    if lost is not None:
        values.masked_fill_(lost, torch.nan)
    return ungrouped(values, shape, fmt)


def clipped(x: Tensor, scale: Tensor, zero_point: Tensor | None, tensor_scale: Tensor | None, fmt: Format) -> Tensor:
    """Where x / scale lies outside the element's range before rounding; overwrites x."""
    shape = tuple(x.shape)
    zero, minimum = _zero(zero_point, fmt)
    factor = spread(scales.load(scale, fmt, tensor_scale), fmt)
    groups, _ = _divided(x, factor, minimum, _largest(factor), fmt, True)
    return ungrouped(fmt.element.codec.clipped_ref(groups, zero, fmt.element), shape, fmt)


def _above(values: Tensor, minimum: Tensor | None) -> Tensor:
    """Multiples of the scale to numbers: those of groups with a minimum count from it; in place."""
    return values if minimum is None else values.sub_(minimum)


def _saturate(values: Tensor, top: float, minimum: Tensor | None, fmt: Format, dtype: torch.dtype) -> Tensor:
    """fp32 values clamped to the finite range of `dtype`, in place: finite input gives finite output. NaN stays.

    `top` is the largest scale; most are so small that no value can leave the range. Codes of infinity, which tritonq
    does not write, can be in what others wrote.
    """
    limit = torch.finfo(torch.float32 if dtype is torch.float64 else dtype).max
    if minimum is not None:
        top += _largest(minimum)
    if (
        fmt.element.special != "ieee" and 4 * fmt.element.max * top <= limit
    ):  # integers of 2 bits with a zero point reach three times their max
        return values
    return values.clamp_(-limit, limit)


def choose(x: Tensor, fmt: Format, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of an fp32 tensor."""
    hi, lo = group_range(x, fmt)
    scale, zero = scales.choose(hi, lo, fmt, tensor_scale)
    shape = fmt.scale_shape(tuple(x.shape))
    return scale.reshape(shape), None if zero is None else zero.reshape(shape)


def quantize(
    x: Tensor,
    fmt: Format,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    seed: int | None = None,
) -> Parts:
    """Parts of x, as `fmt.storage(x.shape)` names and shapes them; with a seed, rounding is stochastic."""
    x = to_float32(x)
    u = None if seed is None else philox.uniform(seed, 0, 1, x.numel(), x.numel(), x.device).view(x.shape)
    if fmt.super_group:
        chosen = super_scale.choose(*group_range(x, fmt), fmt)
        return {"qdata": encode(x, *super_scale.load(chosen, fmt), None, fmt, given=False, u=u), **chosen}
    if fmt.tensor_scale and tensor_scale is None:
        tensor_scale = scales.choose_tensor_scale(finite_amax(x), fmt)
    if scale is None:
        scale, zero_point = choose(x, fmt, tensor_scale)
    parts = {"qdata": encode(x, scale, zero_point, tensor_scale, fmt, u=u), "scale": scale}
    if fmt.zero_point:
        assert zero_point is not None
        parts["zero_point"] = zero_point
    if fmt.tensor_scale:
        assert tensor_scale is not None
        parts["tensor_scale"] = tensor_scale
    return parts


def dequantize(parts: Parts, fmt: Format, shape: Shape, dtype: torch.dtype) -> Tensor:
    scale, zero_point, tensor_scale = parts["scale"], parts.get("zero_point"), parts.get("tensor_scale")
    if fmt.super_group:
        scale, zero_point = super_scale.load(parts, fmt)
    return decode(parts["qdata"], scale, zero_point, tensor_scale, fmt, shape, dtype).to(dtype)


def qdq(x: Tensor, fmt: Format, *, seed: int | None = None, **given: Tensor | None) -> Tensor:
    parts = quantize(x, fmt, seed=seed, **given)
    return dequantize(parts, fmt, tuple(x.shape), x.dtype)
