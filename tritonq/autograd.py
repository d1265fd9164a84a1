"""Gradients: the straight-through estimator of QDQ, and a linear layer that keeps its weight quantized for backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from tritonq import learned_ops, memory, operators, ops, scheduler
from tritonq.formats import Format, get_format
from tritonq.layout import Layout
from tritonq.learned_reference import Learned, Wanted
from tritonq.sign_step import SignStep


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


def _setup_learned(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.fmt, v, high, low, divisor, ctx.given, ctx.factor = inputs
    ctx.save_for_backward(x, v, high, low, divisor)


def _learned_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, v, high, low, divisor = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], *needs[2:5]]
    found = iter(
        torch.ops.tritonq.learned_backward(x, dy, ctx.fmt, v, high, low, divisor, ctx.given, ctx.factor, wanted)
    )
    dx, *of_parameters = [next(found) if one else None for one in wanted]
    return dx, None, *of_parameters, None, None, None


def _setup_stepped(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.fmt, v, high, low, divisor, rates, ctx.bounds, _ = inputs
    ctx.save_for_backward(x, v, high, low, divisor, rates)


def _stepped_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, v, high, low, divisor, rates = ctx.saved_tensors
    want_x = ctx.needs_input_grad[0]
    dx = torch.ops.tritonq.learned_step(
        x, dy, ctx.fmt, v, high, low, divisor, rates, ctx.bounds, want_x
    )  # moves v, high and low
    return dx if want_x else None, *[None for _ in range(8)]


torch.library.register_autograd(
    "tritonq::learned_qdq", _learned_backward, setup_context=_setup_learned, lib=operators.library
)
torch.library.register_autograd(
    "tritonq::learned_stepped", _stepped_backward, setup_context=_setup_stepped, lib=operators.library
)


class _Learned(torch.autograd.Function):
    """QDQ with tuning parameters for eager calls; backward recomputes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, v: Tensor | None, high: Tensor | None, low: Tensor | None, divisor: Tensor | None, fmt: Format,
        given: bool, factor: float,
    ) -> Tensor:  # fmt: skip
        return learned_ops.called(x, fmt, Learned(v, high, low, given, divisor))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.fmt, ctx.given, ctx.factor = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, v, high, low, divisor = ctx.saved_tensors
        x_wanted, v_wanted, high_wanted, low_wanted = ctx.needs_input_grad[:4]
        wanted = Wanted(x_wanted, v_wanted, high_wanted, low_wanted, ctx.factor)
        found = learned_ops.gradients(x, grads[0], ctx.fmt, Learned(v, high, low, ctx.given, divisor), wanted)
        return *[found.get(name) for name in learned_ops.NAMES], None, None, None, None


class _Stepped(torch.autograd.Function):
    """The same, with parameters that move in backward. The anchor makes the result part of a graph."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor | None, high: Tensor | None, low: Tensor | None, divisor: Tensor | None,
        anchor: Tensor, rates: Tensor, fmt: Format, bounds: tuple[float, ...],
    ) -> Tensor:  # fmt: skip
        ctx.fmt, ctx.bounds = fmt, bounds
        ctx.save_for_backward(x, v, high, low, divisor, rates)
        return learned_ops.qdq(x, fmt, Learned(v, high, low, False, divisor))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, v, high, low, divisor, rates = ctx.saved_tensors
        want_x = ctx.needs_input_grad[0]
        dx = learned_ops.step(x, grads[0], ctx.fmt, Learned(v, high, low, False, divisor), rates, ctx.bounds, want_x)
        # A second backward through saved parameters that have moved is an error, not a wrong step.
        torch.autograd.graph.increment_version([t for t in (v, high, low) if t is not None])
        return dx if want_x else None, *[None for _ in range(8)]


def _takes_gradient(*given: Tensor | None) -> bool:
    """Whether one of these takes a gradient in eager mode."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)


def _learned(given: Tensor | None, stored: torch.dtype) -> bool:
    """Whether this scale or zero point is a parameter. Without gradients it stays one where the format could not store
    it: evaluation, and the first pass of activation checkpointing, compute what training does."""
    if not isinstance(given, Tensor) or not given.requires_grad:
        return False
    return torch.is_grad_enabled() or given.dtype is not stored


def _scale_factor(scale_gradient: float | str, x: Tensor, fmt: Format) -> float:
    """What the gradients of given scales are multiplied by."""
    if scale_gradient != "lsq":
        return float(scale_gradient)
    rows, cols = fmt.group
    columns = x.shape[-1] if cols == -1 else min(cols, x.shape[-1])
    elements = x.numel() if rows == -1 else columns * min(rows, x.shape[-2] if x.ndim > 1 else 1)
    largest = (1 << fmt.bits) - 1 if fmt.zero_point else fmt.element.max  # Q_P of the paper
    return 1.0 / math.sqrt(max(1, elements) * largest)


def _present(
    x: Tensor, fmt: Format, given: dict[str, Tensor | None], search: str | bool | None, importance: Tensor | None
) -> dict[str, Tensor]:
    """The parts that are given, with those that a search finds."""
    if search or importance is not None:
        ops.check_search(search, importance, x, fmt, given["scale"] is not None)
        divisor = given["tensor_scale"]
        return dict(ops.searched_scales(x, fmt, tensor_scale=divisor, search=search, importance=importance))
    return {name: part for name, part in given.items() if part is not None}


def qdq(
    x: Tensor,
    fmt: Format | str,
    *,
    v: Tensor | None = None,
    min_scale: Tensor | None = None,
    max_scale: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    step: SignStep | None = None,
    scale_gradient: float | str = 1.0,
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
        v: offsets of x's shape, in units of one code, added before rounding: y = s * clamp(rne(x / s + v)). bf16, fp16
            or fp32, any strides; differentiable.
        min_scale, max_scale: ratios of the shape of the scale (`Format.storage`), bf16, fp16 or fp32, that every scale
            rule sees the smallest and the largest element of a group multiplied by; differentiable. A negative one
            counts as 0. `tritonq.learned_reference` states all gradients; sums over groups are in fp32, in an order
            that depends on the backend.
        step: update v, min_scale and max_scale in place during backward instead of giving them gradients, see
            `SignStep`.
        scale_gradient: factor of the gradients of a given scale and zero_point, or "lsq" for 1 / sqrt(elements of a
            group * largest magnitude of a code), as Learned Step Size Quantization has it (Esser et al. 2020).
        scale, zero_point, tensor_scale: used verbatim instead of being computed; shapes as in `Format.storage`. A
            computed scale carries NaN where its group is not finite; a given one cannot, so then NaN and infinity stay
            only where the element type has a NaN, and else become 0 and the largest number. A scale or zero_point that
            requires a gradient may be bf16, fp16 or fp32 whatever the format stores: the number is used as it is, the
            zero point rounded and clamped, straight through.
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
    if scale_gradient != "lsq" and not isinstance(scale_gradient, int | float):
        raise ValueError(f"scale_gradient is a number or 'lsq', got {scale_gradient!r}")
    if step is not None and not isinstance(step, SignStep):
        raise TypeError(f"step is a tritonq.SignStep, got {type(step).__name__}; make one of the rate")
    learned = v is not None or min_scale is not None or max_scale is not None
    if learned or step is not None or _learned(scale, fmt.scale.dtype) or _learned(zero_point, torch.uint8):
        if search or importance is not None or rounding != "nearest":
            raise ValueError(
                "tuning parameters take rounding to nearest and no search; leave those out, or v and its like"
            )
        if not (device is None and output_device is None and out is None):
            raise ValueError(
                "tuning parameters go with a tensor that is computed where it lies, into a new one; leave out, device "
                "and output_device out"
            )
        return _learned_qdq(
            x, fmt, learned_ops.check(x, fmt, v, min_scale, max_scale, scale, zero_point, tensor_scale), step,
            _scale_factor(scale_gradient, x, fmt),
        )  # fmt: skip
    given = {"scale": scale, "zero_point": zero_point, "tensor_scale": tensor_scale}
    searches = search or importance is not None
    elsewhere = device is not None or output_device is not None or out is not None
    if elsewhere or (searches and not (_differentiates(x) or ops.traced(x))):
        options = {**given, "rounding": rounding, "generator": generator, "search": search, "importance": importance}
        return _qdq_elsewhere(scheduler.source(x), fmt, device, output_device, out, progress, options)
    present = _present(x, fmt, given, search, importance)
    if _differentiates(x):
        how = {"rounding": rounding, "generator": generator}
        y: Tensor = _QDQ.apply(x, fmt, how, tuple(present), *present.values())
        return y
    return ops.qdq(x, fmt, **present, rounding=rounding, generator=generator)


def _learned_qdq(x: Tensor, fmt: Format, given: Learned, step: SignStep | None, factor: float) -> Tensor:
    own = (given.v, given.high, given.low, given.tensor_scale)
    function_transform = torch._C._are_functorch_transforms_active()
    forward_mode = forward_ad._current_level >= 0  # which then says that there is none
    as_operator = ops.traced(x) and not function_transform
    if step is None:
        if as_operator:
            y: Tensor = torch.ops.tritonq.learned_qdq(x, ops._name(fmt), *own, given.given, factor)
        elif function_transform or forward_mode or _takes_gradient(x, *own[:3]):
            y = _Learned.apply(x, *own, fmt, given.given, factor)
        else:
            y = learned_ops.qdq(x, fmt, given)
        return y
    if given.given or not any(t is not None for t in own[:3]):
        raise ValueError("a step moves v, min_scale and max_scale; pass at least one of them, and no scale")
    if step.rates.device != x.device:
        raise ValueError(f"the step is on {step.rates.device} and the tensor on {x.device}; pass SignStep(device=)")
    if function_transform:
        raise ValueError("a step changes its parameters, which torch.func does not allow; leave it out")
    if as_operator:
        y = torch.ops.tritonq.learned_stepped(x, ops._name(fmt), *own, step.rates, list(step.bounds), step.anchor)
    else:
        # A leaf of its own: gradients of one made earlier would tie a captured backward to the stream of that time.
        anchor = torch.empty(0, device=x.device, requires_grad=True)
        y = _Stepped.apply(x, *own, anchor, step.rates, fmt, step.bounds)
    return y


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
    """QDQ into `out`, with a search, or of a tensor that is not where it is computed or where the result belongs."""
    if ops.traced(x):  # a graph holds whole tensors
        y = qdq(x if device is None else x.to(device), fmt, **options)  # type: ignore[arg-type]
        y = y if output_device is None else y.to(output_device)
        return y if out is None else out.copy_(y)
    if _differentiates(x):
        raise ValueError("qdq has no gradient with out, device or output_device; detach x, or move it first")
    ops.check_input(x, fmt)
    search, importance = options["search"], options["importance"]
    where = scheduler.placed(x, device, output_device, out)
    if where is None and (search or importance is not None) and not x.is_meta:  # scales of a tile at a time
        ops.check_search(search, importance, x, fmt, options["scale"] is not None)  # which all lie where x does
        where = scheduler.devices_of(x.device), x.device
    if where is not None:
        y = scheduler.result(out, tuple(x.shape), x.dtype, where[1])
        return scheduler.qdq(x, fmt, where[0], y, **options, progress=progress)
    given = {name: options[name] for name in ("scale", "zero_point", "tensor_scale")}
    present = _present(x, fmt, given, search, importance)
    return ops.qdq(x, fmt, **present, rounding=options["rounding"], generator=options["generator"], out=out)


def _unviewed(y: Tensor) -> Tensor:
    """y, and no view of what a linear layer computed in two dimensions: autograd lets nobody write into a view that a
    Function returned, and adding to the output of a layer in place is common."""
    if not torch.compiler.is_compiling() and not y._is_view():
        return y
    return torch.ops.aten._unsafe_view.default(y, y.shape)


class _Linear(torch.autograd.Function):
    """x @ dequantize(weight).T + bias; backward dequantizes again instead of keeping the dense weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, buf: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        kept = buf
        if not torch.compiler.is_compiling():
            if memory.offloading:
                memory.stay(buf)  # of a weight, which is alive anyway
            if buf.is_inference():
                kept = buf.view(torch.uint8)  # which can be saved
        ctx.save_for_backward(kept)
        weight = ops.dequantize_buffer(buf, layout, x.dtype)
        return _unviewed(torch.nn.functional.linear(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (dy,), (buf,) = grads, ctx.saved_tensors  # once: checkpointing unpacks them a single time
        weight = ops.dequantize_buffer(buf, ctx.layout, dy.dtype)
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return dy @ weight, dbias, None, None


# What `Function.apply` calls when it has looked for transforms of torch.func, which `linear` does in less time.
_apply_linear = super(torch.autograd.Function, _Linear).apply
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead  # of tensors that have left their transform


def linear(x: Tensor, buf: Tensor, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times a quantized weight [N, K] transposed, whose parts lie in `buf`, plus bias [N]; computed in x's
    dtype."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
        bias = None if bias is None else bias.to(x.dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        if torch.compiler.is_compiling():
            return _Linear.apply(x, bias, buf, layout)
        # `_Linear` has no rules for torch.func and forward mode; a product of dense tensors does.
        if not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0:
            bias = None if bias is None else _unwrap_if_dead(bias)
            found: Tensor = _apply_linear(_unwrap_if_dead(x), bias, buf, layout)
            return found
    return torch.nn.functional.linear(x, ops.dequantize_buffer(buf, layout, x.dtype), bias)


class _QDQLinear(torch.autograd.Function):
    """x @ qdq(weight).T + bias; backward rounds the weight again instead of keeping its rounded copy."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fmt: Format, names: tuple[str, ...], *given: Tensor
    ) -> Tensor:
        ctx.fmt, ctx.names = fmt, names
        ctx.save_for_backward(x, weight, *given)
        values = ops.qdq(weight, fmt, **dict(zip(names, given, strict=True)))  # type: ignore[arg-type]
        return _unviewed(torch.nn.functional.linear(x, values.to(x.dtype), bias))

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
