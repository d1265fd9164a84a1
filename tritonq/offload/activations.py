"""Tensors that autograd saves for backward, in pinned host memory meanwhile.

Storages move, not tensors: whatever views of one are saved, it is copied once. They are put into groups in the order in
which they are saved. Forward copies a group to the host while the next ones are computed; backward copies groups back
in reverse, some of them ahead. Everything is ordered by events between streams, and the host waits for nothing.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tritonq import memory, streams
from tritonq.offload import pool as pools
from tritonq.offload.saved import Base, Kept, Packed, Saved, Wrapped, lock, settle, unpack

_threads = threading.local()  # .contexts: those that are open in a thread, the innermost last


def _contexts() -> list[tuple[Activations, Any, bool, streams.Backend | None]]:
    if not hasattr(_threads, "contexts"):
        _threads.contexts = []
    found: list[tuple[Activations, Any, bool, streams.Backend | None]] = _threads.contexts
    return found


class Group:
    """Storages that were saved one after the other, and move together."""

    def __init__(self, index: int, entry: int, layer: Hashable) -> None:
        self.index, self.entry, self.layer, self.nbytes = index, entry, layer, 0
        self._bases: list[weakref.ref[Base]] = []

    def add(self, base: Base) -> None:
        self._bases.append(weakref.ref(base))
        self.nbytes += base.nbytes
        base.group = self

    def bases(self) -> list[Base]:
        """Those that are still wanted, in the order in which they were saved."""
        return [base for base in (reference() for reference in self._bases) if base is not None]


class Activations:
    """See `activations`, which makes one.

    Attributes:
        pool: where the pinned memory comes from.
        nbytes: bytes of the storages that are offloaded now, or may be.
    """

    def __init__(
        self, min_bytes: int, max_bytes: int | None, keep_last: int, group_bytes: int | None, in_flight: int,
        prefetch: int, share: float, manual: bool, device: streams.Device | None, pool: pools.PinnedPool,
    ) -> None:  # fmt: skip
        self._min_bytes, self._max_bytes, self._keep_last, self._group_bytes = (
            min_bytes, max_bytes, keep_last, group_bytes,
        )  # fmt: skip
        self._in_flight, self._prefetch, self._manual = in_flight, prefetch, manual
        self._device = torch.device(device) if isinstance(device, str | int) else device
        self.pool, self.nbytes = pool, 0
        self._groups: list[Group] = []  # by index
        self._group: Group | None = None  # the one that is filled
        self._waiting: deque[Group] = deque()  # not started yet
        self._leaving: deque[Group] = deque()
        self._early: list[Packed] = []  # of start_offload, until autograd has saved them
        self._index, self._layer, self._next_layer = 0, None, 0  # type: tuple[int, Hashable, int]
        self._depth, self._entry = 0, 0
        self._share, self._offered, self._moved = share, 0, 0  # bytes since the outermost entry
        self._cursor, self._turn, self._last_entry = (
            -1,
            0,
            0,
        )  # where backward is, in the how manieth, and its latest entry
        self._saved = False  # something in this step
        self._layers: set[Hashable] = set()

    # ------------------------------------------------------------------------------------------------- as a context

    def __enter__(self) -> Activations:
        self._open(self._number() if self._manual else None, drain=True)
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        with contextlib.suppress(RuntimeError) if kind is not None else contextlib.nullcontext():
            self._close()  # what went wrong within is what the caller hears of

    @contextlib.contextmanager
    def layer(self, name: Hashable = None) -> Iterator[Activations]:
        """A layer: a group of its own, or several. Its number is that of calls since the last backward, or `name`.

        Unlike the end of the whole context, that of a layer waits for no copy."""
        self._open(self._number() if name is None else name, drain=False)
        try:
            yield self
        finally:
            self._close()

    def _number(self) -> int:
        """The next layer's."""
        with lock:
            if self._cursor >= 0 or (self._saved and self.nbytes == 0):  # the last step is over
                self._next_layer, self._cursor, self._saved = 0, -1, False
                self._prune()
                self._layers = {group.layer for group in self._groups}
            self._next_layer += 1
            return self._next_layer - 1

    def _open(self, name: Hashable, drain: bool) -> None:
        with lock:
            settle()
            if self._cursor >= 0:  # after a backward
                self._cursor = -1
                self._prune()
            if self._depth == 0:
                self._offered = self._moved = 0
            self._layer, self._group = name, None
            self._layers.add(name)
            self._depth += 1
            self._entry += 1
            memory.offloading += 1
        hooks = saved_tensors_hooks(self._pack, unpack)
        hooks.__enter__()
        own = isinstance(self._device, streams.Backend)
        home = streams.backend("cuda") if torch.cuda.is_initialized() and not own else None
        _contexts().append((self, hooks, drain, home))

    def _close(self) -> None:
        _, hooks, drain, _ = _contexts().pop()
        hooks.__exit__()
        with lock:
            memory.offloading -= 1
            self._depth -= 1
            self._layer = self._group = None
            if self._depth == 0:
                self._early.clear()
            outermost = all(context is not self for context, *_ in _contexts())  # in this thread
            if outermost and drain and not self._manual:
                self.flush()

    def flush(self) -> None:
        """Let the stream wait for all copies to the host that are under way, and free what they copied."""
        with lock:
            self._leaving = deque(group for group in self._leaving if not self._release(group))

    # ---------------------------------------------------------------------------------------------- saving and reading

    def _pack(self, tensor: Tensor) -> Packed:
        with lock, torch.no_grad():
            return self._packed(tensor)

    def _packed(self, tensor: Tensor) -> Packed:
        root = tensor if tensor._base is None else tensor._base
        if isinstance(root, nn.Parameter) or (root.is_leaf and root.requires_grad) or tensor.is_inference():
            return Kept(tensor)  # alive anyway
        if type(tensor) is Tensor:
            base = self._base(tensor)
            return Kept(tensor) if base is None else Saved(tensor, base)
        if is_traceable_wrapper_subclass(tensor):
            names, context = tensor.__tensor_flatten__()
            inner = {name: self._packed(getattr(tensor, name)) for name in names}
            if any(not isinstance(packed, Kept) for packed in inner.values()):
                return Wrapped(tensor, context, inner)
        return Kept(tensor)

    def _backend(self, tensor: Tensor) -> streams.Backend | None:
        if isinstance(self._device, streams.Backend):
            return self._device if self._device.holds(tensor) else None
        wanted = self._device is None or self._device.type == "cuda"
        if not tensor.is_cuda or not wanted:
            return None
        if self._device is not None and self._device.index not in (None, tensor.device.index):
            return None
        return streams.backend(tensor.device)

    def _base(self, tensor: Tensor) -> Base | None:
        """The base of a tensor; None where it stays."""
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor._is_zerotensor():
            return None
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return None
        storage = tensor.untyped_storage()
        if storage.nbytes() < max(1, self._min_bytes) or memory.stays(storage):
            return None
        base = Base.of(storage)
        if base is not None:
            return base
        backend = self._backend(tensor)
        if backend is None:
            return None
        self._offered += storage.nbytes()
        beyond = self._max_bytes is not None and self.nbytes + storage.nbytes() > self._max_bytes
        if beyond or self._moved + storage.nbytes() > self._share * self._offered:
            memory.stay(tensor)  # with all views that are saved after this one
            return None
        self._moved += storage.nbytes()
        home = next((home for context, _, _, home in _contexts() if context is self), None)  # of the outermost entry
        base = Base(tensor, backend, self.pool, self, home)
        self.nbytes += base.nbytes
        if self._group is None or (self._group_bytes is not None and self._group.nbytes >= self._group_bytes):
            self._begin_group()
        assert self._group is not None
        self._group.add(base)
        if not self._manual and self._keep_last == 0:
            base.start()
        return base

    def _left(self, base: Base) -> None:
        """A base is gone."""
        self.nbytes -= base.nbytes

    def _begin_group(self) -> None:
        self._group = Group(self._index, self._entry, self._layer)
        self._index, self._saved = self._index + 1, True
        self._groups.append(self._group)
        if len(self._groups) & (len(self._groups) - 1) == 0:  # a power of two: once in a while
            self._prune()
        if self._manual:
            return
        self._waiting.append(self._group)
        while len(self._waiting) > self._keep_last:
            group = self._waiting.popleft()
            for base in group.bases():
                base.start()
            self._leaving.append(group)
        while len(self._leaving) > self._in_flight:
            self._release(self._leaving.popleft())

    def _release(self, group: Group) -> bool:
        done = [base.release() for base in group.bases()]  # every one of them
        return all(done)

    def _prune(self) -> None:
        """Forget groups of which nothing is wanted any more."""
        self._groups = [group for group in self._groups if group is self._group or group.bases()]
        alive = {group.index for group in self._groups}
        self._waiting = deque(group for group in self._waiting if group.index in alive)
        self._leaving = deque(group for group in self._leaving if group.index in alive)

    def _reached(self, base: Base) -> None:
        """Backward reads a base: begin to copy back what it reads next."""
        index, last = base.group.index, self._cursor
        self._cursor = index
        if index == last or self._manual:
            return
        # Another backward: of what was saved later, or of what was read before. (Within one, reads go up and down a
        # little.) What was fetched for the last one, which never read it, is let go.
        if base.group.entry > self._last_entry or (base.state == "away" and base.turn == self._turn):
            self._turn, self._last_entry = self._turn + 1, base.group.entry
            for group in self._groups:
                for other in group.bases():
                    if other.turn > 0 and other.left == other.users:
                        other.unload()
        self._fetch(base, base)
        with contextlib.suppress(torch.OutOfMemoryError):  # what is only wanted later
            self._fetch_ahead(base)

    def _fetch_ahead(self, base: Base) -> None:
        end = bisect.bisect_right(self._groups, base.group.index, key=lambda group: group.index)
        wanted = self._prefetch + 1
        while end > 0 and wanted > 0:
            end -= 1
            bases = self._groups[end].bases()
            wanted -= bool(bases)
            for other in reversed(bases):
                self._fetch(other, base)

    def _fetch(self, base: Base, reached: Base) -> None:
        # Copies that a graph did not capture cannot be waited for in it, so graphs prefetch what they saved themselves.
        if base.state == "away" and base.turn != self._turn and base.capture == reached.capture:
            if (base.capture is None) != (base.backend.capture() is None):
                return
            base.load()
            if base.state == "back":  # else somebody has kept it alive
                base.turn = self._turn

    # ------------------------------------------------------------------------------------------------- manual control

    def _of(self, layer: Hashable) -> list[Base]:
        with lock:
            if layer is None or layer not in self._layers:
                raise ValueError(
                    f"no layer {layer!r}; layers so far: {sorted(map(repr, self._layers - {None}))}. Each entry of "
                    "a manual context, or of .layer(), is one, counted from 0 since the last backward, or named"
                )
            return [base for group in self._groups if group.layer == layer for base in group.bases()]

    def start_offload_layer(self, layer: Hashable) -> None:
        """Begin to copy what a layer saved to the host."""
        with lock:
            for base in self._of(layer):
                base.start()

    def release(self, layer: Hashable) -> None:
        """Let the stream wait for the copies of a layer to the host, and free what they copied on the device. What was
        not started stays."""
        with lock:
            for base in self._of(layer):
                base.release()

    release_activation_forward_gpu_memory = release  # TransformerEngine's name

    def start_reload_layer(self, layer: Hashable) -> None:
        """Begin to copy back what a layer saved; backward waits for each tensor as it reads it."""
        with lock:
            for base in reversed(self._of(layer)):
                base.load()

    def start_offload(self, *tensors: Tensor) -> None:
        """See `start_offload`, for this context."""
        with lock, torch.no_grad():
            for tensor in tensors:
                packed = self._packed(tensor)
                for saved in _saved(packed):
                    saved.base.start()
                    self._early.append(saved)


def _saved(packed: Packed) -> list[Saved]:
    if isinstance(packed, Wrapped):
        return [saved for inner in packed.inner.values() for saved in _saved(inner)]
    return [packed] if isinstance(packed, Saved) else []


# ---------------------------------------------------------------------------------------------------- public functions


def activations(
    *,
    min_bytes: int | str = "64KiB",
    max_bytes: int | str | None = None,
    keep_last: int = 0,
    group_bytes: int | str | None = "4MiB",
    in_flight: int = 4,
    prefetch: int = 4,
    share: float = 1.0,
    manual: bool = False,
    device: streams.Device | None = None,
    pool: pools.PinnedPool | None = None,
) -> Activations:
    """A context whose forward passes keep what autograd saves in pinned host memory until backward wants it.

        with tq.offload.activations():
            loss = model(x)
        loss.backward()

    Outputs and gradients are the same, bit for bit. What moves is whole storages of tensors on a GPU: views of one are
    one copy, and a quantized tensor is its one buffer. What stays: parameters and other leaves that require a gradient
    and their views, what `mark_not_offload` named, the weights of quantized linear layers, storages of fewer than
    `min_bytes` bytes. What somebody else keeps alive is copied, since that cannot be known, but not copied back.

    When the context ends, the stream has waited for all copies, and nothing that was offloaded is allocated any more.
    On the device there are, beside what the model itself keeps, at most `in_flight` groups and the one being filled
    during forward (and `keep_last` more), and `prefetch` groups and the one being read during backward.

    Args:
        min_bytes: the smallest storage that moves; a number, or a text such as "1MiB".
        max_bytes: the most bytes that may be offloaded at a time; what comes after stays on the device.
        keep_last: how many groups at the end of forward stay on the device, since backward wants them first.
        group_bytes: a group is full when it has so many bytes (a larger storage is a group of its own). None: only
            layers (`Activations.layer`, or entering the context again) begin groups.
        in_flight: how many groups may be on their way to the host before the stream waits for the first of them.
        prefetch: how many groups backward copies back ahead of the one it reads.
        share: of the bytes that could move, how many do, spread evenly over forward: copies that would take longer than
            the computation hide behind it again. Each pass moves the same storages.
        manual: move nothing but what `start_offload_layer`, `release` and `start_reload_layer` say; what backward reads
            and nobody has asked back is copied back then. Each entry of the context is a layer, counted from 0.
        device: only tensors of this device; default every GPU.
        pool: where pinned memory comes from; default one for the process.

    Returns:
        The context, which can be entered many times, also one within the other, where the innermost counts.

    Raises:
        ValueError: a size that is none, a negative number, no share, or no group in flight. RuntimeError, in forward:
            pinned memory cannot be had; in backward: a tensor was changed in place since it was saved, or a CUDA graph
            has captured only one of forward and backward.
    """
    for name, value, least in (("keep_last", keep_last, 0), ("in_flight", in_flight, 1), ("prefetch", prefetch, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is a number of groups, at least {least}, got {value!r}")
    if not 0 < share <= 1:
        raise ValueError(f"share is a part of all bytes, more than 0 and at most 1, got {share!r}")
    size: Callable[..., int] = memory.parse_size
    return Activations(
        0 if min_bytes == 0 else size(min_bytes, "min_bytes"),
        None if max_bytes is None else 0 if max_bytes == 0 else size(max_bytes, "max_bytes"),
        keep_last,
        None if group_bytes is None else size(group_bytes, "group_bytes"),
        in_flight,
        prefetch,
        share,
        manual,
        device,
        pools.default if pool is None else pool,
    )


def start_offload(*tensors: Tensor) -> None:
    """Begin to copy tensors to the host that autograd is about to save, in the innermost open context of this thread.

    Call it where the tensors are complete: what is saved later of the same storages adds no copy. Outside of
    `activations` it does nothing."""
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"start_offload takes tensors, got {tensor!r}")
    contexts = _contexts()
    if contexts:
        contexts[-1][0].start_offload(*tensors)


def mark_not_offload(*tensors: Tensor | nn.Module | Iterable[Tensor]) -> None:
    """Leave the storages of these tensors on the device when autograd saves tensors of them, for as long as they live.
    A module stands for its parameters and buffers."""
    for given in tensors:
        if isinstance(given, nn.Module):
            mark_not_offload(*given.parameters(), *given.buffers())
        elif not isinstance(given, Tensor):
            if isinstance(given, str) or not isinstance(given, Iterable):
                raise TypeError(f"mark_not_offload takes tensors, modules, or lists of tensors, got {given!r}")
            mark_not_offload(*given)
        elif type(given) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(given):
            mark_not_offload(*(getattr(given, name) for name in given.__tensor_flatten__()[0]))
        elif given.layout is torch.strided:
            memory.stay(given)
