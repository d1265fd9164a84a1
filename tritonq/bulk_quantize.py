"""`grouped_quantize`: check, allocate, look up what is to be launched, launch; on the CPU member by member.

Traced calls (compile and export, fake tensors, dispatch modes) go through `torch.ops.tritonq.grouped_quantize`, whose
results are plain buffers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonq import bulk_tables, operators, ops
from tritonq.bulk import ALIGNMENT, BulkBuffer, BulkLayout
from tritonq.bulk_tiles import View, Views
from tritonq.formats import Format, Shape, get_format
from tritonq.memory import empty
from tritonq.tensor import Layout, _outside_graphs


@_outside_graphs
def grouped_quantize(
    tensors: Sequence[Tensor] | Tensor,
    fmt: Format | str,
    *,
    sizes: Sequence[int] | None = None,
    rowwise: bool = True,
    columnwise: bool = False,
    tensor_scale: Tensor | None = None,
    share_tensor_scale: bool = False,
    out: BulkBuffer | None = None,
) -> BulkBuffer:
    """Quantize many tensors into one allocation; on a GPU in one launch, whatever their number.

    Formats with a tensor scale take two launches, the first for the largest magnitudes; so do formats whose groups are
    whole tensors, larger than 32768 elements, or share bytes with their neighbours (docs/bulk.md).

    Args:
        tensors: floating tensors of one dtype on one device, of any shapes and strides, also without elements; or one
            tensor with `sizes`.
        fmt: a Format or its name; see `quantize`.
        sizes: cut one tensor along its first axis into members of so many rows, such as tokens sorted by expert. They
            add up to its rows, and can be 0.
        rowwise: quantize the tensors.
        columnwise: quantize their transposes x.mT, into `columns`, which has a buffer of its own.
        tensor_scale: used verbatim instead of being computed, fp32: one element, or one a tensor.
        share_tensor_scale: one tensor scale for all, that of the largest finite magnitude among them, as runtimes that
            fuse q, k and v need it.
        out: a BulkBuffer of an equal call, whose buffers receive the result; it is returned.

    Returns:
        A BulkBuffer whose member i equals `quantize(tensors[i], fmt)` bit for bit, and `columns[i]`
        `quantize(tensors[i].mT, fmt)`. Without `rowwise` it has no members but `columns`.

    Raises:
        ValueError: an unknown format, no tensor, neither direction, sizes, a tensor scale or out that do not fit,
            fewer dimensions than `fmt` or `columnwise` takes. TypeError: tensors that are not floating, or of several
            dtypes or devices.
    """
    members = _members(tensors, sizes)
    call = _Call(get_format(fmt), rowwise, columnwise, tensor_scale, share_tensor_scale)
    _check(members, call)
    job, traced = _job_of(members, call), _traced(members)
    if out is None:
        made = _operator_call(members, call) if traced else _allocate_and_fill(members, call, job)
        other = BulkBuffer(made[1], job.columns, members[0].dtype) if columnwise else None
        return BulkBuffer(made[0], job.rows, members[0].dtype, other)
    buffers = _buffers(out, job, members[0])
    if traced:
        for target, values in zip(buffers, _operator_call(members, call), strict=True):
            if values.numel():
                target.copy_(values)
    else:
        _fill(members, call, job, buffers)
    return out


def quantize_into_buffers(
    members: Sequence[Tensor],
    fmt: Format | str,
    rowwise: bool = True,
    columnwise: bool = False,
    tensor_scale: Tensor | None = None,
    share_tensor_scale: bool = False,
) -> tuple[Tensor, Tensor]:
    """The buffers of `grouped_quantize` as plain tensors, which can be traced: uint8, as `BulkLayout.of` lays them out,
    with zeros between the parts; one of no bytes for a direction that is not asked for."""
    call = _Call(get_format(fmt), rowwise, columnwise, tensor_scale, share_tensor_scale)
    if _traced(members):
        return _operator_call(members, call)
    _check(members, call)
    return _allocate_and_fill(members, call, _job_of(members, call), torch.zeros)


@dataclass(frozen=True)
class _Call:
    """What is asked for, besides the tensors."""

    fmt: Format
    rowwise: bool
    columnwise: bool
    tensor_scale: Tensor | None
    share: bool


def _traced(members: Sequence[Tensor]) -> bool:
    return ops.traced(members[0]) or any(type(x) is not Tensor and ops.traced(x) for x in members)


def _operator_call(members: Sequence[Tensor], call: _Call) -> tuple[Tensor, Tensor]:
    detached = [x.detach() for x in members]
    rows, columns = torch.ops.tritonq.grouped_quantize(
        detached, ops._name(call.fmt), call.rowwise, call.columnwise, call.tensor_scale, call.share
    )
    return rows, columns


def _members(tensors: Sequence[Tensor] | Tensor, sizes: Sequence[int] | None) -> list[Tensor]:
    if sizes is None:
        if isinstance(tensors, Tensor):
            raise TypeError(
                "tensors is a sequence of tensors, got one; pass sizes=[...] to cut it along its first axis"
            )
        members = list(tensors)
    else:
        if not isinstance(tensors, Tensor):
            raise TypeError(f"sizes cut one tensor, got {type(tensors).__name__}; leave sizes out, or concatenate")
        counts = [int(n) for n in sizes]
        if tensors.ndim < 1 or min(counts, default=0) < 0 or sum(counts) != tensors.shape[0]:
            raise ValueError(
                f"sizes are >= 0 and add up to the rows of a tensor of shape {tuple(tensors.shape)}, got {counts}, "
                f"which add up to {sum(counts)}"
            )
        members = list(tensors.detach().split(counts))
    if not members:
        raise ValueError("grouped_quantize takes at least one tensor, got none; it could not say of what dtype")
    return members


def _check(members: Sequence[Tensor], call: _Call) -> None:
    fmt, tensor_scale = call.fmt, call.tensor_scale
    if not (call.rowwise or call.columnwise):
        raise ValueError("rowwise and columnwise are both False; ask for one of them")
    ops.check_input(members[0], fmt)
    dtype, device = members[0].dtype, members[0].device
    for i, x in enumerate(members):
        if not isinstance(x, Tensor):
            ops.check_input(x, fmt)
        if x.dtype is not dtype or x.device != device:
            raise TypeError(
                f"tensors are of one dtype and device, got {x.dtype} on {x.device} at {i} beside {dtype} on {device}; "
                "cast or move them, or call once for each kind"
            )
    if not fmt.tensor_scale and (tensor_scale is not None or call.share):
        raise ValueError(f"{fmt.name} has no tensor_scale; leave tensor_scale and share_tensor_scale out")
    if tensor_scale is None:
        return
    if call.share:
        raise ValueError("share_tensor_scale computes what tensor_scale gives; leave one of them out")
    if not isinstance(tensor_scale, Tensor) or tensor_scale.dtype is not torch.float32:
        kind = getattr(tensor_scale, "dtype", type(tensor_scale).__name__)
        raise TypeError(f"tensor_scale of {fmt.name} is a tensor of float32, got {kind}")
    if tensor_scale.numel() not in (1, len(members)):
        raise ValueError(f"tensor_scale has 1 or {len(members)} elements, one a tensor, got {tensor_scale.numel()}")
    ops.check_device("tensor_scale", tensor_scale, members[0])


def _buffers(out: BulkBuffer, job: _Job, x: Tensor) -> tuple[Tensor, Tensor]:
    """Those of `out`, which has to fit."""
    if not isinstance(out, BulkBuffer):
        raise TypeError(f"out is a BulkBuffer, got {type(out).__name__}; make one with tritonq.grouped_quantize")
    columns = out.columns.layout if out.columns is not None else BulkLayout((), (), 0)
    if (out.layout, columns, out.dtype, out.device) != (job.rows, job.columns, x.dtype, x.device):
        raise ValueError(
            f"out has to come from a call with tensors of the same shapes, format and directions, {x.dtype} on "
            f"{x.device}; got {out!r} of {out.dtype} with shapes {[layout.shape for layout in out.layout.members]}"
        )
    return out.base, out.base if out.columns is None else out.columns.base


def _allocate_and_fill(
    members: Sequence[Tensor], call: _Call, job: _Job, allocate: Callable[..., Tensor] = empty
) -> tuple[Tensor, Tensor]:
    kind = {"dtype": torch.uint8, "device": members[0].device}
    buffers = allocate(job.rows.nbytes, **kind), allocate(job.columns.nbytes, **kind)
    _fill(members, call, job, buffers)
    return buffers


@torch.no_grad()
def _fill(members: Sequence[Tensor], call: _Call, job: _Job, buffers: tuple[Tensor, Tensor]) -> None:
    members, tensor_scale = [x.resolve_neg() for x in members], call.tensor_scale
    if members[0].device.type == "meta":
        return
    if ops.uses_triton(members[0]):
        scales = "shared" if call.share else "own"
        if tensor_scale is not None:
            scales, tensor_scale = "one" if tensor_scale.numel() == 1 else "each", tensor_scale.contiguous()
        with ops._device_of(members[0]):
            bulk_tables.run(members, job.views, call.fmt, buffers, tensor_scale, scales)
        return
    given: list[Tensor | None] = [None] * len(members)
    if tensor_scale is not None:
        given = list(tensor_scale.reshape(-1, 1).expand(len(members), 1))
    elif call.share:
        given = [_shared_tensor_scale(members, call.fmt)] * len(members)
    for side, (layout, buffer) in enumerate(zip((job.rows, job.columns), buffers, strict=True)):
        for i, own in enumerate(layout.members):
            start, x = layout.offsets[i], members[i].mT if side else members[i]
            piece = buffer[start : start + own.nbytes]
            parts = {segment[0]: own.part(piece, segment) for segment in own.segments}
            ops._quantize(x, call.fmt, None, None, given[i], out=parts)


def _shared_tensor_scale(members: Sequence[Tensor], fmt: Format) -> Tensor:
    """The smallest of those tensors that have a finite element other than 0; 1 without any."""
    found = [ops._tensor_scale(x, fmt) for x in members if bool(x.nan_to_num(0.0, 0.0, 0.0).any())]
    return torch.stack(found).amin(0) if found else torch.ones(1, device=members[0].device)


@dataclass(frozen=True, eq=False)
class _Job:
    """What follows from the shapes and strides of tensors: two layouts, of which one may have no members, and what is
    quantized. Hashed by identity, because calls look it up by all of that once."""

    rows: BulkLayout
    columns: BulkLayout
    views: Views


def _job_of(members: Sequence[Tensor], call: _Call) -> _Job:
    return _job(tuple([(x.shape, x.stride()) for x in members]), call.fmt, call.rowwise, call.columnwise)


@functools.lru_cache(maxsize=512)
def _job(members: tuple[tuple[Shape, Shape], ...], fmt: Format, rowwise: bool, columnwise: bool) -> _Job:
    """Rows of a tensor come before its columns. Raises where a tensor has too few dimensions."""
    shapes = tuple(tuple(shape) for shape, _ in members)
    for shape in shapes:
        fmt.scale_shape(shape)
        if columnwise:
            _check_dimensions(shape)
    turned = tuple((*shape[:-2], shape[-1], shape[-2]) for shape in shapes) if columnwise else ()
    rows, columns = BulkLayout.of(fmt, shapes if rowwise else ()), BulkLayout.of(fmt, turned)
    views = []
    for i, (_, strides) in enumerate(members):
        for side, layout in enumerate((rows, columns)):
            if i >= len(layout.members):
                continue
            own = layout.members[i]
            parts = tuple((segment[0], layout.offsets[i] + segment[1]) for segment in own.segments)
            seen = (*strides[:-2], strides[-1], strides[-2]) if side else strides
            views.append(View(i, side, own.shape, tuple(seen), parts))
    return _Job(rows, columns, Views(tuple(views)))


def _check_dimensions(shape: Shape) -> None:
    if len(shape) < 2:
        raise ValueError(f"columns are quantized of tensors of >= 2 dimensions, got shape {shape}; reshape it")


# --------------------------------------------------------------------------------------------------------- operator


def _operator(
    tensors: Sequence[Tensor], name: str, rowwise: bool, columnwise: bool, tensor_scale: Tensor | None, share: bool
) -> tuple[Tensor, Tensor]:
    call = _Call(get_format(name), rowwise, columnwise, tensor_scale, share)
    _check(tensors, call)
    return _allocate_and_fill(tensors, call, _job_of(tensors, call), torch.zeros)


def _fake(
    tensors: Sequence[Tensor], name: str, rowwise: bool, columnwise: bool, tensor_scale: Tensor | None, share: bool
) -> tuple[Tensor, Tensor]:
    made = []
    for wanted, views in ((rowwise, tensors), (columnwise, [x.mT for x in tensors] if columnwise else [])):
        end = 0  # as `BulkLayout.of`, which keeps what it gives and so takes no symbolic sizes
        for x in views if wanted else ():
            end = -(-end // ALIGNMENT) * ALIGNMENT + Layout.of.__wrapped__(get_format(name), tuple(x.shape)).nbytes
        made.append(tensors[0].new_empty(end, dtype=torch.uint8))
    return made[0], made[1]


operators._operator(
    "grouped_quantize(Tensor[] tensors, str format, bool rowwise, bool columnwise, Tensor? tensor_scale, "
    "bool share_tensor_scale) -> (Tensor, Tensor)",
    _operator,
    _fake,
)
