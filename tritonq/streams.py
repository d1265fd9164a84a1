"""Where tiles are computed: a device, its memory and its streams, behind the few calls that the scheduler makes.

Work goes to one of three lanes, "in" (copies to the device), "compute" and "out" (copies from it), which run beside
each other. `submit` returns an event that has passed when the work has ended; work waits on the device for the events
it names, and the host for an event only in `wait`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Event = Any  # of a backend; None has passed


class Backend:
    """A device without streams: what is submitted has happened when `submit` returns.

    Attributes:
        device: where tensors of this backend lie.
        depth: how many tiles are on their way at a time.
    """

    depth = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def holds(self, tensor: Tensor) -> bool:
        """Whether kernels of this device read and write a tensor where it is."""
        return tensor.device == self.device

    def copies(self, tensor: Tensor) -> bool:
        """Whether a tensor elsewhere can be copied from and to without the host taking part."""
        return True

    def empty(self, nbytes: int) -> Tensor:
        """Bytes on the device."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def staging(self, nbytes: int) -> Tensor:
        """Bytes of the host that can be copied from and to without the host taking part."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy between this device and elsewhere, within a function that is submitted."""
        target.copy_(source)

    def submit(self, lane: str, function: Callable[[], object], *after: Event) -> Event:
        """Run `function` on a lane after these events; the event of its end."""
        function()
        return None

    def wait(self, event: Event) -> None:
        """Hold the host until an event has passed."""

    def join(self) -> None:
        """Let whatever follows on the lane "compute" come after all that was submitted."""

    def here(self) -> Any:
        """What `record` takes and tells the stream that is the caller's current one from others."""
        return None

    def record(self, stream: Any = None) -> Event:
        """The event of all that the device was given so far on a stream, default `here()`."""
        return None

    def follow(self, event: Event) -> None:
        """Let what the caller gives the device from now on, on the stream that is its current one, come after an
        event."""
        self.wait(event)

    @property
    def stream(self) -> object | None:
        """What the lane "compute" is."""
        return None

    def borrow(self, tensor: Tensor) -> None:
        """Keep memory that was allocated for the lane "compute" until what the caller has given the device by the time
        it is freed, on the stream that is its current one, has ended."""

    def capture(self) -> object | None:
        """What tells the graph that the caller captures from others; None outside of captures."""
        return None

    def pin(self, memory: Tensor) -> Callable[[], object]:
        """Let host memory be copied from without the host taking part, until what is returned is called."""
        return lambda: None

    def synchronize(self) -> None:
        """Hold the host until everything has ended that the device was given."""
        self.join()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make this the current device."""
        yield


@functools.lru_cache(maxsize=64)
def _copy_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


@functools.lru_cache(maxsize=256)
def _stream(identity: int, index: int, kind: int) -> torch.cuda.Stream:
    """The object of a stream as `Cuda.here` tells it; torch.cuda.current_stream makes one each time."""
    return torch.cuda.Stream(stream_id=identity, device_index=index, device_type=kind)


@functools.cache
def _capture_info() -> Callable[..., int] | None:
    """cuStreamGetCaptureInfo_v2(stream, *status, *id, ...) of the driver; torch tells whether, not what is captured."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2  # type: ignore[no-any-return]
    except (OSError, AttributeError):
        return None


class Cuda(Backend):
    """A GPU. The lane "compute" is the stream that is the caller's current one when this is made, so that results
    follow it as those of any other operation. torch keeps freed pinned memory, and hands it out again once the copies
    that it was part of have ended; so staging buffers are reused from call to call.

    Args:
        own: whether the copies have streams of their own, which nobody else gives work; captures need that.
    """

    depth = 2

    def __init__(self, device: torch.device, own: bool = False) -> None:
        super().__init__(torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index))
        into, out = (_copy_streams.__wrapped__ if own else _copy_streams)(self.device)
        self._streams = {"in": into, "compute": torch.cuda.current_stream(self.device), "out": out}

    def copies(self, tensor: Tensor) -> bool:
        return tensor.is_contiguous() and not tensor.is_neg() and (tensor.is_cuda or tensor.is_pinned())

    def staging(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def submit(self, lane: str, function: Callable[[], object], *after: Event) -> Event:
        if torch._C._cuda_getDevice() != self.device.index:
            with torch.cuda.device(self.device):
                return self.submit(lane, function, *after)
        stream, before = self._streams[lane], _stream(*self.here())
        torch.cuda.set_stream(stream)  # torch.cuda.stream makes four objects more
        try:
            for event in after:
                if event is not None:
                    stream.wait_event(event)
            function()
            return stream.record_event()
        finally:
            torch.cuda.set_stream(before)

    def wait(self, event: Event) -> None:
        if event is not None:
            event.synchronize()

    def join(self) -> None:
        for lane in ("in", "out"):
            self._streams["compute"].wait_stream(self._streams[lane])

    def here(self) -> Any:
        return torch._C._cuda_getCurrentStream(self.device.index)  # torch.cuda.Stream costs several times as much

    def record(self, stream: Any = None) -> Event:
        return _stream(*(self.here() if stream is None else stream)).record_event()

    def follow(self, event: Event) -> None:
        if event is not None:
            _stream(*self.here()).wait_event(event)

    @property
    def stream(self) -> object | None:
        return self._streams["compute"]

    def borrow(self, tensor: Tensor) -> None:
        current = _stream(*self.here())
        if current != self._streams["compute"]:
            tensor.record_stream(current)

    def capture(self) -> object | None:
        if not torch.cuda.is_current_stream_capturing():
            return None
        status, identity = ctypes.c_int(0), ctypes.c_uint64(0)
        info, stream = _capture_info(), torch.cuda.current_stream(self.device).cuda_stream
        if info is None or info(
            ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(identity), None, None, None
        ):
            return "unknown"
        return identity.value

    def pin(self, memory: Tensor) -> Callable[[], object]:
        """cudaHostRegister: of exactly this memory, where torch's allocator of pinned memory rounds up to a power of
        two. RuntimeError where the driver refuses."""
        runtime, start = torch.cuda.cudart(), memory.data_ptr()
        with torch.cuda.device(self.device):
            code = int(runtime.cudaHostRegister(start, memory.nbytes, 1))  # 1: for every context
        if code:
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self.device)  # who launches next is told of the error, else somebody else
            raise RuntimeError(f"cudaHostRegister of {memory.nbytes} bytes of host memory failed with error {code}")
        return lambda: runtime.cudaHostUnregister(start)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        with torch.cuda.device(self.device), torch.cuda.stream(self._streams["compute"]):
            yield


Device = torch.device | str | Backend


def backend(device: Device) -> Backend:
    """The backend of a device; one that is passed in as it is."""
    if isinstance(device, Backend):
        return device
    found = torch.device(device)
    return Cuda(found) if found.type == "cuda" else Backend(found)
