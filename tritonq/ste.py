"""Straight-through functions: forward the exact value, backward the identity, whatever the value was.

    y = f(x),  dy/dx = 1        f: round, floor, ceil, clamp, cast

x is a floating tensor of any shape and strides; y has its shape, dtype and layout. Nothing is kept for backward, and a
gradient is never rounded on its way. The identity holds everywhere, outside the bounds of `clamp` and the range of a
`cast` too; `tritonq.qdq` is the function whose gradient stops where it clips. Each function has a twin with an
underscore that works in place.

All of them can be differentiated twice and in forward mode, and under `torch.func` and `torch.compile`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tritonq import ops
from tritonq.codecs import MINIFLOAT
from tritonq.formats import ElementType, float_fields

__all__ = ["cast", "cast_", "ceil", "ceil_", "clamp", "clamp_", "floor", "floor_", "round", "round_"]

# By name: (the value, the same in place).
_VALUES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "round": (torch.round, torch.round_),
    "floor": (torch.floor, torch.floor_),
    "ceil": (torch.ceil, torch.ceil_),
    "clamp": (torch.clamp, torch.clamp_),
    "cast": (ops.cast, functools.partial(ops.cast, in_place=True)),
}


class _Straight(torch.autograd.Function):
    """A value of `_VALUES`, and the identity for every derivative."""

    @staticmethod
    def forward(x: Tensor, name: str, arguments: tuple[Any, ...]) -> Tensor:
        return _VALUES[name][0](x, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        found: Tensor = tangents[0].clone()  # a tangent of its own
        return found

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, name: str, arguments: tuple[Any, ...]
    ) -> tuple[Tensor, int | None]:
        return _Straight.apply(x, name, arguments), in_dims[0]


def _traced(x: Tensor, name: str, arguments: tuple[Any, ...]) -> Tensor:
    """`_Straight` for torch.compile, which takes no Function with a jvp, and without one gives derivatives of 0 under
    torch.func (torch 2.13). What no derivative sees replaces the values of a copy; compiled, the copy is gone."""
    y = x.clone()
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        y.copy_(_VALUES[name][0](x, *arguments))
    return y


class _StraightInPlace(torch.autograd.Function):
    """The identity for a gradient, overwriting x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, arguments: tuple[Any, ...]) -> Tensor:
        ctx.mark_dirty(x)
        return _VALUES[name][1](x, *arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None


def _check(x: Any, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"ste.{name} takes a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in ops.FLOATS:
        raise TypeError(
            f"ste.{name} takes bfloat16, float16, float32 and float64 tensors, got {x.dtype}; cast it first"
        )


def _transformed() -> bool:
    """Whether forward mode or a function transform looks on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _apply(x: Tensor, name: str, *arguments: Any) -> Tensor:
    _check(x, name)
    if torch.compiler.is_compiling():
        return _traced(x, name, arguments)
    if _transformed() or (torch.is_grad_enabled() and x.requires_grad):
        y: Tensor = _Straight.apply(x, name, arguments)
        return y
    return _VALUES[name][0](x, *arguments)


def _apply_(x: Tensor, name: str, *arguments: Any) -> Tensor:
    _check(x, f"{name}_")
    if torch.compiler.is_compiling() or _transformed():
        return x.copy_(_apply(x, name, *arguments))  # torch knows the derivatives of a copy
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _VALUES[name][1](x, *arguments)
    if x.is_leaf or (x._is_view() and x._base is not None and x._base.is_leaf and x._base.requires_grad):
        raise RuntimeError(
            f"ste.{name}_ would overwrite a leaf that requires grad, or a view of one, of shape {tuple(x.shape)}; use "
            f"ste.{name}, or torch.no_grad() to change its values"
        )
    y: Tensor = _StraightInPlace.apply(x, name, arguments)
    return y


def round(x: Tensor) -> Tensor:
    """The nearest integer, half to even. TypeError where x is no floating tensor."""
    return _apply(x, "round")


def round_(x: Tensor) -> Tensor:
    """`round` in place; returns x. RuntimeError for a leaf that requires grad."""
    return _apply_(x, "round")


def floor(x: Tensor) -> Tensor:
    """The largest integer <= x. TypeError where x is no floating tensor."""
    return _apply(x, "floor")


def floor_(x: Tensor) -> Tensor:
    """`floor` in place; returns x. RuntimeError for a leaf that requires grad."""
    return _apply_(x, "floor")


def ceil(x: Tensor) -> Tensor:
    """The smallest integer >= x. TypeError where x is no floating tensor."""
    return _apply(x, "ceil")


def ceil_(x: Tensor) -> Tensor:
    """`ceil` in place; returns x. RuntimeError for a leaf that requires grad."""
    return _apply_(x, "ceil")


def _bounds(low: float | None, high: float | None) -> tuple[float | None, float | None]:
    for name, bound in (("low", low), ("high", high)):
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, (int, float))):
            raise TypeError(f"{name} of ste.clamp is a number or None, got {type(bound).__name__}")
        if bound is not None and math.isnan(bound):
            raise ValueError(f"{name} of ste.clamp is NaN; leave it out, or pass a number")
    if low is None and high is None:
        raise ValueError("ste.clamp takes low, high or both, got neither")
    if low is not None and high is not None and low > high:
        raise ValueError(f"ste.clamp takes low <= high, got {low} and {high}")
    return low, high


def clamp(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """min(max(x, low), high); NaN stays, and None is no bound. The gradient passes outside the bounds, too.

    Raises:
        TypeError: x is no floating tensor, or a bound no number. ValueError: low > high, NaN, or no bound at all.
    """
    return _apply(x, "clamp", *_bounds(low, high))


def clamp_(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """`clamp` in place; returns x. RuntimeError for a leaf that requires grad."""
    return _apply_(x, "clamp", *_bounds(low, high))


Fields = tuple[int, int, str, bool]  # the arguments of `minifloat`, which torch.compile sees through


def _fields_of(element: ElementType) -> Fields | None:
    if element.codec != MINIFLOAT:
        return None
    return element.ebits, element.mbits, element.special, element.signed


def _fields(dtype: torch.dtype | str | ElementType) -> Fields:
    """The float that `cast` rounds to."""
    if not isinstance(dtype, (torch.dtype, str, ElementType)):
        raise TypeError(f"ste.cast takes a torch.dtype, a name or an ElementType, got {type(dtype).__name__}")
    if isinstance(dtype, ElementType):
        found = _fields_of(dtype)
    else:
        found = float_fields(str(dtype).removeprefix("torch.").removeprefix("float8_"))
    if found is None or found[0] + found[1] + found[3] > 8 or found[:3] == (8, 0, ""):  # past fp32
        raise ValueError(
            f"ste.cast rounds to floats of at most 8 bits, which {dtype} is not; pass torch.float8_e4m3fn, "
            "float8_e5m2, float8_e4m3fnuz, float8_e5m2fnuz, 'ue5m3', or another name eXmY such as 'e2m1'"
        )
    return found


def cast(x: Tensor, dtype: torch.dtype | str | ElementType) -> Tensor:
    """x rounded to the nearest number of a float of 8 bits or fewer, ties to the even code, as a tensor of x's dtype.

    Values are those of `tritonq.formats.minifloat`, after OCP MX 1.0 section 5.3. What is too large becomes the largest
    number, infinity as well; NaN stays NaN, also for types without a code for it. Types without a sign turn what is
    negative into 0, and types without -0 (fnuz) turn it into 0. Every dtype of x is rounded once, fp64 too.

    Where the largest number of the type lies beyond that of x's dtype (114688 of UE5M3 for float16), what rounds to it
    or to another number beyond gives the largest finite number of x's dtype, as everywhere in tritonq.

    Args:
        x: floating tensor of any shape and strides.
        dtype: torch.float8_e4m3fn, float8_e5m2, float8_e4m3fnuz, float8_e5m2fnuz; their names, "ue5m3", or any name
            eXmY that formats take, such as "e2m1"; or an ElementType made by `tritonq.minifloat`.

    Returns:
        Tensor of x's shape and dtype: an fp8 tensor would have autograd cast the gradient to fp8.

    Raises:
        TypeError: x is no floating tensor, or dtype none of these. ValueError: dtype is no float of 8 bits or fewer.
    """
    return _apply(x, "cast", *_fields(dtype))


def cast_(x: Tensor, dtype: torch.dtype | str | ElementType) -> Tensor:
    """`cast` in place; returns x. RuntimeError for a leaf that requires grad."""
    return _apply_(x, "cast", *_fields(dtype))
