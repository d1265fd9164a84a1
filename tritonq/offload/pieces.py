"""Tensors as bytes: which of them share memory, and the same tensors over other memory.

A *piece* is a run of bytes of one storage with all tensors that lie in it, so that tied tensors and slices of one
`BulkBuffer` keep what they share when the bytes go elsewhere. A QTensor is its one `_buf`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tritonq.tensor import Layout, QTensor

_set_data = torch._C.TensorBase.data.__set__  # type: ignore[attr-defined]
ALIGNMENT = 256  # of pieces in a slab; cuBLAS chooses algorithms by alignments up to this


def bytes_of(tensor: Tensor) -> Tensor:
    """The plain tensor whose storage holds a tensor's bytes."""
    return tensor._buf if isinstance(tensor, QTensor) else tensor


def movable(tensor: Tensor) -> bool:
    """Whether the bytes of a tensor are all there is to it: strided and plain, or a QTensor."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) and not isinstance(tensor, QTensor):
        return False
    plain = bytes_of(tensor)
    return plain.layout == torch.strided and plain.numel() > 0 and not (plain.is_conj() or plain.is_neg())


@dataclass(frozen=True)
class View:
    """A tensor as a view of bytes: its first byte counted from the start of its piece, and how they are read."""

    start: int
    nbytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout | None  # of a QTensor

    @staticmethod
    def of(tensor: Tensor, origin: int = 0) -> View:
        start, stop = span(tensor)
        layout = tensor._layout if isinstance(tensor, QTensor) else None
        return View(start - origin, stop - start, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, layout)

    def over(self, piece: Tensor) -> Tensor:
        """The tensor over other bytes. It shares no version counter with them, so that copies into memory that is used
        in turn don't look like changes of what lies there."""
        with torch.inference_mode(False), torch.no_grad():
            own = piece[self.start : self.start + self.nbytes].data
            if self.layout is not None:
                return QTensor(own, self.layout, self.dtype)
            return own.view(self.dtype).as_strided(self.shape, self.stride)

    def alike(self, tensor: Tensor) -> bool:
        """Whether a tensor means the same with the same bytes."""
        other = View.of(tensor)
        return (self.shape, self.stride, self.dtype, self.layout) == (
            other.shape, other.stride, other.dtype, other.layout,
        )  # fmt: skip


def span(tensor: Tensor) -> tuple[int, int]:
    """First byte, and the one behind the last, of a tensor in its storage."""
    plain = bytes_of(tensor)
    extent = 1 + sum((n - 1) * s for n, s in zip(plain.shape, plain.stride(), strict=True))
    start = int(plain.storage_offset()) * plain.itemsize
    return start, start + extent * plain.itemsize


def rebind(parameter: Tensor, tensor: Tensor) -> int:
    """parameter.data = tensor, of the same kind; without the wrapper that the setter of a QTensor makes each time.
    Returns the version of its bytes."""
    if isinstance(parameter, QTensor) and isinstance(tensor, QTensor) and not parameter._payload:
        _set_data(parameter, tensor)
        plain = parameter._buf = tensor._buf
        return plain._version
    parameter.data = tensor
    return bytes_of(parameter)._version


@dataclass
class Piece:
    """Bytes `start:stop` of the storage at `address`, and the tensors in it."""

    address: int
    start: int
    stop: int
    tensors: list[Tensor] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def source(self) -> Tensor:
        """The bytes where they are now."""
        plain = bytes_of(self.tensors[0])
        with torch.inference_mode(False):
            whole = torch.empty(0, dtype=torch.uint8, device=plain.device).set_(plain.untyped_storage())
        return whole[self.start : self.stop]

    def views(self) -> list[View]:
        return [View.of(tensor, self.start) for tensor in self.tensors]


def pieces(tensors: Iterable[Tensor]) -> list[Piece]:
    """The pieces of tensors that are `movable`, in the order in which they come."""
    found: dict[tuple[str, int], list[Piece]] = {}
    order: list[Piece] = []
    for tensor in tensors:
        storage = bytes_of(tensor).untyped_storage()
        start, stop = span(tensor)
        start = start // 16 * 16  # of tensors with elements of several sizes each begins at a multiple of its own
        mine = Piece(storage.data_ptr(), start, stop, [tensor])
        beside = found.setdefault((str(storage.device), storage.data_ptr()), [])
        for other in [p for p in beside if p.start < stop and start < p.stop]:
            mine.start, mine.stop = min(mine.start, other.start), max(mine.stop, other.stop)
            mine.tensors = other.tensors + mine.tensors
            beside.remove(other)
            order[next(i for i, p in enumerate(order) if p is other)] = mine
        if not any(p is mine for p in order):
            order.append(mine)
        beside.append(mine)
    unique: dict[int, Piece] = {id(piece): piece for piece in order}
    return list(unique.values())


def move(piece: Piece, target: Tensor) -> None:
    """Copy a piece into the beginning of `target` and let its tensors lie there."""
    views, memory = piece.views(), target[: piece.nbytes]
    memory.copy_(piece.source())
    for tensor, view in zip(piece.tensors, views, strict=True):
        tensor.data = view.over(memory)


def offsets(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Where pieces of these sizes lie one after the other, aligned, and the bytes in all."""
    found, end = [], 0
    for size in sizes:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        found.append(start)
        end = start + size
    return found, end
