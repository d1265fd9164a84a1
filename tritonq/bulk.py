"""Many quantized tensors in one allocation, quantized together: MoE experts, fused projections, tokens by expert.

    member i of the result = quantize(tensors[i], fmt), and of its `columns` = quantize(tensors[i].mT, fmt), bit by bit

Each direction is one allocation, so that dropping one frees its memory. Members begin at multiples of 256 bytes, and
are QTensors whose buffers are slices of it: what is done to the whole (a copy, `record_stream`, pinning) is done to
all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from tritonq import ops
from tritonq.formats import Format, Shape, get_format
from tritonq.tensor import Layout, QTensor

ALIGNMENT = 256


@dataclass(frozen=True)
class BulkLayout:
    """Where quantized tensors lie in a buffer of `nbytes` bytes: layouts, and the bytes at which they begin."""

    members: tuple[Layout, ...]
    offsets: tuple[int, ...]
    nbytes: int

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(fmt: Format, shapes: tuple[Shape, ...]) -> BulkLayout:
        """One after the other, each from a multiple of 256 bytes on."""
        members, offsets, end = [], [], 0
        for shape in shapes:
            layout = Layout.of(fmt, shape)
            start = -(-end // ALIGNMENT) * ALIGNMENT
            members.append(layout)
            offsets.append(start)
            end = start + layout.nbytes
        return BulkLayout(tuple(members), tuple(offsets), end)


class BulkBuffer(Sequence[QTensor]):
    """Quantized tensors that are slices of one buffer. Made by `tritonq.grouped_quantize`.

    Indexing, `len` and iteration are over `members`, those quantized along rows.

    Attributes:
        base: the allocation, uint8 [nbytes].
        layout: where members lie in it.
        dtype: of the members.
        columns: a BulkBuffer of what is quantized along columns, or None. It has a buffer of its own: `bulk.columns =
            None` frees that one, and to keep nothing else frees the other.
    """

    def __init__(self, base: Tensor, layout: BulkLayout, dtype: torch.dtype, columns: BulkBuffer | None = None) -> None:
        _check_base(base, layout)
        self.base, self.layout, self.dtype, self.columns = base, layout, dtype, columns
        self._members: list[QTensor | None] = [None] * len(layout.members)

    # ------------------------------------------------------------------------------------------------- members

    def __len__(self) -> int:
        return len(self._members)

    def _slice(self, i: int, base: Tensor) -> Tensor:
        start = self.layout.offsets[i]
        return base[start : start + self.layout.members[i].nbytes]

    def _member(self, i: int) -> QTensor:
        found = self._members[i]
        if found is None:
            found = QTensor._wrap(self._slice(i, self.base), self.layout.members[i], self.dtype)
            self._members[i] = found
        return found

    @overload
    def __getitem__(self, index: int) -> QTensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[QTensor]: ...
    def __getitem__(self, index: int | slice) -> QTensor | list[QTensor]:
        if isinstance(index, slice):
            return [self._member(i) for i in range(len(self))[index]]
        return self._member(range(len(self))[index])

    def __iter__(self) -> Iterator[QTensor]:
        return (self._member(i) for i in range(len(self)))

    @property
    def members(self) -> tuple[QTensor, ...]:
        """The QTensors, the same objects every time; `_buf` of each is a slice of `base`."""
        return tuple(self)

    # ----------------------------------------------------------------------------------------------- the whole

    @property
    def format(self) -> Format | None:
        """Of the members; None where there are none."""
        for layout in (*self.layout.members, *(self.columns.layout.members if self.columns is not None else ())):
            return layout.format
        return None

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def nbytes(self) -> int:
        """Bytes of the allocations, that of `columns` included."""
        return self.base.numel() + (self.columns.nbytes if self.columns is not None else 0)

    def __repr__(self) -> str:
        name = self.format.name if self.format else None
        columns = f", columns={len(self.columns)}" if self.columns is not None else ""
        return f"BulkBuffer({len(self)} x {name}, nbytes={self.nbytes}, device={self.device}{columns})"

    def _with(self, base: Tensor, columns: BulkBuffer | None) -> BulkBuffer:
        return BulkBuffer(base, self.layout, self.dtype, columns)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BulkBuffer:
        """A copy on a device, one copy an allocation; self where it lies there already."""
        target = torch.device(device)
        if target == self.device or (target.type == self.device.type and target.index is None):
            return self
        columns = None if self.columns is None else self.columns.to(device, non_blocking)
        return self._with(self.base.to(device, non_blocking=non_blocking), columns)

    def clone(self) -> BulkBuffer:
        """A copy where it lies."""
        return self._with(self.base.clone(), None if self.columns is None else self.columns.clone())

    def pin_memory(self) -> BulkBuffer:
        """A copy in pinned host memory; self where it lies in such."""
        if self.is_pinned():
            return self
        columns = None if self.columns is None else self.columns.pin_memory()
        return self._with(self.base.pin_memory(), columns)

    def is_pinned(self) -> bool:
        return bool(self.base.is_pinned()) and (self.columns is None or self.columns.is_pinned())

    def record_stream(self, stream: Any) -> None:
        """No memory of any member is handed out again before work that is on `stream` now has ended."""
        self.base.record_stream(stream)
        if self.columns is not None:
            self.columns.record_stream(stream)

    @torch.no_grad()
    def rebind(self, base: Tensor, tensors: Sequence[Tensor] | None = None) -> BulkBuffer:
        """Let the members lie in another buffer that holds the same bytes, such as a copy on another device; nothing is
        copied. Returns self.

        Args:
            base: uint8 [nbytes], contiguous, any device.
            tensors: QTensors to point at it besides, one a member: parameters of a model that were made of the members.
                They stay the objects that they are, and of their dtype. `columns` is a BulkBuffer with a `rebind` of
                its own.

        Raises:
            ValueError: a buffer of another size or kind, or another number of tensors. TypeError: no QTensors.
        """
        _check_base(base, self.layout)
        if tensors is not None and len(tensors) != len(self):
            raise ValueError(f"rebind takes one tensor a member, {len(self)}, got {len(tensors)}")
        for i, tensor in enumerate(tensors or ()):  # torch would leave a plain one without storage
            if not isinstance(tensor, QTensor):
                raise TypeError(
                    f"rebind points QTensors at the buffer, got {type(tensor).__name__} of {tensor.dtype} at {i}; make "
                    "parameters of the members: torch.nn.Parameter(bulk[i], requires_grad=False)"
                )
        for i, layout in enumerate(self.layout.members):
            member = self._members[i]
            for target in (member, None if tensors is None else tensors[i]):
                if target is not None:
                    target.data = QTensor._wrap(self._slice(i, base), layout, target.dtype)
        self.base = base
        return self

    # ------------------------------------------------------------------------------------------------- copying

    def __deepcopy__(self, memo: dict[int, Any]) -> BulkBuffer:
        copy = memo[id(self)] = self.clone()
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        whole = self.base.untyped_storage().nbytes() <= self.base.numel() + ALIGNMENT
        base = self.base if whole else self.base.clone()
        members = tuple((tuple(own.shape), own.segments, own.nbytes) for own in self.layout.members)
        name = None if not members else ops._name(self.layout.members[0].format)
        return _rebuild_bulk, (base, name, members, self.layout.offsets, self.dtype, self.columns)


def _check_base(base: Tensor, layout: BulkLayout) -> None:
    if base.dtype is not torch.uint8 or base.shape != (layout.nbytes,) or not base.is_contiguous():
        raise ValueError(
            f"the buffer of {len(layout.members)} members is contiguous uint8 of shape ({layout.nbytes},), got "
            f"{base.dtype} of shape {tuple(base.shape)} with strides {base.stride()}"
        )


def _rebuild_bulk(
    base: Tensor, name: str | None, members: tuple[Any, ...], offsets: tuple[int, ...], dtype: torch.dtype,
    columns: BulkBuffer | None,
) -> BulkBuffer:  # fmt: skip
    """Inverse of `BulkBuffer.__reduce_ex__`; the format comes back by its name."""
    layouts = []
    for shape, segments, nbytes in members:
        kept = tuple((part, offset, tuple(size), tuple(stride), kind) for part, offset, size, stride, kind in segments)
        layouts.append(Layout(get_format(name or ""), tuple(shape), kept, nbytes))
    return BulkBuffer(base, BulkLayout(tuple(layouts), tuple(offsets), base.numel()), dtype, columns)


torch.serialization.add_safe_globals([BulkBuffer, _rebuild_bulk])
