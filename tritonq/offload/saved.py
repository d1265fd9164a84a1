"""One storage on its way between a device and the host, and what autograd keeps in place of the tensors in it.

    resident --start--> leaving --release--> away --load--> back --all read--> away

A storage is resident until its copy is started, and is held while the copy runs. `release` lets the stream that it was
saved on wait for the copy and only then frees it. So the allocator hands the memory out again in the order of that
stream, at once, and how much is allocated does not depend on how fast copies are. With `record_stream` the allocator
would poll for the copy's end whenever the host, which runs ahead, asks for memory, and inside a CUDA graph it would
free nothing until the capture ends.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef

from tritonq.offload.pool import Buffer, PinnedPool
from tritonq.streams import Backend, Event

lock = threading.RLock()  # of all that follows: backward runs in threads of its own, and finalizers anywhere
Key = tuple[int, int, int]
_bases: dict[Key, weakref.ref[Base]] = {}
_limbo: list[tuple[Backend, Event, UntypedStorage, PinnedPool, Buffer]] = []  # died while another graph was captured


def key(storage: UntypedStorage) -> Key:
    """What tells a storage from others as long as something refers to it, be it weakly: where it is kept, where its
    bytes are, and how many. Addresses of bytes alone come back as soon as memory is freed, and so do `id`s."""
    return storage._cdata, storage.data_ptr(), storage.nbytes()


@functools.lru_cache(maxsize=64)
def _nothing(device: torch.device) -> Tensor:
    return torch.empty(0, device=device)


def version_of(tensor: Tensor) -> Tensor:
    """A tensor that shares the version counter of another, and none of its memory."""
    counter = tensor.detach()
    counter.data = _nothing(tensor.device)
    return counter


def check_version(counter: Tensor, version: int, shape: torch.Size, dtype: torch.dtype) -> None:
    """RuntimeError where autograd would raise it: hooks switch its own check off."""
    if counter._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
            f"of {dtype} {tuple(shape)} is at version {counter._version}; expected version {version} instead. It was "
            "saved within tritonq.offload.activations; clone it before it is changed, or change it out of place"
        )


class Base:
    """A storage of which tensors were saved.

    Attributes:
        state: "resident", "leaving", "away" or "back".
        storage: on the device; None while it is away.
        buffer: its bytes on the host, from the time when they are copied there.
        capture: the capture of a CUDA graph that it was saved in.
        home: the stream that the context was entered on, where it is another one than the tensor was saved on. The
            memory may be of that stream, which then waits for the copy, too, before it is freed.
        users, left: how many saved tensors lie in it, and how many were not read since it is back.
        group: which of the owner's groups it belongs to.
    """

    def __init__(self, tensor: Tensor, backend: Backend, pool: PinnedPool, owner: Any, home: Backend | None) -> None:
        storage = tensor.untyped_storage()
        self.backend, self.pool, self.owner = backend, pool, owner
        other = home is not None and home.device == backend.device and home.stream != backend.stream
        self.home = home if other else None
        self.nbytes, self.device, self.capture = storage.nbytes(), storage.device, backend.capture()
        self.state, self.storage = "resident", storage  # type: tuple[str, UntypedStorage | None]
        self.buffer: Buffer | None = None
        self.event: Event = None  # of the last copy
        self.moved_in: object | None = None  # the capture that the last copy is part of
        self.users = self.left = self.round = self.turn = 0
        self.group: Any = None
        self._counter, self._version = version_of(tensor), tensor._version
        self._weak: StorageWeakRef
        self._key: Key | None = None
        self._known_as(storage)

    @staticmethod
    def of(storage: UntypedStorage) -> Base | None:
        """The base of a storage, where it has one and has not changed since."""
        reference = _bases.get(key(storage))
        base = None if reference is None else reference()
        return base if base is not None and base._counter._version == base._version else None

    def _known_as(self, storage: UntypedStorage) -> None:
        self._forget()
        self._key, self._weak = key(storage), StorageWeakRef(storage)
        _bases[self._key] = weakref.ref(self)

    def _forget(self) -> None:
        known = None if self._key is None else _bases.get(self._key)
        if known is not None and known() in (self, None):
            _bases.pop(self._key, None)  # type: ignore[arg-type]

    def _elsewhere(self) -> UntypedStorage | None:
        """The storage where somebody else has kept it alive."""
        found: UntypedStorage | None = UntypedStorage._new_with_weak_ptr(self._weak.cdata)
        return found if found is not None and key(found) == self._key else None

    def start(self) -> None:
        """Begin to copy it to the host."""
        with self.backend.current():
            if self.state != "resident" or self.backend.capture() != self.capture:
                return
            buffer = self.pool.take(self.backend, self.nbytes, self.capture)
            copy = functools.partial(self.backend.copy, buffer.bytes[: self.nbytes], _flat(self.storage))
            self.event = self.backend.submit("out", copy, self.backend.record(), *buffer.events)
            self.buffer, self.moved_in, self.state = buffer, self.capture, "leaving"

    def release(self) -> bool:
        """Free it on the device, once its copy has ended; False where that has to wait for the end of a capture."""
        if self.state == "leaving":
            with self.backend.current():
                if self.backend.capture() != self.moved_in:
                    return False
                self._end_of_copy()
            self.storage, self.state = None, "away"
        return True

    def _end_of_copy(self) -> None:
        """Let the streams that the memory may be of come after the copy."""
        self.backend.follow(self.event)
        if self.home is not None:
            with self.home.current():
                if self.home.capture() == self.moved_in:
                    self.home.follow(self.event)

    def load(self) -> None:
        """Begin to copy it back, unless somebody has kept it alive."""
        if self.state != "away" or self._elsewhere() is not None:
            return
        assert self.buffer is not None
        with self.backend.current():
            target = self.backend.empty(self.nbytes)
            copy = functools.partial(self.backend.copy, target, self.buffer.bytes[: self.nbytes])
            self.event = self.backend.submit("in", copy, self.backend.record())
            self.moved_in = self.backend.capture()
        self.storage, self.state = target.untyped_storage(), "back"
        self.round, self.left = self.round + 1, self.users
        self._known_as(self.storage)

    def unload(self) -> None:
        """Let go of what is back; the host has it still."""
        if self.state == "back":
            with self.backend.current():
                if self.backend.capture() != self.moved_in:
                    return
                self.backend.follow(self.event)
            self.storage, self.state = None, "away"

    def read(self) -> UntypedStorage:
        """The storage, for what the caller gives its current stream from now on."""
        if self.state == "away":
            found = self._elsewhere()
            if found is not None:
                self._follow()
                return found
            now = self.backend.capture()
            if (now is None) != (self.capture is None):
                raise RuntimeError(
                    "a tensor was saved and offloaded outside of the CUDA graph that is captured now; run forward "
                    "inside of the capture, too"
                    if self.capture is None
                    else "a tensor was offloaded while a CUDA graph was captured, and backward runs outside of a "
                    "capture; capture backward, too"
                )
            self.load()
        assert self.storage is not None
        if self.state == "back":
            self._follow()
        return self.storage

    def _follow(self) -> None:
        """Let what the caller gives its current stream come after the last copy, which another one may wait for."""
        if self.backend.capture() == self.moved_in:
            self.backend.follow(self.event)

    def was_read(self) -> None:
        """One of the tensors in it needs it no more for now."""
        self.left -= 1
        if self.left <= 0:
            self.unload()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if finalizing() or not hasattr(self, "_weak"):
            return
        with lock:
            self._forget()
            self.owner._left(self)
            moving, storage, self.storage = self.state in ("leaving", "back"), self.storage, None
            if self.buffer is None:
                return
            if not moving:
                self.pool.put(self.buffer, self.event)
                return
            with self.backend.current():
                now = self.backend.capture()
                if now == self.moved_in:
                    self._end_of_copy()
                elif now is not None and self.moved_in is None and storage is not None:
                    _limbo.append((self.backend, self.event, storage, self.pool, self.buffer))
                    return
                # A graph that was captured owns its memory, whatever becomes of this.
            self.pool.put(self.buffer, self.event)


def settle() -> None:
    """Free what died during a capture that could not wait for its copies."""
    while _limbo:
        backend, event, _, pool, buffer = _limbo[-1]
        with backend.current():
            if backend.capture() is not None:
                return
            backend.follow(event)
        pool.put(buffer, event)
        _limbo.pop()


def _flat(storage: UntypedStorage | None) -> Tensor:
    """All bytes of a storage, uint8 [nbytes]."""
    assert storage is not None
    with torch.no_grad():
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class Kept:
    """A tensor that stays where it is."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # A tensor that came out of an operation would keep its graph alive, which keeps this.
        own = isinstance(tensor, torch.nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)
        self.tensor = tensor if own or (type(tensor) is not Tensor and tensor.is_leaf) else tensor.detach()
        self.version = None if tensor.is_inference() else tensor._version

    def unpack(self) -> Tensor:
        if self.version is not None:
            check_version(self.tensor, self.version, self.tensor.shape, self.tensor.dtype)
        return self.tensor


class Saved:
    """A view of a base."""

    __slots__ = ("base", "bits", "counter", "dtype", "offset", "round", "shape", "strides", "version")

    def __init__(self, tensor: Tensor, base: Base) -> None:
        self.base, self.dtype, self.shape, self.strides = base, tensor.dtype, tensor.shape, tensor.stride()
        self.offset, self.bits, self.round = tensor.storage_offset(), (tensor.is_conj(), tensor.is_neg()), 0
        self.counter, self.version = version_of(tensor), tensor._version
        base.users += 1
        base.left += 1

    def unpack(self) -> Tensor:
        check_version(self.counter, self.version, self.shape, self.dtype)
        with lock, torch.no_grad():
            base = self.base
            base.owner._reached(base)
            storage = base.read()
            found = torch.empty(0, dtype=self.dtype, device=storage.device)
            found.set_(storage, self.offset, self.shape, self.strides)  # type: ignore[call-overload]
            if base.state != "resident":
                base.backend.borrow(found)
            found = found._conj() if self.bits[0] else found
            found = found._neg_view() if self.bits[1] else found
            tensor = self.counter.detach()  # whoever changes it is seen by those who read it after
            tensor.data = found
            if base.state == "back" and self.round != base.round:
                self.round = base.round
                base.was_read()
            return tensor

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if finalizing() or not hasattr(self, "version"):
            return
        with lock:
            base = self.base
            base.users -= 1
            if base.state != "back" or self.round != base.round:
                base.left -= 1
            if base.state == "back" and base.left <= 0 and base.users:
                base.unload()


class Wrapped:
    """A tensor made of others, such as a QTensor of its buffer."""

    __slots__ = ("cls", "context", "counter", "inner", "shape", "strides", "version")

    def __init__(self, tensor: Tensor, context: Any, inner: dict[str, Any]) -> None:
        self.cls, self.context, self.inner = type(tensor), context, inner
        self.shape, self.strides = tensor.size(), tensor.stride()
        self.counter, self.version = _emptied(tensor, list(inner)), tensor._version

    def unpack(self) -> Tensor:
        if self.counter is not None:
            check_version(self.counter, self.version, self.shape, self.counter.dtype)
        inner = {name: packed.unpack() for name, packed in self.inner.items()}
        with torch.no_grad():
            rebuild: Callable[..., Tensor] = self.cls.__tensor_unflatten__  # type: ignore[attr-defined]
            return rebuild(inner, self.context, self.shape, self.strides)


def _emptied(tensor: Tensor, names: list[str]) -> Tensor | None:
    """An alias without memory, whose version counter is that of the tensor."""
    try:
        alias = tensor.detach()
        for name in names:
            setattr(alias, name, _nothing(tensor.device))
    except (AttributeError, RuntimeError, TypeError):  # a class that guards its parts; they have counters of their own
        return None
    return alias


Packed = Kept | Saved | Wrapped


def unpack(packed: Packed) -> Tensor:
    return packed.unpack()
