"""Who runs the same operation beside us: tritonq itself, torch.compile of `eager`, torchao, bitsandbytes.

A peer that is not installed, has not the format, or fails, is left out or says why; it never ends a run. How far its
values are from ours is measured before it is timed: `COMPARABLE` of the elements may differ (a division that rounds
otherwise now and then moves a code by one); beyond that it does something else, and no speedup is claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonq import ops
from tritonq.bench import cases
from tritonq.bench.eager import eager, raw, typed
from tritonq.formats import Format
from tritonq.reference import Parts

LABELS = ("torch.compile", "torchao", "bitsandbytes")
COMPARABLE = 0.01
_COMPARED = 1 << 26  # elements that are compared, from the front


@dataclass(frozen=True)
class Contender:
    """One way to run an operation.

    Attributes:
        prepare: from a dense tensor to the arguments of `call`, outside the time.
        values: from what `call` returns to dense values, to compare with ours.
        graph: whether CUDA graphs can capture it; if not, events time it.
    """

    label: str
    prepare: Callable[[Tensor], tuple[Any, ...]]
    call: Callable[..., Any]
    values: Callable[[Any], Tensor]
    graph: bool = True


def _same(y: Tensor) -> Tensor:
    return y


def ours(fmt: Format, op: str, x: Tensor) -> Contender:
    shape, dtype = tuple(x.shape), x.dtype

    def decoded(parts: Parts) -> Tensor:
        return ops.dequantize(parts, fmt, shape, dtype)

    if op == "dequantize":
        return Contender("tritonq", lambda x: (ops.quantize(x, fmt),), decoded, _same)
    function = ops.quantize if op.startswith("quantize") else ops.qdq
    values = decoded if op.startswith("quantize") else _same
    if op.endswith(cases.GIVEN):
        divisor = ops.tensor_scale(x, fmt)
        return Contender("tritonq", lambda x: (x,), lambda x: function(x, fmt, tensor_scale=divisor), values)
    return Contender("tritonq", lambda x: (x,), lambda x: function(x, fmt), values)


def peers(fmt: Format, op: str, x: Tensor, labels: tuple[str, ...] = LABELS) -> Iterator[Contender]:
    """Those of `labels` that can run `op`."""
    makers = {"torch.compile": _compiled, "torchao": _torchao, "bitsandbytes": _bitsandbytes}
    for label in labels:
        found = makers[label](fmt, op, x)
        if found is not None:
            yield found


def difference(values: Tensor, expected: Tensor) -> tuple[float, float]:
    """Share of elements that differ, and the largest difference over the largest magnitude of `expected`."""
    a, b = values.reshape(-1)[:_COMPARED], expected.reshape(-1)[:_COMPARED]
    if a.shape != b.shape:
        return 1.0, float("inf")
    a, b = a.to(torch.float32), b.to(torch.float32)
    return int((a != b).sum()) / max(1, a.numel()), float((a - b).abs().amax() / b.abs().amax().clamp(min=1e-38))


def available(labels: tuple[str, ...] = LABELS) -> dict[str, str | None]:
    """Version of each installed peer; None where it is not installed."""
    versions: dict[str, str | None] = {}
    for label in labels:
        try:
            versions[label] = getattr(__import__(label.partition(".")[0]), "__version__", "unknown")
        except Exception:  # compiled extensions of another torch fail in ways of their own
            versions[label] = None
    return versions


def _compile(fn: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(fn, fullgraph=True, dynamic=False)


def _compiled(fmt: Format, op: str, x: Tensor) -> Contender | None:
    shape, dtype = tuple(x.shape), x.dtype
    definition = eager(fmt, shape, dtype, x.device)
    if definition is None:
        return None
    torch.compiler.reset()  # formats share the code of their definitions, and recompilations are limited
    if op == "dequantize":
        call = _compile(definition.dequantize)
        return Contender("torch.compile", lambda x: (raw(ops.quantize(x, fmt)),), call, _same)
    call = _compile(definition.quantize if op.startswith("quantize") else definition.qdq)

    def decoded(parts: Parts) -> Tensor:
        return ops.dequantize(typed(parts, fmt), fmt, shape, dtype)

    divisor = ops.tensor_scale(x, fmt) if op.endswith(cases.GIVEN) else None
    prepare = (lambda x: (x,)) if divisor is None else (lambda x: (x, divisor))
    return Contender("torch.compile", prepare, call, decoded if op.startswith("quantize") else _same)


def _torchao(fmt: Format, op: str, x: Tensor) -> Contender | None:
    """Its MX conversions (rule floor) and NVFP4 with a given tensor scale, compiled."""
    shape, dtype = tuple(x.shape), x.dtype
    if x.shape[-1] % fmt.group_size or fmt.group[0] != 1 or dtype is torch.float16:
        return None
    try:
        from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
        from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize
    except Exception:
        return None

    def decoded(scale_qdata: tuple[Tensor, Tensor]) -> Tensor:
        storage = fmt.storage(shape)
        parts = {
            name: part.view(storage[name][1]).reshape(storage[name][0])
            for name, part in zip(("scale", "qdata"), scale_qdata, strict=True)
        }
        if fmt.tensor_scale:
            parts["tensor_scale"] = ops.tensor_scale(x, fmt)
        return ops.dequantize(parts, fmt, shape, dtype)

    torch.compiler.reset()
    if fmt.tensor_scale:
        if op != "quantize" + cases.GIVEN or fmt.element.name != "e2m1":
            return None
        multiplier = 1.0 / ops.tensor_scale(x, fmt)
        call = _compile(lambda x: nvfp4_quantize(x, fmt.group_size, multiplier))
        return Contender("torchao", lambda x: (x,), call, decoded)
    element = fmt.element.dtype or (torch.float4_e2m1fn_x2 if fmt.element.name == "e2m1" else None)
    if fmt.scale.rule != "floor" or element not in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float4_e2m1fn_x2):
        return None
    if op == "quantize":
        return Contender("torchao", lambda x: (x,), _compile(lambda x: to_mx(x, element, fmt.group_size)), decoded)
    if op == "dequantize":
        call = _compile(lambda qdata, scale: to_dtype(qdata, scale, element, fmt.group_size, dtype))

        def prepare(x: Tensor) -> tuple[Tensor, Tensor]:
            parts = ops.quantize(x, fmt)
            return parts["qdata"], parts["scale"]

        return Contender("torchao", prepare, call, _same)
    return None


def _bitsandbytes(fmt: Format, op: str, x: Tensor) -> Contender | None:
    """NF4 in blocks of 64, beside 4-bit formats with such groups: what is no NF4 has other values."""
    if (fmt.bits, fmt.group, fmt.zero_point) != (4, (1, 64), False) or op not in ("quantize", "dequantize"):
        return None
    try:
        from bitsandbytes import functional
    except Exception:
        return None

    def encode(x: Tensor) -> Any:
        return functional.quantize_4bit(x, blocksize=64, quant_type="nf4")

    def decode(qdata: Tensor, state: Any) -> Tensor:
        return functional.dequantize_4bit(qdata, state)

    label = "bitsandbytes nf4"
    if op == "quantize":
        return Contender(label, lambda x: (x,), encode, lambda result: decode(*result), graph=False)
    return Contender(label, encode, decode, _same, graph=False)
