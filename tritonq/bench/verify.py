"""What runs on the GPU against the CPU path, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq import ops
from tritonq.bench.cases import Shape2
from tritonq.formats import Format
from tritonq.launch import as_integers
from tritonq.reference import Parts

WHOLE = 1 << 26  # elements that are compared in full; of larger tensors, three slices
SLICE = 1 << 22


class Mismatch(RuntimeError):
    """A GPU result differs from that of the CPU path."""


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, whatever the device."""
    return a.shape == b.shape and torch.equal(as_integers(a), as_integers(b.to(a.device)))


def row_ranges(shape: Shape2, fmt: Format) -> list[tuple[int, int]]:
    """Rows to compare: all of them, or slices at both ends and in the middle that begin with a block of rows."""
    rows, columns = shape
    if rows * columns <= WHOLE:
        return [(0, rows)]
    block = max(1, fmt.group[0])
    count = -(-max(1, SLICE // columns) // block) * block
    if 3 * count >= rows:
        return [(0, rows)]
    starts = (0, (rows - count) // 2 // block * block, (rows - count) // block * block)
    return [(start, min(rows, start + count + block)) for start in starts]


def _tensor_wide(fmt: Format, x: Tensor) -> Parts:
    """Parts that belong to the whole tensor, which slices of it cannot know: from its largest and smallest element."""
    if not (fmt.tensor_scale or fmt.group[0] == -1):
        return {}
    extremes = torch.stack([x.amax(), x.amin()]).cpu().reshape(1, 2)
    parts = ops.quantize(extremes, fmt)
    return {"tensor_scale": parts["tensor_scale"]} if fmt.tensor_scale else {k: parts[k] for k in parts if k != "qdata"}


def verify(fmt: Format, x: Tensor) -> str:
    """How much of quantize, dequantize and QDQ of x was compared, "all" or "slices". Raises Mismatch."""
    shape = (x.shape[0], x.shape[1])
    parts = ops.quantize(x, fmt)
    y = ops.dequantize(parts, fmt, shape, x.dtype)
    if not same(ops.qdq(x, fmt), y):
        raise Mismatch(f"{fmt.name}: qdq and dequantize(quantize) differ on {shape} {x.dtype}")
    ranges = row_ranges(shape, fmt)
    given = {} if len(ranges) == 1 else _tensor_wide(fmt, x)
    for start, stop in ranges:
        host = x[start:stop].cpu()
        expected = ops.quantize(
            host,
            fmt,
            scale=given.get("scale"),
            zero_point=given.get("zero_point"),
            tensor_scale=given.get("tensor_scale"),
        )
        for name, part in expected.items():
            own = parts[name]
            if part.shape != own.shape:  # rows of x, or blocks of them
                block = 1 if name == "qdata" else max(1, fmt.group[0])
                own = own[start // block : -(-stop // block)]
            if not same(own, part):
                raise Mismatch(f"{fmt.name}: {name} of GPU and CPU differ in rows {start}:{stop} of {shape} {x.dtype}")
        if not same(y[start:stop], ops.dequantize(expected, fmt, (stop - start, shape[1]), x.dtype)):
            raise Mismatch(f"{fmt.name}: dequantize of GPU and CPU differ in rows {start}:{stop} of {shape} {x.dtype}")
    return "all" if len(ranges) == 1 else "slices"
