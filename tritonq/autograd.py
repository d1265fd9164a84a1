"""Gradients: the straight-through estimator of QDQ, and a linear layer that keeps its weight quantized for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tritonq import operators, ops
from tritonq.formats import Format, Shape, get_format
from tritonq.reference import Parts


class _Unclipped(torch.autograd.Function):
    """dy where QDQ did not clip x, 0 elsewhere; linear in dy, and taken to be constant in x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dy: Tensor, fmt: Format, names: tuple[str, ...], *given: Tensor) -> Tensor:
        return ops.qdq_backward(x, dy, fmt, **dict(zip(names, given, strict=True)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.fmt, ctx.names, *given = inputs
        ctx.save_for_backward(x, *given)
        ctx.save_for_forward(x, *given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *given = ctx.saved_tensors
        return None, _Unclipped.apply(x, grads[0], ctx.fmt, ctx.names, *given), None, None, *[None for _ in given]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, *given = ctx.saved_tensors
        found: Tensor = _Unclipped.apply(x, tangents[1], ctx.fmt, ctx.names, *given)
        return found


class _QDQ(torch.autograd.Function):
    """Forward dequantize(quantize(x)); backward the identity where x was not clipped, 0 where it was."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, fmt: Format, rounding: dict[str, Any], names: tuple[str, ...], *given: Tensor) -> Tensor:
        parts: dict[str, Any] = dict(zip(names, given, strict=True))
        return ops.qdq(x, fmt, **parts, **rounding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.fmt, _, ctx.names, *given = inputs
        ctx.count = len(given)
        kept = (x, *given) if ctx.fmt.saturates else ()
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def _through(ctx: Any, dy: Tensor) -> Tensor:
        if not ctx.fmt.saturates:
            return dy
        x, *given = ctx.saved_tensors
        found: Tensor = _Unclipped.apply(x, dy, ctx.fmt, ctx.names, *given)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _QDQ._through(ctx, grads[0]), *[None for _ in range(3 + ctx.count)]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _QDQ._through(ctx, tangents[0]).clone()  # a tangent of its own


def _differentiates(x: Tensor) -> bool:
    """Whether an eager call has to leave a trace for a gradient, of either mode."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return False  # the operator has a gradient, too
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and x.requires_grad and not ops.traced(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, fmt, *given, _ = inputs  # the last is the seed
    ctx.fmt = get_format(fmt)
    ctx.save_for_backward(*((x, *given) if ctx.fmt.saturates else ()))


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.fmt.saturates:
        return dy, None, None, None, None, None
    x, *given = ctx.saved_tensors
    return torch.ops.tritonq.qdq_backward(x, dy, ctx.fmt.name, *given), None, None, None, None, None


torch.library.register_autograd("tritonq::qdq", _backward, setup_context=_setup_context, lib=operators.library)


def _setup_hadamard(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.signs, ctx.inverse = inputs


def _hadamard_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.tritonq.hadamard(dy, ctx.signs, not ctx.inverse), None, None


# The transform is orthogonal: its transpose is its inverse.
torch.library.register_autograd(
    "tritonq::hadamard", _hadamard_backward, setup_context=_setup_hadamard, lib=operators.library
)


def _present(
    x: Tensor, fmt: Format, given: dict[str, Tensor | None], search: str | bool | None, importance: Tensor | None
) -> dict[str, Tensor]:
    """The parts that are given, with those that a search finds."""
    if search or importance is not None:
        found = ops.quantize(x, fmt, **given, search=search, importance=importance)  # type: ignore[arg-type]
        return {name: part for name, part in found.items() if name != "qdata"}
    return {name: part for name, part in given.items() if part is not None}


def qdq(
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
) -> Tensor:
    """dequantize(quantize(x, fmt)) in one pass, differentiable straight through.

    Args:
        x: floating tensor [..., K], any strides.
        fmt: a Format or its name.
        scale, zero_point, tensor_scale: used verbatim instead of being computed; shapes as in `Format.storage`. A
            computed scale carries NaN where its group is not finite; a given one cannot, so then NaN and infinity stay
            only where the element type has a NaN, and else become 0 and the largest number.
        rounding, generator: as in `tritonq.quantize`; the gradient does not depend on them.
        search, importance: as in `tritonq.quantize`; the gradient takes the scales that were found as given.

    Returns:
        Contiguous tensor of x's shape and dtype. Its gradient is passed on where |x / scale| is within the element's
        range before rounding, and is 0 elsewhere.

    Raises:
        ValueError: unknown format or rounding, or a shape it cannot group. TypeError: x is not floating.
    """
    fmt = get_format(fmt)
    given = {"scale": scale, "zero_point": zero_point, "tensor_scale": tensor_scale}
    present = _present(x, fmt, given, search, importance)
    if _differentiates(x):
        how = {"rounding": rounding, "generator": generator}
        y: Tensor = _QDQ.apply(x, fmt, how, tuple(present), *present.values())
        return y
    return ops.qdq(x, fmt, **present, rounding=rounding, generator=generator)


class _Linear(torch.autograd.Function):
    """x @ dequantize(weight).T + bias; backward dequantizes again instead of keeping the dense weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, fmt: Format, shape: Shape, names: tuple[str, ...], *parts: Tensor
    ) -> Tensor:
        ctx.fmt, ctx.shape, ctx.names = fmt, shape, names
        ctx.save_for_backward(*parts)
        weight = ops.dequantize(dict(zip(names, parts, strict=True)), fmt, shape, x.dtype)
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (dy,) = grads
        weight = ops.dequantize(dict(zip(ctx.names, ctx.saved_tensors, strict=True)), ctx.fmt, ctx.shape, dy.dtype)
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return (dy @ weight, dbias, None, None, None, *[None for _ in ctx.saved_tensors])


def linear(x: Tensor, parts: Parts, fmt: Format, shape: Shape, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times a quantized weight [N, K] transposed, plus bias [N]; computed in x's dtype."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if bias is None else bias.to(x.dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Linear.apply(x, bias, fmt, shape, tuple(parts), *parts.values())
    return torch.nn.functional.linear(x, ops.dequantize(parts, fmt, shape, x.dtype), bias)


class _QDQLinear(torch.autograd.Function):
    """x @ qdq(weight).T + bias; backward rounds the weight again instead of keeping its rounded copy."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fmt: Format, names: tuple[str, ...], *given: Tensor
    ) -> Tensor:
        ctx.fmt, ctx.names = fmt, names
        ctx.save_for_backward(x, weight, *given)
        values = ops.qdq(weight, fmt, **dict(zip(names, given, strict=True)))  # type: ignore[arg-type]
        return torch.nn.functional.linear(x, values.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (dy,), (x, weight, *given) = grads, ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            values = qdq(weight, ctx.fmt, **dict(zip(ctx.names, given, strict=True)))
            dx = dy @ values.to(dy.dtype)
        if ctx.needs_input_grad[1]:
            dweight = (dy.reshape(-1, dy.shape[-1]).mT @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
            if ctx.fmt.saturates:
                dweight = _Unclipped.apply(weight, dweight, ctx.fmt, ctx.names, *given)
        if ctx.needs_input_grad[2]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
        return (dx, dweight, dbias, None, None, *[None for _ in given])


def qdq_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    fmt: Format,
    *,
    tensor_scale: Tensor | None = None,
    search: str | bool | None = None,
) -> Tensor:
    """x [..., K] times qdq(weight) [N, K] transposed, plus bias [N]; for an eager backward without a rounded copy of
    the weight in memory. Gradients, straight through, reach all three."""
    given = {"scale": None, "zero_point": None, "tensor_scale": tensor_scale}
    seen = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not seen or ops.traced(x) or ops.traced(weight) or forward_ad._current_level >= 0:
        values = qdq(weight, fmt, tensor_scale=tensor_scale, search=search)
        return torch.nn.functional.linear(x, values, bias)
    if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if bias is None else bias.to(x.dtype)
    elif x.dtype is not weight.dtype:
        raise TypeError(f"x is {x.dtype} and the weight {weight.dtype}; cast one of them, or use torch.autocast")
    present = _present(weight, fmt, given, search, None)
    y: Tensor = _QDQLinear.apply(x, weight, bias, fmt, tuple(present), *present.values())
    return y
