"""What operators do with QTensors: those here keep them quantized; see `QTensor.__torch_dispatch__` for the rest.

A window is a QTensor whose parts are strided views of a larger tensor's buffer. Along an axis it may begin and end
where a group and a byte do; scales that it shares with what lies outside stay where they are.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from tritonq import ops
from tritonq.formats import Shape
from tritonq.layout import Segment
from tritonq.reference import Parts
from tritonq.tensor import Layout, QTensor, implements, quantize
from tritonq.tiling import contiguous_strides

aten = torch.ops.aten

# ------------------------------------------------------------------------------------------------- aliases and copies


def _same(q: QTensor, buf: Tensor, dtype: torch.dtype | None = None) -> QTensor:
    result = QTensor._wrap(buf, q._layout, dtype or q.dtype)
    result._cut_from = q._cut_from
    return result


def _fresh(q: QTensor, shape: Shape | None = None, dtype: torch.dtype | None = None, **where: Any) -> QTensor:
    """Uninitialised, of the same format."""
    layout = Layout.of(q.format, tuple(q.shape) if shape is None else shape)
    where = {"device": where.get("device") or q.device, "pin_memory": where.get("pin_memory") or False}
    return QTensor._wrap(torch.empty(layout.nbytes, dtype=torch.uint8, **where), layout, dtype or q.dtype)


@implements(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _alias(func: Any, args: Any, kwargs: Any) -> Any:
    return _same(args[0], args[0]._buf)


@implements(aten.clone.default)
def _clone(func: Any, args: Any, kwargs: Any) -> Any:
    q = args[0]
    if q._is_compact():
        return _same(q, q._buf.clone())
    out = _fresh(q)
    out._cut_from = q._cut_from
    for name, part in q.parts().items():
        out.parts()[name].copy_(part)
    return out


@implements(aten._to_copy.default)
def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    q = args[0]
    dtype, device = kwargs.get("dtype") or q.dtype, kwargs.get("device") or q.device
    if dtype not in ops.FLOATS:
        return NotImplemented
    q = q._compacted()
    buf = q._buf.to(device, non_blocking=kwargs.get("non_blocking", False), copy=True)
    if kwargs.get("pin_memory"):
        buf = buf.pin_memory()
    return _same(q, buf, dtype)


@implements(aten.copy_.default)
def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[0], args[1]
    non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    if not isinstance(target, QTensor):
        return target.copy_(source.dequantize().to(target.dtype))
    if tuple(target.shape) != tuple(source.shape):
        raise RuntimeError(f"copy_ into a QTensor of shape {tuple(target.shape)} from shape {tuple(source.shape)}")
    kept: dict[str, Any] = _shared_parts(target)
    if isinstance(source, QTensor) and source.format == target.format:
        given = source.parts()
        if all(_equal(part, given[name]) for name, part in kept.items()):
            if target._is_compact() and source._is_compact():
                target._buf.copy_(source._buf, non_blocking)
            else:
                for name, part in target.parts().items():
                    part.copy_(given[name], non_blocking)
            return target
    if "scale" in kept and target.format.group[0] != -1:
        raise RuntimeError(
            f"copy_ into columns of a quantized tensor ({target.format.name}) whose scale the rest of the row shares; "
            "dequantize it, change the result and write it back with copy_, which quantizes"
        )
    dense = source.dequantize(torch.float32) if isinstance(source, QTensor) else source
    for name, part in ops.quantize(dense.detach().to(target.device), target.format, **kept).items():
        target.parts()[name].copy_(part)
    return target


def _equal(part: Tensor, other: Tensor) -> bool:
    """Whether two parts hold the same bits; on the meta device, where nobody can look, yes."""
    if part.is_meta or other.is_meta:
        return part.shape == other.shape
    return torch.equal(part.contiguous().view(torch.uint8), other.to(part.device).contiguous().view(torch.uint8))


def _ends_inside_rows(q: QTensor) -> bool:
    """Whether q is a window of some columns only (vectors are not, see `_window` and `_select`)."""
    bytes_of_row = q.qdata.shape[-1] * q.qdata.dtype.itemsize
    return q.ndim > 1 and q.qdata.stride(-2) * q.qdata.dtype.itemsize != bytes_of_row


def _shared_parts(q: QTensor) -> Parts:
    """Parts that a window has in common with the rest of its tensor, which a write into the window must not change."""
    if q._is_compact() or q._cut_from is not None:
        return {}
    rows, columns = q.format.group
    by_row = rows == -1 or (columns == -1 and _ends_inside_rows(q))
    names = ("scale", "zero_point", "tensor_scale") if by_row else ("tensor_scale",)
    return {name: part for name, part in q.parts().items() if name in names}


@implements(aten.set_.source_Tensor)
def _set(func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args
    if not isinstance(target, QTensor) or not isinstance(source, QTensor):
        kinds = f"{type(target).__name__} to {type(source).__name__}"
        raise TypeError(f"set_ makes two quantized tensors share a buffer, got {kinds}; quantize or dequantize first")
    target.data = source
    return target


# ----------------------------------------------------------------------------------------------------- fresh tensors


@implements(aten.empty_like.default, aten.new_empty.default)
def _empty(func: Any, args: Any, kwargs: Any) -> Any:
    q, shape = args[0], tuple(args[1] if func is aten.new_empty.default else args[0].shape)
    dtype = kwargs.get("dtype") or q.dtype
    if dtype not in ops.FLOATS or not _holds(q, shape):
        return NotImplemented
    return _fresh(q, shape, dtype, device=kwargs.get("device"), pin_memory=kwargs.get("pin_memory"))


@implements(aten.new_zeros.default, aten.zeros_like.default)
def _zeros(func: Any, args: Any, kwargs: Any) -> Any:
    """Zeros with the scales of the whole tensor that `q` has, so that rows of `q` can be copied into them as they are
    (fully_shard pads shards so)."""
    q = args[0]
    shape = tuple(args[1]) if func is aten.new_zeros.default else tuple(q.shape)
    zeros = torch.zeros((), dtype=kwargs.get("dtype") or q.dtype, device=kwargs.get("device") or q.device).expand(shape)
    if not _holds(q, shape) or zeros.dtype not in ops.FLOATS:
        return zeros.clone()  # nothing this format can hold
    names = ("scale", "zero_point", "tensor_scale") if q.format.group[0] == -1 else ("tensor_scale",)
    stored = q.format.storage(shape)
    shared = {n: p.to(zeros.device).reshape(stored[n][0]) for n, p in q.parts().items() if n in names and q.numel()}
    return quantize(zeros, q.format, **shared)


def _holds(q: QTensor, shape: Shape) -> bool:
    return len(shape) >= (2 if q.format.group[0] > 1 else 1)


@implements(aten.constant_pad_nd.default)
def _pad(func: Any, args: Any, kwargs: Any) -> Any:
    """Zeros behind the last group of one axis, as DTensor makes shards even."""
    q, pad = args[0], list(args[1])
    value = args[2] if len(args) > 2 else kwargs.get("value", 0)
    places = [i for i, n in enumerate(pad) if n]
    if value != 0 or len(places) != 1 or places[0] % 2 == 0 or pad[places[0]] < 0:
        return NotImplemented
    dim, shape = q.ndim - 1 - places[0] // 2, [*q.shape]
    shape[dim] += pad[places[0]]
    out = aten.new_zeros.default(q, shape)
    target = _window(out, dim, 0, q.shape[dim], owned=True)
    if target is None:
        return _refused(q, dim, [q.shape[dim], pad[places[0]]])
    for name, part in q.parts().items():
        target.parts()[name].copy_(part)
    return out


@implements(aten.cat.default)
def _cat(func: Any, args: Any, kwargs: Any) -> Any:
    pieces = list(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = pieces[0]
    like = isinstance(first, QTensor) and _valid(dim, first.ndim)
    if not like or not all(isinstance(p, QTensor) and _joins(first, p, dim % first.ndim) for p in pieces):
        return NotImplemented
    dim, shape = dim % first.ndim, [*first.shape]
    sizes = [piece.shape[dim] for piece in pieces]
    shape[dim] = sum(sizes)
    out, start = _fresh(first, tuple(shape)), 0
    for piece, size in zip(pieces, sizes, strict=True):
        target = _window(out, dim, start, start + size)
        kept = [] if target is None else [n for n in piece.parts() if _axis(first, dim, n) is None]
        if target is None or not all(_equal(piece.parts()[n], first.parts()[n]) for n in kept):
            return _refused(first, dim, sizes)
        for name, part in piece.parts().items():
            target.parts()[name].copy_(part)
        start += size
    return out


def _joins(first: QTensor, piece: QTensor, dim: int) -> bool:
    kind = (first.format, first.dtype, first.device, first.ndim)
    others = [n for d, n in enumerate(first.shape) if d != dim]
    return kind == (piece.format, piece.dtype, piece.device, piece.ndim) and others == [
        n for d, n in enumerate(piece.shape) if d != dim
    ]


# ----------------------------------------------------------------------------------------------------- memory, streams


@implements(aten.is_pinned.default)
def _is_pinned(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0]._buf.is_pinned()


@implements(aten._pin_memory.default)
def _pin_memory(func: Any, args: Any, kwargs: Any) -> Any:
    q = args[0]._compacted()  # not all of the buffer that it may be a window of
    return _same(q, q._buf.pin_memory())


@implements(aten.record_stream.default)
def _record_stream(func: Any, args: Any, kwargs: Any) -> Any:
    args[0]._buf.record_stream(args[1])


# --------------------------------------------------------------------------------------------------------------- views


@implements(aten.view.default, aten._unsafe_view.default)
def _view(func: Any, args: Any, kwargs: Any) -> Any:
    if list(args[1]) == [-1] and _sharding(
        "torch.distributed.fsdp._fully_shard"
    ):  # fully_shard keeps it to recognize the storage
        return args[0]._buf.detach()
    if _sharding("torch.distributed.utils"):  # flattens what ranks have, sends it and copies it back
        raise RuntimeError(
            f"DistributedDataParallel would send quantized parameters ({args[0].format.name}) dequantized, and "
            "quantize them again; load the same weights on every rank and pass init_sync=False, or use fully_shard"
        )
    return _viewed(args[0], torch.empty(args[0].shape, device="meta").view(args[1]).shape)


@implements(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default)
def _reshape(func: Any, args: Any, kwargs: Any) -> Any:
    q, *rest = args
    shape = func(torch.empty(q.shape, device="meta"), *rest, **kwargs).shape
    return _viewed(q, shape) if shape.numel() == q.numel() else NotImplemented


def _viewed(q: QTensor, shape: torch.Size) -> Any:
    """q in another shape, where groups stay what they are; the parts are views."""
    fmt, new = q.format, tuple(shape)
    if new == tuple(q.shape) and q.numel():
        return _same(q, q._buf)
    if not q.numel() or not _holds(q, new):
        return NotImplemented
    if not _whole_groups(q, new):
        return _refused_view(q, new)
    stored, segments = fmt.storage(new), []
    try:
        for name, part in q.parts().items():
            segments.append(_segment(q, name, part.view(stored[name][0])))
    except RuntimeError:  # windows whose rows do not follow each other
        return _refused_view(q, new)
    return QTensor._wrap(q._buf, Layout(fmt, new, tuple(segments), q._layout.nbytes), q.dtype)


def _whole_groups(q: QTensor, shape: Shape) -> bool:
    """Whether each group of q is a group of that shape."""
    rows, columns = q.format.group
    unit = 1 if rows == -1 else q.format.super_group or columns
    if shape[-1] != q.shape[-1]:
        return rows < 2 and unit != -1 and not any(n % unit or n * q.format.bits % 8 for n in (shape[-1], q.shape[-1]))
    return rows < 2 or shape[-2] == q.shape[-2] or not (shape[-2] % rows or q.shape[-2] % rows)


def _refused_view(q: QTensor, shape: Shape) -> Any:
    if not _sharding():
        return NotImplemented
    raise ValueError(
        f"a {q.format.name} tensor of shape {tuple(q.shape)} seen in shape {shape} has other groups, and would be "
        "communicated dequantized; take another axis or number of ranks"
    )


def _valid(index: int, size: int) -> bool:
    """Whether an index is in range; where it is not, the dense tensor raises torch's own error."""
    return -size <= index < size


def _axis(q: QTensor, dim: int, name: str) -> int | None:
    """How many elements along `dim` share one entry of the part `name` there; None where the part does not extend
    along it."""
    rows, cols = q.format.group
    if name == "tensor_scale" or (rows == -1 and name != "qdata"):
        return None
    from_end = dim - q.ndim
    if from_end == -1:
        if name == "qdata":
            return 0  # bytes, not elements
        if q.format.super_group:
            return q.format.super_group if name.startswith("super_") else cols
        return None if cols == -1 else cols
    return rows if from_end == -2 and name != "qdata" else 1


def _window(q: QTensor, dim: int, start: int, stop: int, owned: bool = False) -> QTensor | None:
    """q[start:stop] along `dim` as a view of the same buffer, or None where it would cut through a group or a byte.
    Where what follows is padding, which nobody else owns, it may end inside of one: a shorter group."""
    size, fmt = q.shape[dim], q.format
    segments, shape = [], [*q.shape]
    shape[dim] = stop - start
    if q.ndim == 1 and fmt.group == (1, -1) and stop - start != size:
        return None  # nothing would tell it from a whole row, with a scale of its own
    for name, part in q.parts().items():
        per = _axis(q, dim, name)
        if per is None:
            sliced = part
        elif per == 0:
            if start * fmt.bits % 8 or (stop * fmt.bits % 8 and stop != size and not owned):
                return None
            sliced = part.narrow(dim, start * fmt.bits // 8, fmt.row_bytes(stop) - start * fmt.bits // 8)
        else:
            if start % per or (stop % per and stop != size and not owned):
                return None
            sliced = part.narrow(dim, start // per, -(-stop // per) - start // per)
        segments.append(_segment(q, name, sliced))
    return QTensor._wrap(q._buf, Layout(fmt, tuple(shape), tuple(segments), q._layout.nbytes), q.dtype)


def _segment(q: QTensor, name: str, part: Tensor) -> Segment:
    offset = int(part.storage_offset()) * part.dtype.itemsize - int(q._buf.storage_offset())
    return name, offset, tuple(part.shape), tuple(part.stride()), part.dtype


SHARDING = (
    "torch.distributed.fsdp._fully_shard", "torch.distributed.tensor.placement_types",
    "torch.distributed.tensor._collective_utils", "torch.distributed._functional_collectives",
    "torch.distributed.checkpoint", "torch.distributed._shard",
)  # fmt: skip


def _sharding(libraries: str | tuple[str, ...] = SHARDING) -> bool:
    """Whether a library that shards tensors asks. What it cuts it owns, sends and keeps, so a dequantized copy would
    cost the memory and the bandwidth that quantization saved, without a word; to anybody else it is a value."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(libraries):
            return True
        between = module.partition(".")[0] in ("torch", "tritonq") or frame.f_code.co_name.startswith("__torch_")
        if not between:  # modes may look on
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _refused(q: QTensor, dim: int, sizes: list[int]) -> Any:
    """NotImplemented, which dequantizes; an error where that would make dense shards."""
    if not _sharding():
        return NotImplemented
    whole = [per for name in q.parts() if (per := _axis(q, dim, name))]
    packed = 8 // math.gcd(8, q.format.bits) if dim == q.ndim - 1 else 1
    unit = q.shape[0] if q.ndim == 1 and q.format.group == (1, -1) else math.lcm(packed, *whole)
    raise ValueError(
        f"shards of {sizes} along axis {dim} cut a {q.format.name} tensor of shape {tuple(q.shape)} through its "
        f"groups; all but the last have to be multiples of {unit}: take another number of ranks or another axis, or "
        "quantize with smaller groups"
    )


@implements(aten.slice.Tensor)
def _slice(func: Any, args: Any, kwargs: Any) -> Any:
    q: QTensor = args[0]
    dim, start, stop, step = (list(args[1:]) + [None] * 4)[:4]
    if (step or 1) != 1 or not _valid(dim or 0, q.ndim):
        return NotImplemented
    dim = (dim or 0) % q.ndim
    first, last, _ = slice(start, stop).indices(q.shape[dim])
    last = max(first, last)
    window = _window(q, dim, first, last, owned=_sharding())
    if window is None:
        return _refused(q, dim, [first, last - first, q.shape[dim] - last])
    if _sharding():
        window._cut_from = tuple(q.shape)
    return window


@implements(aten.as_strided.default)
def _as_strided(func: Any, args: Any, kwargs: Any) -> Any:
    """The first rows: how fully_shard drops padding."""
    q, size, stride = args[0], tuple(args[1]), tuple(args[2])
    offset = args[3] if len(args) > 3 else kwargs.get("storage_offset")
    rows = bool(size) and size[1:] == tuple(q.shape[1:]) and size[0] <= q.shape[0]
    if offset or not rows or stride != contiguous_strides(size):
        return NotImplemented
    window = _window(q, 0, 0, size[0], owned=_sharding())
    return _refused(q, 0, [size[0]]) if window is None else window


@implements(
    aten.split.Tensor, aten.split_with_sizes.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default
)
def _split(func: Any, args: Any, kwargs: Any) -> Any:
    q, sizes = args[0], args[1]
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    if not _valid(dim, q.ndim):
        return NotImplemented
    dim, total = dim % q.ndim, q.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - i) for i in range(0, max(total, 1), sizes)] if sizes > 0 else [-1]
    if sum(sizes) != total or min(sizes, default=0) < 0:
        return NotImplemented
    pieces, start = [], 0
    for size in sizes:
        pieces.append(_window(q, dim, start, start + size))
        start += size
    if dim and len(sizes) > 1 and _sharding("torch.distributed.fsdp"):
        raise ValueError(
            f"fully_shard joins shards of axis {dim} value by value, and this {q.format.name} tensor of shape "
            f"{tuple(q.shape)} is stored in groups: take Shard(0), its default"
        )
    return _refused(q, dim, list(sizes)) if any(piece is None for piece in pieces) else pieces


@implements(aten.select.int)
def _select(func: Any, args: Any, kwargs: Any) -> Any:
    q, dim, index = args
    if not _valid(dim, q.ndim) or not _valid(index, q.shape[dim]):
        return NotImplemented
    dim, index = dim % q.ndim, index % q.shape[dim]
    inner = 2 if q.format.group[0] > 1 else 1
    if dim >= q.ndim - inner or q.ndim - 1 < inner:
        return NotImplemented  # the axes that groups run along
    if q.ndim == 2 and q.format.group[1] == -1 and _ends_inside_rows(q):
        return NotImplemented
    segments = []
    for name, part in q.parts().items():
        sliced = part if _axis(q, dim, name) is None else part.select(dim, index)
        segments.append(_segment(q, name, sliced))
    shape = tuple(n for d, n in enumerate(q.shape) if d != dim)
    return QTensor._wrap(q._buf, Layout(q.format, shape, tuple(segments), q._layout.nbytes), q.dtype)


@implements(aten.unbind.int)
def _unbind(func: Any, args: Any, kwargs: Any) -> Any:
    q, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not _valid(dim, q.ndim):
        return NotImplemented
    pieces = [_select(None, (q, dim, i), {}) for i in range(q.shape[dim])]
    return NotImplemented if any(piece is NotImplemented for piece in pieces) else pieces
