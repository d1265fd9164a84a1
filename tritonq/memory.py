"""Allocating results, the budget of what is allocated besides, and what offload leaves where it is.

A large result on the CPU is written once, front to back, and with pages of 4 KiB the page faults take longer than the
arithmetic. Huge pages are asked for from 4 MiB on, as NumPy does for its arrays; an operating system that has none to
give ignores the request.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

HUGE = 4 << 20
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_workspace: ContextVar[int] = ContextVar("tritonq_workspace", default=64 << 20)


def parse_size(size: int | str, name: str) -> int:
    """Bytes of a number or of a text such as "2GB" (10^9) or "256MiB" (2^20). ValueError, with the name of the
    argument, for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    nbytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match and match[2].upper() in _UNITS else 0
    if nbytes < 1:
        raise ValueError(f"{name} {size!r} is not a size; write bytes, or a number with MB, GB, MiB or GiB such as 2GB")
    return nbytes


@contextlib.contextmanager
def workspace(nbytes: int | str) -> Iterator[int]:
    """Within, operations take at most `nbytes` of memory a device besides their results: a number of bytes, or a text
    such as "256MiB". The default is 64 MiB.

    It bounds the tiles in which tensors stream through another device and the intermediates of formats that take
    several passes; the CPU's own tiles are smaller and do not depend on it. Holds for this thread (or task of asyncio)
    and can be nested. A group of one row, or a row of blocks, is the smallest tile, and is taken whole even where it is
    larger.

    Raises:
        ValueError: not a size.
    """
    size = parse_size(nbytes, "workspace")
    token = _workspace.set(size)
    try:
        yield size
    finally:
        _workspace.reset(token)


def budget() -> int:
    """Bytes that an operation may take besides its result; see `workspace`."""
    return _workspace.get()


def empty(shape: tuple[int, ...] | int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, for tensors that are about to be filled."""
    y = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and type(y) is Tensor and y.nbytes >= HUGE and not torch.compiler.is_compiling():
        advise = _madvise()
        if advise is not None:
            start = -(-y.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = (y.data_ptr() + y.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            advise(start, stop - start, mmap.MADV_HUGEPAGE)
    return y


# What code that torch.compile generates allocates with: half the host time of torch.empty_strided.
_on_gpu = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None)


def empty_on_gpu(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor to fill on the current GPU, where no dispatch mode looks on."""
    if _on_gpu is not None:
        found: Tensor = _on_gpu(shape, strides, dtype)
        return found
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux only
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


# Contexts that offload saved tensors, open now in any thread: elsewhere nobody asks what stays.
offloading = 0
_staying: dict[int, StorageWeakRef] = {}  # by the address of the storage, which a weak reference keeps from reuse


def stay(*tensors: Tensor) -> None:
    """Leave the storages of these tensors on the device when saved tensors are offloaded, for as long as they live."""
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in _staying:
            if len(_staying) & (len(_staying) - 1) == 0:  # a power of two: once in a while
                for address in [address for address, weak in list(_staying.items()) if weak.expired()]:
                    _staying.pop(address, None)
            _staying[storage._cdata] = StorageWeakRef(storage)


def stays(storage: torch.UntypedStorage) -> bool:
    """Whether `stay` named a tensor of this storage."""
    return storage._cdata in _staying
