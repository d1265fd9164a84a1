"""QDQ with tuning parameters on plain tensors, and as operators of torch: check, allocate, plan, launch.

`torch.ops.tritonq.learned_qdq` and what belongs to it take max_scale and min_scale as `high` and `low`, or with `given`
the scale and the zero point; 8-bit floats pass as bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonq import learned_plans, learned_tiles, operators, ops
from tritonq.formats import Format, get_format
from tritonq.learned_reference import Learned, Parts, Wanted
from tritonq.memory import empty

_RATIOS = (torch.bfloat16, torch.float16, torch.float32)
NAMES = ("dx", "dv", "d_high", "d_low")


def check(
    x: Tensor,
    fmt: Format,
    v: Tensor | None,
    min_scale: Tensor | None,
    max_scale: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
) -> Learned:
    """The parameters of a call, or an error that says what they have to be."""
    ops.check_input(x, fmt)
    shape = fmt.scale_shape(tuple(x.shape))
    given = scale is not None or zero_point is not None
    if given and fmt.super_group:
        raise ValueError(f"{fmt.name} quantizes its scales again and takes none that are given; leave scale out")
    if given and (min_scale is not None or max_scale is not None):
        raise ValueError("min_scale and max_scale shape a scale that is computed; leave them out, or scale")
    if given and (scale is None or (zero_point is None) == fmt.zero_point):
        needs = "scale and zero_point together" if fmt.zero_point else "scale without zero_point"
        raise ValueError(f"{fmt.name} takes {needs}, or neither")
    for name, value, wanted, types in (
        ("v", v, tuple(x.shape), ops.FLOATS),
        ("min_scale", min_scale, shape, _RATIOS), ("max_scale", max_scale, shape, _RATIOS),
        ("scale", scale, shape, (*_RATIOS, fmt.scale.dtype)),
        ("zero_point", zero_point, shape, (*_RATIOS, torch.uint8)),
        ("tensor_scale", tensor_scale, (1,), (torch.float32,)),
    ):  # fmt: skip
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.dtype not in types:
            kinds = ", ".join(str(one).removeprefix("torch.") for one in dict.fromkeys(types))
            raise TypeError(f"{name} is a tensor of {kinds}, got {getattr(value, 'dtype', type(value).__name__)}")
        ops.check_shape(name, value, wanted, fmt, x)
        ops.check_device(name, value, x)
    if tensor_scale is not None and not fmt.tensor_scale:
        raise ValueError(f"{fmt.name} has no tensor_scale; leave it out")
    if fmt.tensor_scale:
        divisor = ops.tensor_scale(x.detach(), fmt) if tensor_scale is None else tensor_scale.detach().reshape(1)
    else:
        divisor = None
    if given:
        assert scale is not None
        return Learned(v, ops._bits(scale), zero_point, True, divisor)
    return Learned(v, max_scale, min_scale, False, divisor)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _prepared(given: Learned) -> Learned:
    v = None if given.v is None else given.v.resolve_neg()
    return Learned(v, _contiguous(given.high), _contiguous(given.low), given.given, given.tensor_scale)


def called(x: Tensor, fmt: Format, given: Learned) -> Tensor:
    """`qdq`; through its operator where somebody traces."""
    if not ops.traced(x):
        return qdq(x, fmt, given)
    own = (given.v, given.high, given.low, given.tensor_scale)
    y: Tensor = torch.ops.tritonq.learned_qdq(x, ops._name(fmt), *own, given.given, 1.0)
    return y


def gradients(x: Tensor, dy: Tensor, fmt: Format, given: Learned, wanted: Wanted) -> dict[str, Tensor]:
    """`backward`; through its operator where somebody traces."""
    if not (ops.traced(x) or ops.traced(dy)):
        return backward(x, dy, fmt, given, wanted)
    own = (given.v, given.high, given.low, given.tensor_scale, given.given, wanted.factor)
    each = [wanted.x, wanted.v, wanted.high, wanted.low]
    found = torch.ops.tritonq.learned_backward(x, dy, ops._name(fmt), *own, each)
    return dict(zip([name for name, one in zip(NAMES, each, strict=True) if one], found, strict=True))


@torch.no_grad()
def qdq(x: Tensor, fmt: Format, given: Learned) -> Tensor:
    """y of x's shape and dtype, contiguous."""
    x = x.resolve_neg()
    y = empty(x.shape, x.dtype, x.device)
    if x.numel() and x.device.type != "meta":
        given = _prepared(given)
        if ops.uses_triton(x):
            with ops._device_of(x):
                learned_plans.run(x, fmt, given, learned_plans.kind("qdq", given), {"y": y}, None, None)
        else:
            learned_tiles.qdq(x, fmt, given, y)
    return y


def quantize(x: Tensor, fmt: Format, given: Learned, parts: Parts) -> None:
    """Codes and scales of what `qdq` gives, into contiguous parts: dequantized they are y bit for bit."""
    x = x.detach().resolve_neg()
    if "tensor_scale" in parts and given.tensor_scale is not None:
        parts["tensor_scale"].copy_(given.tensor_scale)
    if x.device.type == "meta":
        return
    if given.given:
        for name, part in (("scale", given.high), ("zero_point", given.low)):
            if part is not None:
                parts[name].copy_(part.view(parts[name].dtype))
    if x.numel() == 0:
        ops._run(x, fmt, parts, given.given, True, None)
        return
    given = _prepared(given)
    if ops.uses_triton(x):
        with ops._device_of(x):
            learned_plans.quantize(x, fmt, given, parts)
    else:
        learned_tiles.quantize(x, fmt, given, parts)


@torch.no_grad()
def backward(x: Tensor, dy: Tensor, fmt: Format, given: Learned, wanted: Wanted) -> dict[str, Tensor]:
    """The gradients that are wanted, by name (`NAMES`), contiguous, in the dtypes of dy and of the parameters."""
    found = _empty_gradients(x, dy, given.v, given.high, given.low, (wanted.x, wanted.v, wanted.high, wanted.low))
    if x.numel() == 0:
        for gradient in found.values():
            gradient.zero_()
    elif x.device.type != "meta" and found:
        _backward(x, dy, fmt, _prepared(given), wanted, found, None)
    return found


def _empty_gradients(
    x: Tensor, dy: Tensor, v: Tensor | None, high: Tensor | None, low: Tensor | None, wanted: Sequence[bool]
) -> dict[str, Tensor]:
    like = ((x.shape, dy), (x.shape, v), (None if high is None else high.shape, high),
            (None if low is None else low.shape, low))  # fmt: skip
    return {
        name: empty(shape, t.dtype, x.device)
        for name, (shape, t), one in zip(NAMES, like, wanted, strict=True)
        if one and t is not None and shape is not None
    }


@torch.no_grad()
def step(
    x: Tensor, dy: Tensor, fmt: Format, given: Learned, rates: Tensor, bounds: Sequence[float], want_x: bool
) -> Tensor:
    """v, max_scale and min_scale moved in place; dx, or a tensor without elements."""
    of_v, of_groups = given.v is not None, (given.high is not None, given.low is not None)
    wanted = Wanted(want_x, of_v, *of_groups, step=True, bounds=(bounds[0], bounds[1], bounds[2], bounds[3]))
    found = {"dx": empty(x.shape if want_x else (0,), dy.dtype, x.device)}
    if x.numel() and x.device.type != "meta":
        own = _prepared(given)
        _backward(x, dy, fmt, own, wanted, found if want_x else {}, rates)
        for target, moved in ((given.v, own.v), (given.high, own.high), (given.low, own.low)):
            if target is not None and moved is not None and moved is not target:
                target.copy_(moved)
    return found["dx"]


def _backward(
    x: Tensor, dy: Tensor, fmt: Format, given: Learned, wanted: Wanted, out: dict[str, Tensor], rates: Tensor | None
) -> None:
    x, dy = x.resolve_neg(), dy.resolve_neg()
    if ops.uses_triton(x):
        kind = learned_plans.kind("step" if wanted.step else "backward", given, wanted)
        with ops._device_of(x):
            learned_plans.run(x, fmt, given, kind, out, dy, rates)
    else:
        learned_tiles.backward(x, dy, fmt, given, wanted, out, rates)


def quantized(x: Tensor, fmt: Format, given: Learned, out: Parts | None = None) -> Parts:
    """`quantize` into new parts, or into `out`."""
    stored = (fmt.scale.dtype, torch.uint8)
    for name, part, dtype in zip(("scale", "zero_point"), (given.high, given.low), stored, strict=True):
        if given.given and part is not None and part.dtype not in (dtype, torch.uint8):
            raise TypeError(
                f"{name} of {fmt.name} is stored as {dtype}, got {part.dtype}; cast it, it is used verbatim"
            )
    if ops.traced(x):
        own = (given.v, given.high, given.low, given.tensor_scale)
        values = torch.ops.tritonq.learned_quantize(x.detach(), ops._name(fmt), *own, given.given)
        made = ops._typed(values, fmt, tuple(x.shape))
        return made if out is None else {name: part.copy_(made[name]) for name, part in out.items()}
    parts = ops.allocate(fmt, tuple(x.shape), x.device) if out is None else ops._checked_out(out, fmt, x)
    with torch.no_grad():
        quantize(x, fmt, given, parts)
    return parts


# ----------------------------------------------------------------------------------------------------- operators


def _learned_qdq(x: Tensor, name: str, v: Any, high: Any, low: Any, divisor: Any, given: bool, factor: float) -> Tensor:
    return qdq(x, get_format(name), Learned(v, high, low, given, divisor))


def _learned_backward(
    x: Tensor, dy: Tensor, name: str, v: Any, high: Any, low: Any, divisor: Any, given: bool, factor: float,
    wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    of = Wanted(wanted[0], wanted[1], wanted[2], wanted[3], factor)
    found = backward(x, dy, get_format(name), Learned(v, high, low, given, divisor), of)
    return list(found.values())


def _learned_quantize(x: Tensor, name: str, v: Any, high: Any, low: Any, divisor: Any, given: bool) -> list[Tensor]:
    fmt = get_format(name)
    parts = ops.allocate(fmt, tuple(x.shape), x.device)
    quantize(x, fmt, Learned(v, high, low, given, divisor), parts)
    return [ops._bits(part) for part in parts.values()]


def _learned_stepped(
    x: Tensor, name: str, v: Any, high: Any, low: Any, divisor: Any, rates: Tensor, bounds: Any, anchor: Tensor
) -> Tensor:
    return qdq(x, get_format(name), Learned(v, high, low, False, divisor))


def _learned_step(
    x: Tensor, dy: Tensor, name: str, v: Any, high: Any, low: Any, divisor: Any, rates: Tensor,
    bounds: Sequence[float], want_x: bool,
) -> Tensor:  # fmt: skip
    return step(x, dy, get_format(name), Learned(v, high, low, False, divisor), rates, bounds, want_x)


_PARAMETERS = "Tensor? v, Tensor? high, Tensor? low, Tensor? tensor_scale"
operators._operator(
    f"learned_qdq(Tensor x, str format, {_PARAMETERS}, bool given, float factor) -> Tensor",
    _learned_qdq,
    lambda x, *_: x.new_empty(x.shape),
)
operators._operator(
    f"learned_backward(Tensor x, Tensor dy, str format, {_PARAMETERS}, bool given, float factor, bool[4] wanted) "
    "-> Tensor[]",
    _learned_backward,
    lambda x, dy, name, v, high, low, divisor, given, factor, wanted: list(
        _empty_gradients(x, dy, v, high, low, wanted).values()
    ),
)
operators._operator(
    f"learned_quantize(Tensor x, str format, {_PARAMETERS}, bool given) -> Tensor[]",
    torch.no_grad()(_learned_quantize),
    lambda x, name, *_: operators._quantize_fake(x, name),
)
operators._operator(
    f"learned_stepped(Tensor x, str format, {_PARAMETERS}, Tensor rates, float[] bounds, Tensor anchor) -> Tensor",
    _learned_stepped,
    lambda x, *_: x.new_empty(x.shape),
)
operators._operator(
    "learned_step(Tensor x, Tensor dy, str format, Tensor(a!)? v, Tensor(b!)? high, Tensor(c!)? low, "
    "Tensor? tensor_scale, Tensor rates, float[] bounds, bool want_x) -> Tensor",
    _learned_step,
    lambda x, dy, name, v, high, low, divisor, rates, bounds, want_x: dy.new_empty(x.shape if want_x else (0,)),
)


for _name in ("learned_qdq", "learned_backward"):
    operators.map_one_by_one(_name)
