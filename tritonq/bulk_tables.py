"""Running programs: their tables in device memory, and how calls and CUDA graphs come by them.

A table goes to the device in one copy from pinned memory, and stays there for the next call with tensors that lie
together in the same way. So calls do not wait for the device. A CUDA graph holds the copy, from memory that is never
freed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from tritonq.bulk_plans import Program, program
from tritonq.bulk_tiles import ALIGNED, Views
from tritonq.formats import Format

_KEPT = 8  # tables of a program: places that its tensors take turns in
_arenas: list[Tensor] = []  # pinned memory that CUDA graphs read at every replay, so never freed; the last has room
_room = 0  # bytes of the last that are left
_ARENA, _RESERVE = 1 << 20, 1 << 18
_lock = threading.RLock()  # threads share tables and arenas


def _reserve(nbytes: int) -> None:
    """Have room for so many bytes: while a graph is captured is no time to allocate it."""
    global _room
    if _room < nbytes:
        with torch.inference_mode(False):  # to be written in any mode
            _arenas.append(torch.empty(max(_ARENA, 4 * nbytes), dtype=torch.uint8, pin_memory=True))
        _room = _arenas[-1].numel()


def _kept_memory(nbytes: int) -> Tensor:
    """Pinned bytes that are never handed out again."""
    global _room
    _reserve(nbytes)
    _room -= nbytes
    return _arenas[-1][_room : _room + nbytes]


def _filled(of: Program, offsets: tuple[int, ...], target: Tensor) -> Tensor:
    """The table of tensors that lie `offsets` elements after the first, and zeros for the keys, which kernels leave
    behind as zeros."""
    from tritonq.kernels import grouped

    entries = len(of.table)
    target[entries:].zero_()
    target[:entries].copy_(of.table)
    target[:entries, grouped.place("x")] += torch.tensor(offsets, dtype=torch.int64)[of.sources]
    return target


def _table(of: Program, offsets: tuple[int, ...], device: torch.device) -> Tensor:
    with _lock:
        return _table_of(of, offsets, device)


def _table_of(of: Program, offsets: tuple[int, ...], device: torch.device) -> Tensor:
    """The table on the device. Each stream has one of its own, so that no call waits for another stream, or shares keys
    with what runs there."""
    width = of.table.shape[1]
    rows = len(of.table) + -(-3 * of.keys // (2 * width))
    if device.type != "cuda":
        return _filled(of, offsets, torch.empty((rows, width), dtype=torch.int64)).to(device)
    if torch.cuda.is_current_stream_capturing():
        kept = of.captured.get(offsets)
        if kept is None:
            kept = _kept_memory(8 * rows * width).view(torch.int64).view(rows, width)
            of.captured[offsets] = _filled(of, offsets, kept)
        return kept.to(device, non_blocking=True)
    key = (device, torch.cuda.current_stream(device).cuda_stream, offsets)
    found = of.uploaded.get(key)
    if found is not None:
        of.uploaded.move_to_end(key)
        return found
    _reserve(max(_RESERVE, 8 * rows * width))
    host = torch.empty((rows, width), dtype=torch.int64, pin_memory=True)
    found = of.uploaded[key] = _filled(of, offsets, host).to(device, non_blocking=True)
    if len(of.uploaded) > _KEPT:
        of.uploaded.popitem(last=False)
    return found


def run(tensors: Sequence[Tensor], views: Views, fmt: Format, buffers: tuple[Tensor, Tensor],
        divisors: Tensor | None, scales: str) -> None:  # fmt: skip
    """Fill both buffers (uint8) with the parts of `views` of `tensors`, which share a device and a dtype; scales as in
    `program`, with `divisors` (fp32) those that are given."""
    size = tensors[0].element_size()
    pointers = [t.data_ptr() if t.numel() else 0 for t in tensors]
    anchor = next((i for i, p in enumerate(pointers) if p and p % 16 == 0), None)
    if anchor is None:
        anchor = next((i for i, p in enumerate(pointers) if p), 0)
    if any(p and (p - pointers[anchor]) % size for p in pointers):  # not a whole number of elements apart
        tensors = [t.clone() if p and p % size else t for t, p in zip(tensors, pointers, strict=True)]
        return run(tensors, views, fmt, buffers, divisors, scales)
    offsets = tuple((p - pointers[anchor]) // size if p else 0 for p in pointers)
    device = tensors[anchor].device
    of = program(views, fmt, tensors[0].dtype, all(n % ALIGNED == 0 for n in offsets), device, scales)
    if not of.steps:
        return
    table = _table(of, offsets, device)
    given: dict[str, Tensor] = {"x": tensors[anchor], "rows": buffers[0], "columns": buffers[1]}
    given["keys"] = table[len(of.table) :].view(torch.int32)
    if divisors is None:
        divisors = torch.empty(max(1, of.divisors), dtype=torch.float32, device=device)
    given["divisors"] = divisors
    for step in of.steps:
        step.plan(*[table[step.first : step.last] if name == "table" else given[name] for name in step.tensors])
