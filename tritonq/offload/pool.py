"""Pinned host memory for what leaves a device for a while, kept for the next time.

A buffer has the size of its class, n rounded up to a multiple of 2^(k - 3) for 2^k < n <= 2^(k + 1) and to pages: less
than an eighth of it is unused. A free buffer is written to once the copies it took part in have ended, for which a
stream waits and never the host. What a pool holds is at most twice what was in use at a time: beyond that, new buffers
take the place of free ones, the oldest first.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tritonq.streams import Backend, Device, Event, backend

PAGE = 4096


def size_class(nbytes: int) -> int:
    """Bytes of the buffer for so many bytes: at least those, and less than an eighth or a page more."""
    unit = max(PAGE, 1 << max(0, (nbytes - 1).bit_length() - 4))
    return -(-nbytes // unit) * unit


class Buffer:
    """Pinned host memory.

    Attributes:
        bytes: uint8 [size].
        events: after which nothing reads or writes it any more.
        capture: the capture of a CUDA graph that owns it.
    """

    __slots__ = ("_backend", "_unpin", "bytes", "capture", "events")

    def __init__(self, device: Backend, size: int) -> None:
        self._backend = device
        self.events: tuple[Event, ...] = ()
        self.capture: object | None = None
        self._unpin: Callable[[], object] | None = None
        memory = _pages(size)
        try:
            self._unpin = device.pin(memory)
            self.bytes = memory
        except RuntimeError:  # the driver registers no such memory; torch's own is rounded up to powers of two
            self.bytes = device.staging(size)

    def close(self) -> None:
        """Unpin it, after the host has waited for its copies."""
        for event in self.events:
            self._backend.wait(event)
        self.events = ()
        if self._unpin is not None:
            self._unpin()
            self._unpin = None

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not finalizing() and hasattr(self, "_unpin"):  # else the process ends, and the driver with it
            self.close()


def _pages(size: int) -> Tensor:
    """Memory in pages of its own: huge ones where there are some, which are quicker to pin, and none that a child
    process shares, since a device goes on with those that were pinned when a write gives this process others."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    mapping = mmap.mmap(-1, size, **private)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, advice):
            with contextlib.suppress(OSError):
                mapping.madvise(getattr(mmap, advice))
    with torch.inference_mode(False):
        return torch.frombuffer(mapping, dtype=torch.uint8)


class PinnedPool:
    """Buffers by size class, for any device and thread.

    Attributes:
        used, held: bytes of buffers in use, and of all.
        most: the most bytes that were in use at a time.
    """

    def __init__(self) -> None:
        self._free: dict[int, deque[Buffer]] = {}
        self._graphs: dict[object, list[Buffer]] = {}  # everything that a captured graph copies from and to
        self._spare: dict[object, list[Buffer]] = {}  # of those, what the capture may use again
        self._lock = threading.RLock()  # buffers come back from finalizers
        self.used = self.held = self.most = 0

    def take(self, device: Backend, nbytes: int, capture: object | None = None) -> Buffer:
        """A buffer of at least `nbytes` bytes, to be written to after its `events`.

        Args:
            capture: the capture that copies to it: the buffer then belongs to the graph, and none is allocated.

        Raises:
            RuntimeError: no free buffer of this size during a capture.
        """
        size = size_class(nbytes)
        with self._lock:
            spare = self._spare.get(capture, ()) if capture is not None else ()
            found = next((buffer for buffer in spare if len(buffer.bytes) == size), None)
            if found is not None:
                self._spare[capture].remove(found)
            elif self._free.get(size):
                found = self._free[size].popleft()
                if capture is not None:
                    # The device was idle when the capture began, and a capture cannot wait for what came before.
                    found.events, found.capture = (), capture
                    self._graphs.setdefault(capture, []).append(found)
            elif capture is not None:
                raise RuntimeError(
                    f"a CUDA graph is captured, and no free pinned buffer of {size} bytes is left for a saved tensor "
                    f"of {nbytes} bytes; none can be allocated now. Run the step that you capture once before, without "
                    "capturing (torch.cuda.graph wants that warm-up anyway), or call PinnedPool.reserve"
                )
            else:
                found = self._new(device, size)
            self.used += size
            self.most = max(self.most, self.used)
            return found

    def _new(self, device: Backend, size: int) -> Buffer:
        while self.held + size > 2 * max(self.most, self.used + size) and self._drop_oldest():
            pass
        buffer = Buffer(device, size)
        self.held += size
        return buffer

    def _drop_oldest(self) -> bool:
        for size, buffers in self._free.items():  # classes in the order in which they came into use
            if buffers:
                buffers.popleft().close()
                self.held -= size
                return True
        return False

    def put(self, buffer: Buffer, *events: Event) -> None:
        """Take a buffer back, which is in use until these events."""
        size = len(buffer.bytes)
        with self._lock:
            self.used -= size
            if buffer.capture is not None:
                self._spare.setdefault(buffer.capture, []).append(buffer)
                return
            buffer.events = tuple(event for event in events if event is not None)
            self._free.setdefault(size, deque()).append(buffer)

    def reserve(self, device: Device, sizes: Iterable[int]) -> None:
        """Have free buffers for tensors of these many bytes, all at a time."""
        with self._lock:
            taken = [self.take(backend(device), nbytes) for nbytes in sizes]
            for buffer in taken:
                self.put(buffer, *buffer.events)

    def forget_graphs(self) -> None:
        """Take back the buffers of all captured CUDA graphs, which must not be replayed any more."""
        with self._lock:
            for buffers in self._graphs.values():
                for buffer in buffers:
                    buffer._backend.synchronize()  # of replays nobody has an event
                    buffer.capture = None
                    if any(buffer is spare for spares in self._spare.values() for spare in spares):
                        self._free.setdefault(len(buffer.bytes), deque()).append(buffer)
            self._graphs, self._spare = {}, {}

    def trim(self) -> None:
        """Unpin and free every buffer that is not in use; the host waits for their copies."""
        with self._lock:
            while self._drop_oldest():
                pass
            self._free = {}
            self.most = self.used

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if finalizing():
            return
        for of_graph in self._graphs.values():
            _orphans.extend(of_graph)


_orphans: list[Buffer] = []  # graphs may outlive the pool, and nobody says when they are gone
default = PinnedPool()
