"""Host memory of offloaded groups: one slab a group, exact-sized and allocated once.

A slab is the master copy: quantized weights don't change, so a group leaves the device by pointing back here. Slabs lie
in pages of their own that are registered with the driver (torch's allocator of pinned memory rounds up to powers of
two), or in a file.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import mmap
import os
import tempfile
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonq.streams import Backend, Event

BLOCK = 4096  # direct reads begin and end at multiples of this
REQUEST = 8 << 20  # bytes of one read


class HostSlab:
    """Bytes `start:start + nbytes` of a mapping.

    Attributes:
        bytes: all of them, uint8 [nbytes].
    """

    def __init__(self, mapping: mmap.mmap, start: int, nbytes: int) -> None:
        self._mapping, self._start, self.nbytes = mapping, start, nbytes
        self.bytes = self.piece(0, nbytes)

    def piece(self, offset: int, nbytes: int) -> Tensor:
        """Bytes of the slab as a tensor with a storage of its own, so that saving it saves nothing else."""
        with torch.inference_mode(False):
            return torch.frombuffer(self._mapping, dtype=torch.uint8, count=nbytes, offset=self._start + offset)


class HostArena:
    """Pinned host memory, slab by slab. It is unpinned by `close`, or when the arena is collected; tensors over it stay
    valid."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._releases: list[Callable[[], object]] = []
        self._end: weakref.finalize[..., HostArena] = weakref.finalize(self, _release, backend, self._releases)
        self._end.atexit = False  # the process ends, and the driver with it

    def slab(self, nbytes: int) -> HostSlab:
        """A slab of exactly `nbytes` bytes."""
        mapping = _anonymous(nbytes)
        slab = HostSlab(mapping, 0, nbytes)
        try:
            self._releases.append(self._backend.pin(slab.bytes))
        except RuntimeError as refused:
            warnings.warn(f"{refused}; copies from pageable memory hold up the host", stacklevel=2)
        return slab

    def load(self, slab: HostSlab, target: Tensor, after: list[Event]) -> Event:
        """Copy a slab to the device after some events; the event of its end."""
        source, copy = slab.bytes, self._backend.copy
        return self._backend.submit("in", lambda: copy(target, source), *after)

    def finish(self) -> None:
        """Called when all slabs are filled."""

    def close(self) -> None:
        """Unpin all slabs, once nothing is copied any more."""
        self._end()


def _release(backend: Backend, releases: list[Callable[[], object]]) -> None:
    if releases:
        backend.synchronize()
    while releases:
        releases.pop()()


def _anonymous(nbytes: int) -> mmap.mmap:
    """Memory of the process alone, in huge pages where there are some, which makes registering faster."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, nbytes)
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


class DiskArena(HostArena):
    """Slabs in one file, and two pinned buffers of the largest slab through which a thread reads them ahead.

    Tensors over a slab are mapped from the file: right wherever they are read, and no memory of the process.

    Args:
        path: a file that does not exist yet, or a folder for one. The file gets its name when it is complete.
        sizes: bytes of every slab, in the order in which `slab` is called.
    """

    def __init__(self, backend: Backend, path: str | os.PathLike[str], sizes: list[int]) -> None:
        super().__init__(backend)
        wanted = Path(path)
        folder = wanted if wanted.is_dir() else wanted.parent
        if wanted.exists() and not wanted.is_dir():
            raise FileExistsError(f"{wanted} exists; remove it, or pass another path as disk")
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; create it, or pass another path as disk")
        self._starts, end = [], 0
        for size in sizes:
            self._starts.append(end)
            end += -(-size // BLOCK) * BLOCK
        descriptor, name = tempfile.mkstemp(prefix=".tritonq-", suffix=".partial", dir=folder)
        self._aside = Path(name)
        self.path = wanted if folder is not wanted else self._aside.with_name(f"{self._aside.name[1:-8]}.weights")
        self._files = [descriptor]
        self._paths = [self._aside]
        self._end.detach()
        self._end = weakref.finalize(self, _remove, backend, self._releases, self._files, self._paths)
        os.posix_fallocate(descriptor, 0, max(end, BLOCK))
        self._mapping = mmap.mmap(descriptor, max(end, BLOCK))
        largest = -(-max(sizes, default=1) // BLOCK) * BLOCK
        self._staging = [HostArena.slab(self, largest) for _ in range(2)]
        self._free: list[Event] = [None, None]
        self._turn, self._next = 0, 0
        self._reader: concurrent.futures.ThreadPoolExecutor | None = None

    def slab(self, nbytes: int) -> HostSlab:
        start = self._starts[self._next]
        self._next += 1
        return HostSlab(self._mapping, start, nbytes)

    def finish(self) -> None:
        self._mapping.flush()
        os.fsync(self._files[0])
        os.rename(self._aside, self.path)
        self._paths[:] = [self.path]
        with contextlib.suppress(OSError, AttributeError):  # a file system without direct reads
            self._files.append(os.open(self.path, os.O_RDONLY | os.O_DIRECT))
        with contextlib.suppress(OSError, AttributeError):
            os.posix_fadvise(self._files[0], 0, 0, os.POSIX_FADV_DONTNEED)
        # One thread: reads come one after the other as copies do.
        self._reader = concurrent.futures.ThreadPoolExecutor(1, "tritonq-disk")

    def load(self, slab: HostSlab, target: Tensor, after: list[Event]) -> concurrent.futures.Future[Event]:
        assert self._reader is not None
        if self._backend.capture() is not None:
            raise RuntimeError("weights on a disk cannot be read within a CUDA graph; enable offload without disk=")
        turn = self._turn
        self._turn = 1 - turn
        return self._reader.submit(_read_and_copy, self, turn, slab, target, after)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.shutdown()
        super().close()


def _read_and_copy(arena: DiskArena, turn: int, slab: HostSlab, target: Tensor, after: list[Event]) -> Event:
    arena._backend.wait(arena._free[turn])
    staging = arena._staging[turn].bytes
    read(arena._files, slab._start, slab.nbytes, memoryview(staging.numpy()))  # type: ignore[arg-type]
    source, copy = staging[: slab.nbytes], arena._backend.copy
    event = arena._backend.submit("in", lambda: copy(target, source), *after)
    arena._free[turn] = event
    return event


def read(files: list[int], start: int, nbytes: int, target: memoryview) -> None:
    """Bytes of a file, by its last descriptor in whole blocks, or by its first where that refuses.

    Raises:
        OSError: the file is shorter, or cannot be read.
    """
    done = 0
    while done < nbytes:
        size = min(REQUEST, -(-(nbytes - done) // BLOCK) * BLOCK)
        try:
            got = os.preadv(files[-1], [target[done : done + size]], start + done)
        except OSError:
            if len(files) < 2:
                raise
            os.close(files.pop())
            continue
        if got == 0:
            raise OSError(f"offloaded weights: the file ends at byte {start + done}, {nbytes - done} are missing")
        done += got
        if got % BLOCK and done < nbytes and len(files) > 1:  # a direct read cannot go on from here
            os.close(files.pop())


def _remove(backend: Backend, releases: list[Callable[[], object]], files: list[int], paths: list[Any]) -> None:
    _release(backend, releases)
    while files:
        os.close(files.pop())
    while paths:
        paths.pop().unlink(missing_ok=True)
