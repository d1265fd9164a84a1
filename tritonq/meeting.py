"""Memory in which the programs of one launch meet (`tritonq.kernels.at_once`).

Launches that may run beside each other need slots of their own: each stream has some, and so has each launch that a
CUDA graph captures, because graphs are replayed on any stream. Slots are handed out of zeroed chunks, which capturing
cannot make; where none are left a launch has to do without.
"""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

_CHUNK = 32  # launches of graphs that are captured before the next call outside of a capture
_lock = threading.Lock()


class _Slots:
    """Of one device: `slots` int64 [2, count] each."""

    def __init__(self, device: torch.device, count: int) -> None:
        self.device, self.count = device, count
        self.of_streams: dict[int, Tensor] = {}
        self.free: list[Tensor] = []
        self.chunks: list[Tensor] = []  # never given back: graphs keep addresses of slots, not the slots

    def _grow(self) -> None:
        chunk = torch.zeros((_CHUNK, 2, self.count), dtype=torch.int64, device=self.device)
        torch.cuda.current_stream(self.device).synchronize()  # any stream may use it from here on
        self.chunks.append(chunk)
        self.free += chunk.unbind(0)

    def here(self) -> Tensor | None:
        with _lock:
            if torch.cuda.is_current_stream_capturing():
                return self.free.pop() if self.free else None
            if len(self.free) <= _CHUNK // 2:
                self._grow()
            stream = torch._C._cuda_getCurrentRawStream(self.device.index)
            found = self.of_streams.get(stream)
            if found is None:
                found = self.of_streams[stream] = self.free.pop()
            return found


@functools.cache
def _of(device: torch.device, count: int) -> _Slots:
    return _Slots(device, count)


def slots(device: torch.device, count: int) -> Tensor | None:
    """int64 [2, count] for a launch on the current stream of the current device, of at most `count` programs."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return _of(device, count).here()
