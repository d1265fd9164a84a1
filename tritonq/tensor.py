"""QTensor: a quantized tensor that behaves like the tensor it stands for.

All parts lie in one byte buffer, `_buf`; a `Layout` says where. Parts are views made on demand, so that moving a
QTensor is moving one buffer, no view can lose its dtype, and no live view keeps an old buffer.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tritonq import autograd, ops, scheduler
from tritonq.formats import Format, Shape, get_format
from tritonq.layout import Layout
from tritonq.memory import empty
from tritonq.reference import Parts
from tritonq.tiling import contiguous_strides

aten = torch.ops.aten
P = ParamSpec("P")
R = TypeVar("R")


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
    `docs/tensors.md` lists which operation does what.
    """

    _buf: Tensor
    _layout: Layout
    _cut_from: Shape | None = None  # by a sharding library, from a padded tensor of this shape that nobody else sees
    _payload: bool = False  # see `payload_data_`

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
        return self._layout.parts(self._buf)

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

    def _is_compact(self) -> bool:
        """Whether the buffer holds this tensor and nothing else, laid out as `Layout.of` does."""
        layout = self._layout
        return layout == Layout.of(layout.format, layout.shape) and self._buf.numel() == layout.nbytes

    def _compacted(self) -> QTensor:
        """This tensor, or a copy of it in a buffer of its own where it is a window of another."""
        if self._is_compact():
            return self
        copy = self.clone()
        assert isinstance(copy, QTensor)
        return copy

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """Dense contiguous tensor of `dtype` (default: this tensor's): (code - zero_point) * scale in fp32 (with
        super-groups: `codecs/scale.py`), rounded once."""
        return ops.dequantize_buffer(self._buf, self._layout, dtype or self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        grad = ", requires_grad=True" if self.requires_grad else ""
        about = f"format={self.format.name}, dtype={self.dtype}, device={self.device}{grad}"
        return f"QTensor(shape={tuple(self.shape)}, {about})"

    # ----------------------------------------------------------------------------------- identity and storage

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """A new alias of this tensor, as of any tensor; assigning moves the parameter to what is assigned. With
        `payload_data_` both are the bytes, uint8 [nbytes]."""
        if self._payload:
            return self._compacted()._buf.detach()
        return QTensor._wrap(self._buf, self._layout, self.dtype)

    @data.setter
    def data(self, value: Tensor) -> None:
        layout, dtype = self._layout, self.dtype
        if isinstance(value, QTensor):
            buf, layout, dtype = value._buf, value._layout, value.dtype
        elif self._payload:
            buf, layout = value, Layout.of(layout.format, layout.shape)
            if value.dtype is not torch.uint8 or tuple(value.shape) != (layout.nbytes,):
                raise TypeError(
                    f"the bytes of a {layout.format.name} tensor of shape {layout.shape} are uint8 of shape "
                    f"({layout.nbytes},), got {value.dtype} of shape {tuple(value.shape)}"
                )
        else:
            raise TypeError(
                f"the data of a QTensor is a QTensor, got {type(value).__name__} of {value.dtype}; quantize it to "
                f"{layout.format.name}, or see tritonq.payload_data_ to assign bytes"
            )
        wrapper = QTensor._wrap(buf, layout, dtype)
        if buf.is_meta == self._buf.is_meta or self.requires_grad:
            torch._C.TensorBase.data.__set__(self, wrapper)  # type: ignore[attr-defined]
        else:  # refused above, and to plain tensors; frozen parameters have no gradient that this would lose
            torch._C._swap_tensor_impl(self, wrapper)  # type: ignore[attr-defined]
        self._buf, self._layout, self._cut_from = buf, layout, getattr(value, "_cut_from", None)

    def data_ptr(self) -> int:
        """Pointer of the codes: a wrapper's own is 0, which tools take for a sign of tied tensors."""
        caller = sys._getframe(1)
        module = caller.f_globals.get("__name__", "")
        if module == "torch.distributed.checkpoint._state_dict_stager":
            return 0  # asynchronous checkpoints then copy what a wrapper holds, and not its storage
        if module == "safetensors.torch" and caller.f_code.co_name in ("_to_ndarray", "_tobytes"):
            raise RuntimeError(_NO_STORAGE)  # it would read numel() * element_size() bytes from here, beyond the end
        return self.qdata.data_ptr()

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes that the parts take, 4.25 bits an element for int4_g64; `element_size` is that of `dtype`."""
        return sum(math.prod(shape) * dtype.itemsize for _, _, shape, _, dtype in self._layout.segments)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Layout, torch.dtype]]:
        return ["_buf"], (self._layout, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, outer_size: Any, outer_stride: Any) -> QTensor:
        layout, dtype = meta
        return QTensor._wrap(inner["_buf"], layout, dtype)

    def requires_grad_(self, requires_grad: bool = True) -> QTensor:
        """As of any tensor; a weight that is frozen stays so where fully_shard moves it to its device, for which it
        makes a new Parameter with the default."""
        maker = sys._getframe(1)
        mover = maker.f_back if maker.f_globals.get("__name__") == "torch.nn.parameter" else None
        if mover is not None and mover.f_code.co_name == "_move_states_to_device":
            requires_grad = mover.f_locals["tensor"].requires_grad
        super().requires_grad_(requires_grad)
        return self

    def _is_parameter(self) -> bool:
        return bool(getattr(self, "_is_param", False))

    def __deepcopy__(self, memo: dict[int, Any]) -> QTensor:
        if id(self) in memo:
            return memo[id(self)]
        source = self._compacted()
        copy = QTensor._wrap(source._buf.clone() if source is self else source._buf, source._layout, self.dtype)
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
        whole = self._compacted()
        alone = whole._buf.untyped_storage().nbytes() <= whole._layout.nbytes + 256
        buf = whole._buf if alone else whole._buf.clone()
        return _rebuild, (buf, whole._description(), self.requires_grad, self._is_parameter())

    def share_memory_(self) -> QTensor:
        """Move the buffer to shared memory; a wrapper's own storage is a null pointer."""
        self._buf.share_memory_()
        return self

    def is_shared(self) -> bool:
        return self._buf.is_shared()

    # ------------------------------------------------------------------------------------------------ sharding

    def _padded(self) -> QTensor:
        """This shard in a compact buffer with as many rows as every rank's: where rows are uneven, fully_shard keeps
        the first rows of a padded tensor."""
        if self._cut_from is None or self._cut_from[1:] != tuple(self.shape[1:]):
            return self._compacted()
        layout = Layout.of(self.format, self._cut_from)
        placed = [(offset, stride) for _, offset, _, stride, _ in layout.segments]
        if self._layout.nbytes == layout.nbytes and placed == [(s[1], s[3]) for s in self._layout.segments]:
            return QTensor._wrap(self._buf, layout, self.dtype)  # still inside of the padded tensor
        padded = QTensor._wrap(torch.zeros(layout.nbytes, dtype=torch.uint8, device=self.device), layout, self.dtype)
        for name, part in self.parts().items():
            whole = padded.parts()[name]
            (whole if whole.shape == part.shape else whole[: part.shape[0]]).copy_(part)
        return padded

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], tuple[Layout, Parts]]:
        """What `torch.distributed.fsdp.fully_shard` gathers: the bytes of each part that has rows, never values.

        This is the signature without sizes: with it, inputs of uneven shards may have the size of their bytes.
        """
        padded = self._padded()
        parts = padded.parts()
        rows, *rest = padded.shape
        layout = Layout.of(self.format, (rows * mesh.size(), *rest))
        if mesh.size() == 1:  # fully_shard then passes on the first input only
            return (padded._buf,), (layout, {})
        of_all = ("scale", "zero_point", "tensor_scale") if self.format.group[0] == -1 else ("tensor_scale",)
        shared = {name: part for name, part in parts.items() if name in of_all}  # the same on every rank
        return tuple(_bytes(part) for name, part in parts.items() if name not in shared), (layout, shared)

    def fsdp_post_all_gather(
        self,
        outputs: tuple[Tensor, ...],
        metadata: tuple[Layout, Parts],
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[QTensor, tuple[Tensor, ...]] | None:
        """The tensor of all ranks, padding included, and its buffer, which fully_shard frees and has refilled: then
        `out` is the parameter that holds it. Parts of all ranks are copied into one buffer, and what they came in is
        given back."""
        layout, shared = metadata
        if out is None:
            with torch.inference_mode(False):  # it outlives the mode, and the shard may be on the CPU
                buf = torch.empty(layout.nbytes, dtype=torch.uint8, device=outputs[0].device)
            whole = QTensor._wrap(buf, layout, param_dtype)
        else:
            parameter: Any = getattr(out, "_local_tensor", out)  # a DTensor where tensor parallelism comes with it
            whole = QTensor._wrap(parameter._buf, layout, parameter.dtype)
        # What autograd saved is a view of this buffer; the same bytes come back, so its version has to stay.
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter((whole._buf,)):
            parts, gathered = whole.parts(), iter(outputs)
            if len(outputs) + len(shared) < len(parts):
                whole._buf.copy_(outputs[0])
            else:
                for name, part in parts.items():
                    _bytes(part).copy_(_bytes(shared[name]) if name in shared else next(gathered))
        for part in shared.values():
            if part.is_cuda:  # with parameters on the CPU, of a copy made for this gather on the stream that gathers
                part.record_stream(torch.cuda.current_stream(part.device))
        for output in outputs:
            output.untyped_storage().resize_(0)  # fully_shard makes room again before the next gather
        return (whole, (whole._buf,)) if out is None else None

    # ------------------------------------------------------------------------------------------------ dispatch

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            x = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            if isinstance(weight, QTensor) and not isinstance(x, QTensor):
                layout = weight._layout
                trained = torch.is_grad_enabled()
                if trained:
                    with torch._C.DisableTorchFunctionSubclass():  # else reading this comes here again, at 2 us
                        trained = weight.requires_grad
                if len(layout.shape) == 2 and not trained:
                    return autograd.linear(x, weight._buf, layout, bias)
        if func is Tensor.__setitem__ and isinstance(args[0], QTensor):
            return _set_item(*args)
        if func is Tensor.storage:
            raise RuntimeError(_NO_STORAGE)
        if func is Tensor.untyped_storage and not _in_torch(sys._getframe(1).f_globals.get("__name__", "")):
            # A wrapper's own is null, as if all were tied; tracers have to see that it is not the buffer's.
            return args[0]._buf.untyped_storage()
        if func in _TO_PYTHON:  # refused for subclasses
            return func(args[0].detach().dequantize(), *args[1:], **kwargs)
        with torch._C.DisableTorchFunctionSubclass():  # a dense result is a plain tensor
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = HANDLERS.get(func) or HANDLERS.get(func.namespace)
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


def _in_torch(module: str) -> bool:
    return module.startswith("torch.") and not module.startswith("torch.distributed.")


def _bytes(part: Tensor) -> Tensor:
    return part.view(-1).view(torch.uint8)


_NO_STORAGE = (
    "a quantized tensor has no storage of its shape and dtype, which files of safetensors hold; write the model with "
    "tritonq.save_pretrained or torch.save, its parts, or dequantize it, or, for a host that writes and assigns .data, "
    "see tritonq.payload_data_"
)
_TO_PYTHON = (Tensor.numpy, Tensor.tolist, Tensor.__array__)
# Operators, or whole namespaces, and what they do with quantized tensors (`tensor_ops`, `sharding`). A handler that
# returns NotImplemented leaves the operator to the dequantized tensors.
HANDLERS: dict[Any, Callable[..., Any]] = {}


def implements(*operations: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        HANDLERS.update(dict.fromkeys(operations, handler))
        return handler

    return register


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


# ---------------------------------------------------------------------------------------------------- public functions


def payload_data_(model: torch.nn.Module, enabled: bool = True) -> torch.nn.Module:
    """Have `.data` of the quantized parameters and buffers of a model be their bytes, uint8 [nbytes], or, with
    `enabled=False`, aliases again; returns the model.

    Some libraries write `.data` to files that know plain tensors only (safetensors; so diffusers' group offload to
    disk) and assign what they read to it. Bytes pass, an alias does not. It is no default because `.data` then has
    another shape and dtype than the parameter. Holds for these parameters, not for copies of them.

    Raises:
        ValueError: the model has no quantized parameter or buffer.
    """
    found = [t for t in (*model.parameters(), *model.buffers()) if isinstance(t, QTensor)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no quantized parameters; quantize it first (tritonq.quantize_)")
    for tensor in found:
        tensor._payload = enabled
    return model


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
