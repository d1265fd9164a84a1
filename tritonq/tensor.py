"""QTensor: a quantized tensor that behaves like the tensor it stands for.

All parts lie in one byte buffer, `_buf`; a `Layout` says where. Parts are views made on demand, so that moving a
QTensor is moving one buffer, no view can lose its dtype, and no live view keeps an old buffer.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tritonq import autograd, ops, scheduler
from tritonq.formats import Format, Shape, get_format
from tritonq.memory import empty
from tritonq.reference import Parts
from tritonq.tiling import contiguous_strides

aten = torch.ops.aten
P = ParamSpec("P")
R = TypeVar("R")

Segment = tuple[str, int, Shape, Shape, torch.dtype]  # name, byte offset, shape, stride, dtype


@dataclass(frozen=True)
class Layout:
    """Where the parts of a quantized tensor of `shape` lie in its buffer of `nbytes` bytes."""

    format: Format
    shape: Shape
    segments: tuple[Segment, ...]
    nbytes: int

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def of(fmt: Format, shape: Shape) -> Layout:
        """The layout of a fresh tensor: parts one after the other, codes aligned to 256 bytes and scales to 16."""
        segments, end = [], 0
        for name, (part, dtype) in fmt.storage(shape).items():
            alignment = 256 if name == "qdata" else 16
            start = -(-end // alignment) * alignment
            segments.append((name, start, part, contiguous_strides(part), dtype))
            end = start + math.prod(part) * dtype.itemsize
        return Layout(fmt, shape, tuple(segments), end)

    def part(self, buf: Tensor, segment: Segment) -> Tensor:
        _, offset, shape, stride, dtype = segment
        extent = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1 if math.prod(shape) else 0
        return buf[offset : offset + extent * dtype.itemsize].view(dtype).as_strided(shape, stride)


def _outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """As torch.compiler.disable, which would import the compiler: where that is not imported, nobody traces."""
    reason = f"{function.__qualname__} makes a QTensor, outside of graphs; tritonq.qdq and tritonq.ops can be traced"
    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function, reason=reason))
        return disabled[0](*args, **kwargs)

    call.__dict__.update(_torchdynamo_disable=True, _torchdynamo_disable_msg=reason)  # what the compiler looks for
    return call


class QTensor(Tensor):
    """A tensor stored in a `Format`. `shape` and `dtype` are those it dequantizes to.

    Made by `tritonq.quantize`. Moving, cloning, saving, slicing along whole groups and copying keep it quantized;
    arithmetic dequantizes; writing into it in any other way than `copy_` is an error, because the write would be lost.
    """

    _buf: Tensor
    _layout: Layout

    @staticmethod
    def __new__(
        cls, source: Any, layout: Layout | None = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> QTensor:
        """QTensor(buffer, layout, dtype), or QTensor(existing, requires_grad=...), an alias (accelerate's
        constructor)."""
        requires_grad = kwargs.get("requires_grad", False)
        if isinstance(source, QTensor):
            alias = cls._wrap(source._buf, source._layout, source.dtype)
            alias.requires_grad_(requires_grad)
            if kwargs.get("_is_param"):  # accelerate's init_empty_weights passes on what it finds in a parameter's dict
                alias._is_param = True  # type: ignore[attr-defined]
            return alias
        if layout is None or dtype is None:
            raise TypeError(
                "QTensor takes an existing QTensor, or a buffer with its layout and dtype; see tritonq.quantize"
            )
        tensor = cls._wrap(source, layout, dtype)
        tensor.requires_grad_(requires_grad)
        return tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    @_outside_graphs
    def _wrap(cls, buf: Tensor, layout: Layout, dtype: torch.dtype) -> QTensor:
        if torch.is_inference_mode_enabled() and not buf.is_inference():
            with torch.inference_mode(False):  # a view of a normal tensor stays one
                return cls._wrap(buf, layout, dtype)
        self = Tensor._make_wrapper_subclass(
            cls,
            layout.shape,
            strides=contiguous_strides(layout.shape),
            dtype=dtype,
            device=buf.device,
            requires_grad=False,
        )
        self._buf, self._layout = buf, layout
        return self

    # ------------------------------------------------------------------------------------------------- parts

    @property
    def format(self) -> Format:
        return self._layout.format

    def parts(self) -> Parts:
        """Views of the parts by name, shaped as `format.storage(shape)` says."""
        return {segment[0]: self._layout.part(self._buf, segment) for segment in self._layout.segments}

    def _part(self, name: str) -> Tensor | None:
        for segment in self._layout.segments:
            if segment[0] == name:
                return self._layout.part(self._buf, segment)
        return None

    @property
    def qdata(self) -> Tensor:
        """Codes, packed uint8 [..., ceil(K * bits / 8)], or the torch dtype itself for 8-bit floats and symmetric
        int8."""
        part = self._part("qdata")
        assert part is not None
        return part

    @property
    def scale(self) -> Tensor:
        part = self._part("scale")
        assert part is not None
        return part

    @property
    def zero_point(self) -> Tensor | None:
        return self._part("zero_point")

    @property
    def tensor_scale(self) -> Tensor | None:
        """The tensor-wide divisor of two-level formats, fp32 [1]."""
        return self._part("tensor_scale")

    @property
    def group_minimum(self) -> Tensor | None:
        """Integer minima [..., ceil(K/g)] of asymmetric formats with super-groups, in units of `super_minimum`."""
        return self._part("group_minimum")

    @property
    def super_scale(self) -> Tensor | None:
        """What the integer `scale` counts in formats with super-groups, f16 [..., ceil(K/super_group)]."""
        return self._part("super_scale")

    @property
    def super_minimum(self) -> Tensor | None:
        """What `group_minimum` counts, f16 [..., ceil(K/super_group)]."""
        return self._part("super_minimum")

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """Dense contiguous tensor of `dtype` (default: this tensor's): (code - zero_point) * scale in fp32 (with
        super-groups: `codecs/scale.py`), rounded once."""
        parts = {name: part.contiguous() for name, part in self.parts().items()}
        return ops.dequantize(parts, self.format, tuple(self.shape), dtype or self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        grad = ", requires_grad=True" if self.requires_grad else ""
        about = f"format={self.format.name}, dtype={self.dtype}, device={self.device}{grad}"
        return f"QTensor(shape={tuple(self.shape)}, {about})"

    # ----------------------------------------------------------------------------------- identity and storage

    @property
    def data(self) -> QTensor:  # type: ignore[override]
        """A new alias of this tensor, as of any tensor; assigning moves the parameter to what is assigned."""
        return QTensor._wrap(self._buf, self._layout, self.dtype)

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, QTensor):
            raise TypeError(
                f"the data of a QTensor is a QTensor, got {type(value).__name__}; quantize it to {self.format.name}"
            )
        wrapper = QTensor._wrap(value._buf, value._layout, value.dtype)
        torch._C.TensorBase.data.__set__(self, wrapper)  # type: ignore[attr-defined]
        self._buf, self._layout = value._buf, value._layout

    def data_ptr(self) -> int:
        """Pointer of the codes: a wrapper's own is 0, which tools take for a sign of tied tensors."""
        return self.qdata.data_ptr()

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Layout, torch.dtype]]:
        return ["_buf"], (self._layout, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, outer_size: Any, outer_stride: Any) -> QTensor:
        layout, dtype = meta
        return QTensor._wrap(inner["_buf"], layout, dtype)

    def _is_parameter(self) -> bool:
        return bool(getattr(self, "_is_param", False))

    def __deepcopy__(self, memo: dict[int, Any]) -> QTensor:
        if id(self) in memo:
            return memo[id(self)]
        copy = QTensor._wrap(self._buf.clone(), self._layout, self.dtype)
        copy.requires_grad_(self.requires_grad)
        if self._is_parameter():
            copy._is_param = True  # type: ignore[attr-defined]
        memo[id(self)] = copy
        return copy

    def _description(self) -> tuple[Any, ...]:
        layout = self._layout
        try:
            known = get_format(layout.format.name) == layout.format
        except ValueError:
            known = False
        if not known:  # saved by name, so it would come back as another format or not at all
            raise ValueError(
                f"the name {layout.format.name!r} does not mean this tensor's format; give the format a name of its "
                "own and pass it to tritonq.register before saving, and before loading"
            )
        return layout.format.name, tuple(layout.shape), layout.segments, layout.nbytes, self.dtype

    def __reduce_ex__(self, protocol: Any) -> Any:
        buf = self._buf if self._buf.untyped_storage().nbytes() <= self._layout.nbytes + 256 else self._buf.clone()
        return _rebuild, (buf, self._description(), self.requires_grad, self._is_parameter())

    def share_memory_(self) -> QTensor:
        """Move the buffer to shared memory; a wrapper's own storage is a null pointer."""
        self._buf.share_memory_()
        return self

    def is_shared(self) -> bool:
        return self._buf.is_shared()

    # ------------------------------------------------------------------------------------------------ dispatch

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            x = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            trained = torch.is_grad_enabled() and isinstance(weight, QTensor) and weight.requires_grad
            if isinstance(weight, QTensor) and not isinstance(x, QTensor) and weight.ndim == 2 and not trained:
                parts = {name: part.contiguous() for name, part in weight.parts().items()}
                return autograd.linear(x, parts, weight.format, tuple(weight.shape), bias)
        if func is Tensor.__setitem__ and isinstance(args[0], QTensor):
            return _set_item(*args)
        with torch._C.DisableTorchFunctionSubclass():  # a dense result is a plain tensor
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(func, args, kwargs)
            if result is not NotImplemented:
                return result
        result = func.decompose(*args, **kwargs)  # inference mode hands composite operations over whole
        if result is not NotImplemented:
            return result
        _refuse_lost_writes(func, args, kwargs)
        if torch.is_inference_mode_enabled() and any(r.alias_info is not None for r in func._schema.returns):
            # A view of a tensor from outside the mode has to be one, too, also where it is a dense copy.
            with torch.inference_mode(False), torch.no_grad():
                return _dense(func, args, kwargs)
        return _dense(func, args, kwargs)


def _dense(func: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = pytree.tree_map_only(QTensor, QTensor.dequantize, (args, kwargs))
    return func(*args, **kwargs)


def _refuse_lost_writes(func: Any, args: Any, kwargs: Any) -> None:
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if argument.name in kwargs else args[index] if index < len(args) else None
            for written in value if isinstance(value, list | tuple) else (value,):  # torch._foreach_ takes lists
                if isinstance(written, QTensor):
                    raise RuntimeError(
                        f"{func} would write into a quantized tensor ({written.format.name}); dequantize it, change "
                        "the result and write it back with copy_, which quantizes"
                    )


def _set_item(q: QTensor, index: Any, value: Any) -> None:
    """q[index] = value where q[index] is a view; a dense copy would swallow the write."""
    target = q[index]
    if not isinstance(target, QTensor):
        raise RuntimeError(
            f"an assignment through this index would write into a part of a group of a quantized tensor "
            f"({q.format.name}); assign whole groups, or dequantize it, change the result and write it back with copy_"
        )
    source = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=q.dtype, device=q.device)
    target.copy_(source if source.shape == target.shape else source.expand(target.shape))


def _rebuild(buf: Tensor, description: tuple[Any, ...], requires_grad: bool, is_parameter: bool) -> QTensor:
    """Inverse of `QTensor.__reduce_ex__`; the format comes back by its name."""
    name, shape, segments, nbytes, dtype = description
    kept = tuple((part, offset, tuple(size), tuple(stride), kind) for part, offset, size, stride, kind in segments)
    layout = Layout(get_format(name), tuple(shape), kept, nbytes)
    tensor = QTensor._wrap(buf, layout, dtype)
    tensor.requires_grad_(requires_grad)
    if is_parameter:
        tensor._is_param = True  # type: ignore[attr-defined]
    return tensor


_HANDLERS: dict[Any, Callable[..., Any]] = {}


def _implements(*operations: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        _HANDLERS.update(dict.fromkeys(operations, handler))
        return handler

    return register


def _same(q: QTensor, buf: Tensor, dtype: torch.dtype | None = None) -> QTensor:
    return QTensor._wrap(buf, q._layout, dtype or q.dtype)


def _fresh(q: QTensor) -> QTensor:
    """Uninitialised, of the same format and shape."""
    layout = Layout.of(q.format, tuple(q.shape))
    return QTensor._wrap(torch.empty(layout.nbytes, dtype=torch.uint8, device=q.device), layout, q.dtype)


@_implements(aten.detach.default, aten.alias.default)
def _alias(func: Any, args: Any, kwargs: Any) -> Any:
    return _same(args[0], args[0]._buf)


def _compact(q: QTensor) -> bool:
    return q._layout == Layout.of(q.format, tuple(q.shape)) and q._buf.numel() == q._layout.nbytes


@_implements(aten.clone.default)
def _clone(func: Any, args: Any, kwargs: Any) -> Any:
    q = args[0]
    if _compact(q):
        return _same(q, q._buf.clone())
    out = _fresh(q)
    for name, part in q.parts().items():
        out.parts()[name].copy_(part)
    return out


@_implements(aten._to_copy.default)
def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    q = args[0]
    dtype, device = kwargs.get("dtype") or q.dtype, kwargs.get("device") or q.device
    if not dtype.is_floating_point or dtype.itemsize == 1:
        return NotImplemented
    q = q if _compact(q) else q.clone()
    buf = q._buf.to(device, non_blocking=kwargs.get("non_blocking", False), copy=True)
    if kwargs.get("pin_memory"):
        buf = buf.pin_memory()
    return _same(q, buf, dtype)


@_implements(aten.copy_.default)
def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[0], args[1]
    if not isinstance(target, QTensor):
        return target.copy_(source.dequantize().to(target.dtype))
    if tuple(target.shape) != tuple(source.shape):
        raise RuntimeError(f"copy_ into a QTensor of shape {tuple(target.shape)} from shape {tuple(source.shape)}")
    kept: dict[str, Any] = _shared_parts(target)
    if isinstance(source, QTensor) and source.format == target.format and not kept:
        for (_, part), new in zip(target.parts().items(), source.parts().values(), strict=True):
            part.copy_(new)
        return target
    dense = source.dequantize(torch.float32) if isinstance(source, QTensor) else source
    for name, part in ops.quantize(dense.detach().to(target.device), target.format, **kept).items():
        target.parts()[name].copy_(part)
    return target


def _shared_parts(q: QTensor) -> Parts:
    """Parts that a window has in common with the rest of its tensor, which a write into the window must not change."""
    if _compact(q):
        return {}
    names = ("scale", "zero_point", "tensor_scale") if q.format.group[0] == -1 else ("tensor_scale",)
    return {name: part for name, part in q.parts().items() if name in names}


@_implements(aten.empty_like.default)
def _empty_like(func: Any, args: Any, kwargs: Any) -> Any:
    q = args[0]
    if not (kwargs.get("dtype") or q.dtype).is_floating_point:
        return NotImplemented
    layout = Layout.of(q.format, tuple(q.shape))
    buf = torch.empty(
        layout.nbytes,
        dtype=torch.uint8,
        device=kwargs.get("device") or q.device,
        pin_memory=kwargs.get("pin_memory") or False,
    )
    return QTensor._wrap(buf, layout, kwargs.get("dtype") or q.dtype)


@_implements(aten.new_zeros.default, aten.zeros_like.default)
def _zeros(func: Any, args: Any, kwargs: Any) -> Any:
    q = args[0]
    shape = tuple(args[1]) if func is aten.new_zeros.default else tuple(q.shape)
    zeros = torch.zeros((), dtype=kwargs.get("dtype") or q.dtype, device=kwargs.get("device") or q.device).expand(shape)
    if len(shape) < (2 if q.format.group[0] > 1 else 1) or zeros.dtype not in ops.FLOATS:
        return zeros.clone()  # nothing this format can hold
    return quantize(zeros, q.format)


@_implements(aten.is_pinned.default)
def _is_pinned(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0]._buf.is_pinned()


@_implements(aten._pin_memory.default)
def _pin_memory(func: Any, args: Any, kwargs: Any) -> Any:
    return _same(args[0], args[0]._buf.pin_memory())


@_implements(aten.record_stream.default)
def _record_stream(func: Any, args: Any, kwargs: Any) -> Any:
    args[0]._buf.record_stream(args[1])


@_implements(aten.view.default, aten._unsafe_view.default)
def _view(func: Any, args: Any, kwargs: Any) -> Any:
    q, shape = args[0], tuple(args[1])
    whole = tuple(q.shape)
    given = len(shape) == len(whole) and all(n in (-1, m) for n, m in zip(shape, whole, strict=True))
    return _alias(func, args, kwargs) if given and shape.count(-1) < 2 and q.numel() else NotImplemented


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


def _window(q: QTensor, dim: int, start: int, stop: int) -> QTensor | None:
    """q[start:stop] along `dim` as a view of the same buffer, or None where it would cut through a group or a byte."""
    size, fmt = q.shape[dim], q.format
    segments, shape = [], [*q.shape]
    shape[dim] = stop - start
    if dim == q.ndim - 1 and (fmt.group[1] == -1 or fmt.group[0] == -1):
        return None  # a different row or tensor would have another scale; dequantize
    for name, part in q.parts().items():
        per = _axis(q, dim, name)
        if per is None:
            sliced = part
        elif per == 0:
            if start * fmt.bits % 8 or (stop * fmt.bits % 8 and stop != size):
                return None
            sliced = part.narrow(dim, start * fmt.bits // 8, fmt.row_bytes(stop) - start * fmt.bits // 8)
        else:
            if start % per or (stop % per and stop != size):
                return None
            sliced = part.narrow(dim, start // per, -(-stop // per) - start // per)
        segments.append(_segment(q, name, sliced))
    return QTensor._wrap(q._buf, Layout(fmt, tuple(shape), tuple(segments), q._layout.nbytes), q.dtype)


def _segment(q: QTensor, name: str, part: Tensor) -> Segment:
    offset = int(part.storage_offset()) * part.dtype.itemsize - int(q._buf.storage_offset())
    return name, offset, tuple(part.shape), tuple(part.stride()), part.dtype


@_implements(aten.slice.Tensor)
def _slice(func: Any, args: Any, kwargs: Any) -> Any:
    q: QTensor = args[0]
    dim, start, stop, step = (list(args[1:]) + [None] * 4)[:4]
    if (step or 1) != 1 or not _valid(dim or 0, q.ndim):
        return NotImplemented
    dim = (dim or 0) % q.ndim
    first, last, _ = slice(start, stop).indices(q.shape[dim])
    window = _window(q, dim, first, max(first, last))
    return NotImplemented if window is None else window


@_implements(aten.split.Tensor, aten.split_with_sizes.default)
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
    return NotImplemented if any(piece is None for piece in pieces) else pieces


@_implements(aten.select.int)
def _select(func: Any, args: Any, kwargs: Any) -> Any:
    q, dim, index = args
    if not _valid(dim, q.ndim) or not _valid(index, q.shape[dim]):
        return NotImplemented
    dim, index = dim % q.ndim, index % q.shape[dim]
    inner = 2 if q.format.group[0] > 1 else 1
    if dim >= q.ndim - inner or q.ndim - 1 < inner:
        return NotImplemented  # the axes that groups run along
    segments = []
    for name, part in q.parts().items():
        sliced = part if _axis(q, dim, name) is None else part.select(dim, index)
        segments.append(_segment(q, name, sliced))
    shape = tuple(n for d, n in enumerate(q.shape) if d != dim)
    return QTensor._wrap(q._buf, Layout(q.format, shape, tuple(segments), q._layout.nbytes), q.dtype)


@_implements(aten.unbind.int)
def _unbind(func: Any, args: Any, kwargs: Any) -> Any:
    q, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not _valid(dim, q.ndim):
        return NotImplemented
    pieces = [_select(None, (q, dim, i), {}) for i in range(q.shape[dim])]
    return NotImplemented if any(piece is NotImplemented for piece in pieces) else pieces


# ---------------------------------------------------------------------------------------------------- public functions


@_outside_graphs
def quantize(
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
    v: Tensor | None = None,
    min_scale: Tensor | None = None,
    max_scale: Tensor | None = None,
    device: scheduler.Devices | None = None,
    output_device: torch.device | str | None = None,
    out: QTensor | None = None,
    progress: scheduler.Progress | bool | None = None,
) -> QTensor:
    """Quantize a tensor.

    Args:
        x: floating tensor [..., K] of >= 1 dimension, any strides, any size. Groups run along the last axis, blocks
            along the last two; a last group that is not full is a shorter group. Also a slice of a safetensors file,
            `safe_open(...).get_slice(name)`.
        fmt: a Format or its name, such as "int4_g128", "mxfp4", "nvfp4", "fp8_e4m3_b128x128", "e3m4_g48".
        scale, zero_point, tensor_scale: used verbatim instead of being computed; shapes and dtypes as
            `fmt.storage(x.shape)`.
        rounding: "nearest", half to even; or "stochastic": x / scale goes to one of the two codes beside it, to the
            upper one with the probability (x / scale - lower) / (upper - lower), which makes codes unbiased. The random
            number of an element follows from a seed and its index alone (`tritonq.codecs.philox`), so results do not
            depend on strides or devices. It has 24 bits: probabilities are too large by less than 2^-24 (tables: off by
            at most 2^-22).
        generator: of any device, or None for torch's own for the CPU, which `torch.manual_seed` sets: stochastic
            rounding draws one int64 from it, the seed. Others than those of the CPU are waited for. In a CUDA graph the
            seed is that of the capture.
        search: "mse" takes for each group the scale (and zero point) with the smallest squared error instead of the
            one of the format's rule; see `tritonq.codecs.search` for the candidates. None and False: the rule. The
            error is that of rounding to nearest, whatever `rounding` is.
        importance: weights [K] >= 0 of the columns in that error, such as mean squared activations.
        v, min_scale, max_scale: tuning parameters as `tritonq.qdq` takes them; the result dequantizes to what that
            gives for them, bit for bit. They lie where x does, which then has to be computed on.
        device: where to compute; default x's device. A tensor that lies elsewhere, in host memory of any kind or mapped
            from a file, passes through the device in tiles, so that besides the result no more than the budget of
            `tritonq.workspace` is taken there. Several devices share the tensor. The bytes are always the same.
        output_device: where to leave the result; default `device`, or the first of several.
        out: a QTensor of this format and x's shape and dtype, which receives the result where it lies and is returned.
        progress: called as progress(done, total) with elements as tiles are started, for a tensor that passes through
            a device; formats that go over it twice count it twice. True shows a bar on a terminal.

    Returns:
        A QTensor of x's shape and dtype.

    Raises:
        ValueError: unknown format or rounding, a shape it cannot group, parts, importance or out that do not fit.
        TypeError: x is not floating. torch.OutOfMemoryError: not even the smallest tile, a row of groups, fits the
            device, or the result does not.
    """
    fmt, x = get_format(fmt), scheduler.source(x)
    ops.check_input(x, fmt)
    x = x.detach()
    where = scheduler.placed(x, device, output_device, out)
    learned: dict[str, Any] = {"v": v, "min_scale": min_scale, "max_scale": max_scale}
    if where is not None and any(t is not None for t in learned.values()):
        raise ValueError("v, min_scale and max_scale go with a tensor that is computed where it lies; move them first")
    target = x.device if where is None else where[1]
    result = (
        _checked_out(out, x, fmt, target)
        if out is not None
        else scheduler.allocated(lambda: _fresh_for(x, fmt, target))
    )
    options: dict[str, Any] = {
        "scale": scale, "zero_point": zero_point, "tensor_scale": tensor_scale, "rounding": rounding,
        "generator": generator, "search": search, "importance": importance,
    }  # fmt: skip
    if where is None:
        ops.quantize(x, fmt, **options, **learned, out=result.parts())
    else:
        scheduler.quantize(x, fmt, where[0], result.parts(), **options, progress=progress)
    return result


@_outside_graphs
def quantize_both(
    x: Tensor,
    fmt: Format | str,
    *,
    tensor_scale: Tensor | None = None,
) -> tuple[QTensor, QTensor]:
    """(quantize(x, fmt), quantize(x.mT, fmt)), bit for bit; on a GPU in one launch that reads x once.

    A training step contracts the axes of one tensor in turn, and groups run along the axis that is contracted. Where
    one launch is impossible (a group that is a whole row or tensor, or larger than 128 elements; neighbouring groups
    that share a byte) x is read twice.

    Args:
        x: floating tensor [..., N, K] of >= 2 dimensions, any strides, any size.
        fmt: a Format or its name; see `quantize`.
        tensor_scale: used verbatim for both instead of being computed, fp32 [1].

    Returns:
        QTensors of shapes [..., N, K] and [..., K, N] and of x's dtype.

    Raises:
        ValueError: unknown format, or fewer than two dimensions. TypeError: x is not floating.
    """
    fmt = get_format(fmt)
    ops.check_both(x, fmt)
    x = x.detach()
    results = []
    for shape in (tuple(x.shape), tuple(x.mT.shape)):
        layout = Layout.of(fmt, shape)
        results.append(QTensor._wrap(empty(layout.nbytes, torch.uint8, x.device), layout, x.dtype))
    rows, columns = results
    ops.quantize_both(x, fmt, tensor_scale=tensor_scale, out=(rows.parts(), columns.parts()))
    return rows, columns


def _fresh_for(x: Tensor, fmt: Format, device: torch.device) -> QTensor:
    layout = Layout.of(fmt, tuple(x.shape))
    return QTensor._wrap(empty(layout.nbytes, torch.uint8, device), layout, x.dtype)


def _checked_out(out: QTensor, x: Tensor, fmt: Format, device: torch.device) -> QTensor:
    if not isinstance(out, QTensor):
        raise TypeError(f"out is a QTensor, got {type(out).__name__}; make one with tritonq.quantize")
    wanted = (fmt, tuple(x.shape), x.dtype, device)
    if (out.format, tuple(out.shape), out.dtype, out.device) != wanted:
        raise ValueError(
            f"out has to be a {fmt.name} tensor of shape {tuple(x.shape)}, {x.dtype} on {device}, got "
            f"{out.format.name} of shape {tuple(out.shape)}, {out.dtype} on {out.device}"
        )
    return out


def dequantize(
    q: QTensor,
    dtype: torch.dtype | None = None,
    *,
    device: scheduler.Devices | None = None,
    output_device: torch.device | str | None = None,
    out: Tensor | None = None,
    progress: scheduler.Progress | bool | None = None,
) -> Tensor:
    """Dense tensor of a QTensor; see `QTensor.dequantize`.

    Args:
        dtype: of the result, bfloat16, float16, float32 or float64; default `out`'s, or q's.
        device, output_device, progress: as in `quantize`.
        out: contiguous tensor of q's shape that receives the result where it lies.
    """
    if not isinstance(q, QTensor):
        raise TypeError(f"expected a QTensor, got {type(q).__name__}")
    dtype = dtype or (q.dtype if out is None else out.dtype)
    if dtype not in ops.FLOATS:
        raise TypeError(f"dequantize gives bfloat16, float16, float32 or float64, got {dtype}")
    where = scheduler.placed(q._buf, device, output_device, out)
    if where is None and out is None:
        return q.dequantize(dtype)
    parts = {name: part.contiguous() for name, part in q.parts().items()}
    if where is None:
        return ops.dequantize(parts, q.format, tuple(q.shape), dtype, out=out)
    backends, target = where
    y = scheduler.result(out, tuple(q.shape), dtype, target)
    return scheduler.dequantize(parts, q.format, backends, y, progress=progress)


torch.serialization.add_safe_globals([QTensor, _rebuild])
