"""The functions of `ops` as operators of torch, `torch.ops.tritonq.*`: schemas, implementations, shapes for tracing.

Formats cross a schema by name, 8-bit floats as bytes, a seed as a tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonq import ops, scale_tiles
from tritonq.formats import SUPER_PARTS, Format, get_format, minifloat

library = torch.library.Library("tritonq", "DEF")
_GIVEN = "Tensor? scale=None, Tensor? zero_point=None, Tensor? tensor_scale=None"
_SEED = "Tensor? seed=None"  # one int64 on the CPU; with it, rounding is stochastic


def _scales(fmt: Format, given: tuple[Tensor | None, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Scale, zero point and tensor scale; an operator's arguments that keep their default are not passed on."""
    scale, zero_point, tensor_scale = (*given, None, None, None)[:3]
    if scale is not None and scale.dtype is torch.uint8:  # any other is what the caller passed, and is checked as such
        scale = scale.view(fmt.scale.dtype)
    return scale, zero_point, tensor_scale


def _quantize_operator(
    x: Tensor,
    name: str,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    search: bool = False,
    importance: Tensor | None = None,
    seed: Tensor | None = None,
) -> list[Tensor]:
    fmt = get_format(name)
    ops.check_input(x, fmt)
    given = _scales(fmt, (scale, zero_point, tensor_scale))
    parts = ops._quantize(x, fmt, *given, search=search, importance=importance, seed=ops._value(seed))
    return [ops._bits(part) for part in parts.values()]


def _quantize_fake(x: Tensor, name: str, *given: Any) -> list[Tensor]:
    storage = get_format(name).storage(tuple(x.shape)).values()
    return [ops._bits(x.new_empty(shape, dtype=dtype)) for shape, dtype in storage]


def _quantize_swizzled_operator(
    x: Tensor, name: str, tensor_scale: Tensor | None = None, seed: Tensor | None = None
) -> list[Tensor]:
    fmt = get_format(name)
    ops.check_input(x, fmt)
    scale_tiles.check_format(fmt)
    return [ops._bits(part) for part in ops._quantize_swizzled(x, fmt, tensor_scale, seed=ops._value(seed)).values()]


def _quantize_swizzled_fake(x: Tensor, name: str, *given: Any) -> list[Tensor]:
    qdata, scale, *rest = _quantize_fake(x, name)
    return [qdata, scale.new_empty(scale_tiles.swizzled_shape(tuple(scale.shape))), *rest]


def _quantize_both_operator(x: Tensor, name: str, tensor_scale: Tensor | None = None) -> list[Tensor]:
    fmt = get_format(name)
    ops.check_both(x, fmt)
    return [ops._bits(part) for side in ops._quantize_both(x, fmt, tensor_scale) for part in side.values()]


def _quantize_both_fake(x: Tensor, name: str, tensor_scale: Tensor | None = None) -> list[Tensor]:
    return [*_quantize_fake(x, name), *_quantize_fake(x.mT, name)]


def _qdq_operator(
    x: Tensor,
    name: str,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    fmt = get_format(name)
    ops.check_input(x, fmt)
    return ops._qdq(x, fmt, *_scales(fmt, (scale, zero_point, tensor_scale)), seed=ops._value(seed))


def _qdq_backward_operator(x: Tensor, dy: Tensor, name: str, *given: Tensor | None) -> Tensor:
    fmt = get_format(name)
    return ops._qdq_backward(x, dy, fmt, *_scales(fmt, given))


def _dequantize_operator(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    **supers: Tensor | None,
) -> Tensor:
    fmt = get_format(name)
    parts = {"qdata": qdata, "scale": scale, "zero_point": zero_point, "tensor_scale": tensor_scale, **supers}
    values = [parts[part] for part in fmt.storage(tuple(shape))]
    return ops._dequantize(ops._typed(values, fmt, tuple(shape)), fmt, tuple(shape), dtype)


def _operator(schema: str, function: Any, fake: Any, *tags: torch.Tag) -> None:
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tritonq::{name}", fake, lib=library)


_operator(
    f"quantize(Tensor x, str format, {_GIVEN}, bool search=False, Tensor? importance=None, {_SEED}) -> Tensor[]",
    _quantize_operator,
    _quantize_fake,
)
_operator(
    "hadamard(Tensor x, int signs, bool inverse) -> Tensor",
    ops._hadamard,
    lambda x, signs, inverse: x.new_empty(x.shape),
)
# An element type crosses a schema by its fields, so that none has to have a name that is known.
_operator(
    "cast(Tensor x, int ebits, int mbits, str special, bool signed) -> Tensor",
    lambda x, *fields: ops._cast(x, minifloat(*fields)),
    lambda x, *fields: torch.empty_like(x),
)
torch.library.register_vmap(
    "tritonq::cast", lambda info, dims, x, *fields: (torch.ops.tritonq.cast(x, *fields), dims[0]), lib=library
)
library.impl("cast", torch.library.fallthrough_kernel, "Autograd")  # differentiated by the functions of `ste` around it
_operator(
    f"quantize_swizzled(Tensor x, str format, Tensor? tensor_scale=None, {_SEED}) -> Tensor[]",
    _quantize_swizzled_operator,
    _quantize_swizzled_fake,
)
_operator(
    "quantize_both(Tensor x, str format, Tensor? tensor_scale=None) -> Tensor[]",
    _quantize_both_operator,
    _quantize_both_fake,
)
_operator(
    f"qdq(Tensor x, str format, {_GIVEN}, {_SEED}) -> Tensor", _qdq_operator, lambda x, *_, **__: x.new_empty(x.shape)
)
_operator(
    f"qdq_backward(Tensor x, Tensor dy, str format, {_GIVEN}) -> Tensor",
    _qdq_backward_operator,
    lambda x, dy, *_, **__: dy.new_empty(x.shape),
)
_operator(
    "dequantize(Tensor qdata, Tensor scale, Tensor? zero_point, Tensor? tensor_scale, str format, SymInt[] shape, "
    f"ScalarType dtype, *, {', '.join(f'Tensor? {part}=None' for part in SUPER_PARTS)}) -> Tensor",
    _dequantize_operator,
    lambda qdata, scale, zero_point, tensor_scale, format, shape, dtype, **_: qdata.new_empty(shape, dtype=dtype),
)
_operator(
    "tensor_scale(Tensor x, str format) -> Tensor",
    lambda x, name: ops._tensor_scale(x, get_format(name)),
    lambda x, name: x.new_empty(1, dtype=torch.float32),
)
# Inductor would replace torch.randint by numbers of its own; this draws what an eager call draws. Graphs merge calls of
# an operator with the same arguments, although it is tagged as random, but no two empty tensors: each seed takes one.
_operator(
    "seed(Tensor fresh) -> Tensor",
    lambda fresh: ops._draw(),
    lambda fresh: torch.empty((), dtype=torch.int64),
    torch.Tag.nondeterministic_seeded,
)


def _one_by_one(info: Any, dims: Sequence[Any], *arguments: Any, of: Any) -> tuple[Any, Any]:
    calls = [
        of(*[a.select(d, i) if isinstance(d, int) else a for a, d in zip(arguments, dims, strict=True)])
        for i in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    stacked = [torch.stack(same) for same in zip(*calls, strict=True)]
    return stacked, [0] * len(stacked)


def map_one_by_one(name: str) -> None:
    """Take an operator call by call under vmap: as torch does without a rule, but without its warning, with errors as
    they are, and also where an operator gives several tensors."""
    function = functools.partial(_one_by_one, of=getattr(torch.ops.tritonq, name))
    torch.library.register_vmap(f"tritonq::{name}", function, lib=library)


for _mapped in ("qdq", "qdq_backward"):
    map_one_by_one(_mapped)
