"""Reused buffers for the intermediates of a tile on the CPU: fresh memory costs a page fault every 4 KiB."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

_local = threading.local()


@contextlib.contextmanager
def reuse() -> Iterator[None]:
    """Inside, `buffer` hands out the same memory again for each name; so results of a tile die with the next tile."""
    if getattr(_local, "buffers", None) is not None:
        yield
        return
    _local.buffers = {}
    try:
        yield
    finally:
        _local.buffers = None


def buffer(name: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised contiguous tensor of the shape of `like`: memory of its own, or inside `reuse` that of `name`."""
    dtype = dtype or like.dtype
    buffers = getattr(_local, "buffers", None)
    if buffers is None or like.device.type != "cpu":
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    known = buffers.get(name)
    if known is None or known.dtype is not dtype or known.numel() < like.numel():
        known = buffers[name] = torch.empty(like.numel(), dtype=dtype)
    return known[: like.numel()].view(like.shape)
