"""Gradients: the straight-through estimator of QDQ, and a linear layer that keeps its weight quantized for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tritonq import operators, ops, scheduler
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
    device: scheduler.Devices | None = None,
    output_device: torch.device | str | None = None,
    out: Tensor | None = None,
    progress: scheduler.Progress | bool | None = None,
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
        device, output_device, progress: as in `tritonq.quantize`: a tensor that lies elsewhere passes through the
            device in tiles. There is no gradient then, nor with `out`.
        out: contiguous tensor of x's shape and dtype that receives the result where it lies.

    Returns:
        Contiguous tensor of x's shape and dtype. Its gradient is passed on where |x / scale| is within the element's
        range before rounding, and is 0 elsewhere.

    Raises:
        ValueError: unknown format or rounding, a shape it cannot group, or a gradient that is asked for together with
            `out` or another device. TypeError: x is not floating.
    """
    fmt = get_format(fmt)
    given = {"scale": scale, "zero_point": zero_point, "tensor_scale": tensor_scale}
    if device is not None or output_device is not None or out is not None:
        options = {**given, "rounding": rounding, "generator": generator, "search": search, "importance": importance}
        return _qdq_elsewhere(scheduler.source(x), fmt, device, output_device, out, progress, options)
    if search or importance is not None:
        ops.check_search(search, importance, x, scale is not None)
        if not (_differentiates(x) or ops.traced(x) or x.is_meta):  # scales of a tile at a time
            out = scheduler.result(None, tuple(x.shape), x.dtype, x.device)
            return scheduler.qdq(
                x, fmt, x.device, out, scale=scale, zero_point=zero_point, tensor_scale=tensor_scale, rounding=rounding,
                generator=generator, search=search, importance=importance,
            )  # fmt: skip
        given = {**ops.searched_scales(x, fmt, tensor_scale=tensor_scale, search=search, importance=importance)}
    present = {name: value for name, value in given.items() if value is not None}
    if _differentiates(x):
        how = {"rounding": rounding, "generator": generator}
        y: Tensor = _QDQ.apply(x, fmt, how, tuple(present), *present.values())
        return y
    return ops.qdq(x, fmt, **present, rounding=rounding, generator=generator)


def hadamard(
    x: Tensor,
    *,
    seed: int | None = None,
    signs: Sequence[int] | Tensor | None = None,
    inverse: bool = False,
    device: scheduler.Devices | None = None,
    output_device: torch.device | str | None = None,
    out: Tensor | None = None,
    progress: scheduler.Progress | bool | None = None,
) -> Tensor:
    """y = H (s * x) / 4 along the last axis in blocks of 16, or with `inverse` x = s * (H y) / 4, which undoes it.

    H is the 16 x 16 Sylvester matrix of +1 and -1. Computed in fp32 and rounded once, to the same bits on every device.
    Rotating both operands of a matrix product along the axis it contracts leaves the product as it was, and spreads
    outliers over their block before a cast to few bits. Differentiable: the gradient is rotated back.

    Args:
        x: floating tensor [..., K], K a multiple of 16, any strides.
        seed: 0 .. 2^64 - 1; sign i is -1 where bit i of SplitMix64's first output is set (`rotation.seed_bits`).
        signs: the 16 signs themselves, 1 or -1. Without seed and signs all are 1.
        inverse: rotate back.
        device, output_device, progress: as in `tritonq.quantize`: a tensor that lies elsewhere passes through the
            device in tiles. There is no gradient then, nor with `out`.
        out: contiguous tensor of x's shape and dtype that receives the result where it lies.

    Returns:
        Contiguous tensor of x's shape and dtype. A block with a non-finite element, or one whose sums leave fp32, has
        non-finite elements.

    Raises:
        ValueError: K is not a multiple of 16, seed and signs together, signs that are not, or a gradient that is asked
            for together with `out` or another device. TypeError: x is not floating.
    """
    if device is None and output_device is None and out is None:
        return ops.hadamard(x, seed=seed, signs=signs, inverse=inverse)
    x = scheduler.source(x)
    if _differentiates(x):
        raise ValueError("hadamard has no gradient with out, device or output_device; detach x, or move it first")
    bits = ops.check_hadamard(x, seed, signs)
    where = scheduler.placed(x, device, output_device, out)
    y = scheduler.result(out, tuple(x.shape), x.dtype, x.device if where is None else where[1])
    if where is None:
        return ops._hadamard(x.detach(), bits, inverse, y)
    return scheduler.hadamard(x.detach(), bits, inverse, where[0], y, progress)


def _qdq_elsewhere(
    x: Tensor,
    fmt: Format,
    device: scheduler.Devices | None,
    output_device: torch.device | str | None,
    out: Tensor | None,
    progress: scheduler.Progress | bool | None,
    options: dict[str, Any],
) -> Tensor:
    """QDQ into `out`, or of a tensor that is not where it is computed or where the result belongs."""
    if ops.traced(x):  # a graph holds whole tensors
        y = qdq(x if device is None else x.to(device), fmt, **options)  # type: ignore[arg-type]
        y = y if output_device is None else y.to(output_device)
        return y if out is None else out.copy_(y)
    if _differentiates(x):
        raise ValueError("qdq has no gradient with out, device or output_device; detach x, or move it first")
    ops.check_input(x, fmt)
    where = scheduler.placed(x, device, output_device, out)
    if where is not None:
        y = scheduler.result(out, tuple(x.shape), x.dtype, where[1])
        return scheduler.qdq(x, fmt, where[0], y, **options, progress=progress)
    if out is None:
        return qdq(x, fmt, **options)
    search, importance = options.pop("search"), options.pop("importance")
    if search or importance is not None:
        return out.copy_(qdq(x, fmt, search=search, importance=importance, **options))
    return ops.qdq(x, fmt, out=out, **options)


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
