"""Allocating results.

A large result on the CPU is written once, front to back, and with pages of 4 KiB the page faults take longer than the
arithmetic. Huge pages are asked for from 4 MiB on, as NumPy does for its arrays; an operating system that has none to
give ignores the request.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

HUGE = 4 << 20


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
