"""A device that is none: memory of its own, streams whose work waits in queues, faults on demand."""

import contextlib
import random
import threading
import weakref

import torch

from tritonq import streams


class Event:
    def __init__(self, device):
        self.device, self.passed = device, False


class FakeDevice(streams.Backend):
    """Host memory that only tensors made by `empty` count as being "on".

    Work is queued by lane and runs as late as it may: when the host waits or joins, lanes in random order, each work
    after what it names. What a real device could still read or write when the host goes on, it reads or writes then.

    Args:
        pinned: whether host memory is copied from and to without staging.
        lazy: queue the work; else it happens at once.
        faults: which allocations ("empty") or computations ("compute"), counted from 0, run out of memory.
        capacity: bytes that may be allocated at a time.
        shared: whether several threads use it at a time.
    """

    depth = 3

    def __init__(self, pinned=False, lazy=True, faults=(), capacity=None, seed=0, shared=False):
        super().__init__(torch.device("cpu"))
        self.pinned, self.lazy, self.faults, self.capacity = pinned, lazy, set(faults), capacity
        self.queues = {"in": [], "compute": [], "out": []}
        self.random = random.Random(seed)
        self._lock = threading.RLock() if shared else contextlib.nullcontext()  # devices wait for each other
        self.spans, self.live, self.peak, self.counts = {}, 0, 0, {"empty": 0, "compute": 0}

    def _fault(self, kind):
        self.counts[kind] += 1
        if (kind, self.counts[kind] - 1) in self.faults or kind in self.faults:
            raise torch.OutOfMemoryError(f"fake device: {kind} {self.counts[kind] - 1}")

    def holds(self, tensor):
        return any(start <= tensor.data_ptr() < end for start, end in list(self.spans.values()))

    def copies(self, tensor):
        return self.pinned and tensor.is_contiguous()

    def empty(self, nbytes):
        with self._lock:
            return self._empty(nbytes)

    def _empty(self, nbytes):
        self._fault("empty")
        if self.capacity is not None and self.live + nbytes > self.capacity:
            raise torch.OutOfMemoryError(f"fake device: {nbytes} bytes beside {self.live}")
        made = torch.full((nbytes,), 0xA5, dtype=torch.uint8)
        key, storage = object(), made.untyped_storage()
        self.spans[key] = made.data_ptr(), made.data_ptr() + nbytes
        self.live += nbytes
        self.peak = max(self.peak, self.live)

        def freed():
            del self.spans[key]
            self.live -= nbytes

        weakref.finalize(storage, freed)
        return made

    def submit(self, lane, function, *after):
        if lane == "compute" and after:  # not the event that a slot begins with
            self._fault("compute")
        event = Event(self)
        with self._lock:
            self.queues[lane].append((event, function, [before for before in after if before is not None]))
        if not self.lazy:
            self.join()
        return event

    def _step(self):
        """Run the first work of a lane that waits for nothing."""
        for queue in filter(None, self.queues.values()):
            for event in queue[0][2]:
                if event.device is not self:
                    event.device.wait(event)
        ready = [lane for lane, q in self.queues.items() if q and all(event.passed for event in q[0][2])]
        lane = self.random.choice(ready)
        event, function, _ = self.queues[lane].pop(0)
        function()
        event.passed = True

    def wait(self, event):
        with self._lock:
            while event is not None and not event.passed:
                self._step()

    def join(self):
        with self._lock:
            while any(self.queues.values()):
                self._step()
