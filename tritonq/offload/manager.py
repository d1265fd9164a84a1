"""Groups of weights that take turns in two or three slabs of device memory, each copied while the one before computes.

    load      copies.wait(used[slab]); copy; ready.record(copies)
    enter     current.wait(ready); parameters point into the slab; the predicted next group is loaded beside
    exit      parameters point to host memory again, the master copy; used.record(current)

A group always lands in the same slab, at the same addresses. Autograd saves views of weights; such a view is saved as a
record instead, and when backward asks for it, the group is loaded to where the view points. So backward fetches groups
in reverse order, ahead like forward, and nothing depends on when a slab is overwritten.

The next group follows from the last two: what came after them before. In forward (g-1, g) is followed by g+1, in
backward (g+1, g) by g-1. Where a guess was wrong, the group is loaded when it is entered.

Where a slab cannot be had, because a module that is running or the backward of another thread uses it, a group gets
memory of its own for that call. So nested modules and threads get right results, at the price of memory.
"""

from __future__ import annotations

import concurrent.futures
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tritonq.offload.arena import HostArena, HostSlab
from tritonq.offload.pieces import Piece, View, bytes_of, offsets, rebind
from tritonq.streams import Backend, Event
from tritonq.tensor import QTensor

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_hooks_enabled = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
_PLAINLY = torch._C.DisableTorchFunctionSubclass  # attributes of a QTensor are read in C: 0.1 us instead of 2


class DeviceSlab:
    """Memory for one group at a time."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.start, self.stop = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        self.turn = 0  # when a group was last given to it
        self.active = False  # whether a call is inside of the group that lies here
        self.forget()

    def forget(self) -> None:
        self.content = -1  # index of the group; the group itself would make a cycle
        self.ready: Event | concurrent.futures.Future[Event] = None
        self.used: dict[Any, Event] = {}  # the end of the last call, by stream
        self.streams: set[Any] = set()  # on which backward passes read it, at times that nobody tells
        self.lent: tuple[int, Any] | None = None  # the pass and the stream that may read it as it is
        self.task = -1  # of autograd, in which it was loaded
        self.node = -1  # of autograd, that was last given views of it

    def holds(self, tensor: Tensor) -> bool:
        return self.start <= tensor.data_ptr() < self.stop


class Weight:
    """A parameter, and the tensors that it is while offloaded and on the device."""

    def __init__(self, parameter: Tensor, view: View, host: Tensor) -> None:
        self.parameter, self.view, self.host = parameter, view, host
        self.places: list[tuple[dict[str, Any], str]] = []  # where modules hold it
        self.origin = parameter.device
        self.address = bytes_of(host).data_ptr()


class Group:
    """Weights that are fetched together.

    Attributes:
        host: the master copy. slab: where it lands, chosen when it is first entered.
        users: calls that are inside of it, and `inside`, their threads.
        memory: what the parameters point into, while there are users; `ready` when it is filled.
    """

    def __init__(self, index: int, name: str, pieces: list[Piece]) -> None:
        self.index, self.name = index, name
        self.pieces = pieces
        self.starts, self.nbytes = offsets(piece.nbytes for piece in pieces)
        self.host: HostSlab | None = None
        self.weights: list[Weight] = []
        self.slab: DeviceSlab | None = None
        self.on_slab: list[Tensor] | None = None  # the weights there
        self.buffers: frozenset[int] = frozenset()  # `id`s of those of them that are the bytes of a QTensor
        self.memory: Tensor | None = None
        self.ready: Event | concurrent.futures.Future[Event] = None
        self.users, self.stamp, self.generation = 0, 0, 0
        self.inside: set[int] = set()

    def adopt(self, host: HostSlab, owners: list[nn.Module]) -> None:
        """Copy the weights into host memory and let them lie there."""
        self.host = host
        for piece, start in zip(self.pieces, self.starts, strict=True):
            own = host.piece(start, piece.nbytes)
            own.copy_(piece.source())
            for parameter, view in zip(piece.tensors, piece.views(), strict=True):
                weight = Weight(parameter, View(view.start + start, *_rest(view)), view.over(own))
                weight.places = [
                    (module._parameters, name)
                    for module in owners
                    for name, found in module._parameters.items()
                    if found is parameter
                ]
                self.weights.append(weight)
        self.pieces = []
        self.rest()

    def rest(self) -> bool:
        """Point to host memory; whether somebody wrote into the weights where they lay."""
        self.memory = None
        return self._bind([weight.host for weight in self.weights])

    def point(self, memory: Tensor) -> None:
        """Point into device memory that holds the group, or will."""
        if self.slab is not None and memory is self.slab.memory:
            if self.on_slab is None:
                self.on_slab = [weight.view.over(memory) for weight in self.weights]
                self.buffers = frozenset(id(tensor._buf) for tensor in self.on_slab if isinstance(tensor, QTensor))
            tensors = self.on_slab
        else:
            tensors = [weight.view.over(memory) for weight in self.weights]
        self.memory = memory
        self._bind(tensors)

    def _bind(self, tensors: list[Tensor]) -> bool:
        """Let the parameters be these tensors; whether somebody wrote into them since they were bound last."""
        found = stamp = 0
        for weight, tensor in zip(self.weights, tensors, strict=True):
            found += bytes_of(weight.parameter)._version
            stamp += rebind(weight.parameter, tensor)
        written, self.stamp = found != self.stamp, stamp
        return written

    def versions(self) -> int:
        return sum([bytes_of(weight.parameter)._version for weight in self.weights])

    def _untouched(self) -> bool:
        """Whether the parameters are as `rest` left them."""
        stamp = 0
        for weight in self.weights:
            parameter = weight.parameter
            for owner, name in weight.places:
                if owner.get(name) is not parameter:
                    return False
            plain = bytes_of(parameter)
            if parameter.requires_grad or plain.data_ptr() != weight.address:
                return False
            stamp += plain._version
        return stamp == self.stamp

    def changed(self) -> bool:
        """Whether somebody wrote into the weights in host memory since; takes over parameters that were moved or
        replaced, if they are of the same kind.

        Raises:
            RuntimeError: they are not, or need gradients now.
        """
        if self._untouched():
            return False
        found = self.versions() != self.stamp
        for weight in self.weights:
            for owner, name in weight.places:
                parameter = owner.get(name)
                if parameter is not weight.parameter:
                    if parameter is None or not weight.view.alike(parameter):
                        raise self._stale(f"{name!r} was replaced by {_about(parameter)}")
                    self._let_go(weight)
                    weight.parameter, found = parameter, True
            parameter = weight.parameter
            if parameter.requires_grad:
                raise self._stale("a weight needs gradients now, so it would change")
            if bytes_of(parameter).data_ptr() != weight.address:
                if not weight.view.alike(parameter):
                    raise self._stale(f"a weight became {_about(parameter)}")
                bytes_of(weight.host).copy_(bytes_of(parameter))
                parameter.data = weight.host
                found = True
        if found:
            self.generation += 1
            self.stamp = self.versions()
        return found

    def _let_go(self, weight: Weight) -> None:
        """Give a parameter that another one replaced memory of its own: somebody may put it back, as
        `torch.func.functional_call` does, and the master copy becomes the other's."""
        assert self.host is not None
        if bytes_of(weight.parameter).data_ptr() == weight.address:
            start = weight.view.start
            with torch.inference_mode(False):
                own = self.host.bytes[start : start + weight.view.nbytes].clone()
            rebind(weight.parameter, replace(weight.view, start=0).over(own))

    def end(self) -> None:
        """Take over what was changed, for the last time. Parameters that became something else are left as they are."""
        left, found = [], self.versions() != self.stamp
        for weight in self.weights:
            for owner, name in weight.places:
                parameter = owner.get(name)
                if parameter is not None and parameter is not weight.parameter and weight.view.alike(parameter):
                    self._let_go(weight)
                    weight.parameter, found = parameter, True
            plain = bytes_of(weight.parameter)
            if plain.data_ptr() != weight.address:
                if not weight.view.alike(weight.parameter):
                    continue
                bytes_of(weight.host).copy_(plain.detach())
                weight.parameter.data, found = weight.host, True
            left.append(weight)
        self.weights = left
        self.generation += found

    def _stale(self, what: str) -> RuntimeError:
        return RuntimeError(f"offloaded group {self.name!r}: {what}; disable offload before, and enable it again")


def _rest(view: View) -> tuple[Any, ...]:
    return view.nbytes, view.shape, view.stride, view.dtype, view.layout


def _node() -> int:
    """Which node of autograd runs."""
    node = torch._C._current_autograd_node()
    return -1 if node is None else int(node._sequence_nr())


def _about(tensor: Tensor | None) -> str:
    if tensor is None:
        return "nothing"
    return f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} and {tensor.dtype}"


class _Saved:
    """A view of a group's weights that autograd saved."""

    __slots__ = ("generation", "group", "tensor")

    def __init__(self, group: Group, tensor: Tensor) -> None:
        self.group, self.tensor, self.generation = group, tensor, group.generation


class _Backward:
    """A backward pass that uses the slabs; what it waits for at its end holds it, also where it fails."""

    def __init__(self, task: int) -> None:
        self.thread, self.task, self.ended = threading.get_ident(), task, False

    def __call__(self) -> None:
        self.ended = True


class Manager:
    """See the module. All of its state changes under one lock, which no call of a module holds."""

    def __init__(self, backend: Backend, arena: HostArena, groups: list[Group], slabs: list[DeviceSlab]) -> None:
        self.backend, self.arena, self.groups, self.slabs = backend, arena, groups, slabs
        self.closed = False
        self.kept: list[Group] = []
        self._extras: list[Group] = []  # that have memory of their own
        self._lock = threading.RLock()
        self._next: dict[tuple[int, int], Group] = {}
        self._last: Group | None = None
        self._before = -1
        self._first = -1  # slab of the group that was entered first
        self._turns = 0
        self._capture: object | None = None
        self._captured = False
        self._backwards: list[weakref.ref[_Backward]] = []

    # ---------------------------------------------------------------------------------------------------- calls

    def call(self, group: Group, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a module of a group with its weights on the device.

        Raises:
            RuntimeError: within a derivative of `torch.func`, which would read weights later, and allows no hooks.
        """
        if torch._C._functorch.peek_interpreter_stack() is not None:
            _check_transforms(group)
        if threading.get_ident() in group.inside:
            return function(*args, **kwargs) if self._told() else self._telling(function, args, kwargs)
        self.enter(group)
        try:
            if self._told():
                return _kept_apart(group, function(*args, **kwargs))
            return _kept_apart(group, self._telling(function, args, kwargs))
        finally:
            self.exit(group)

    def _told(self) -> bool:
        """Whether what autograd saves now comes here, or it saves nothing."""
        if not torch.is_grad_enabled() or not _hooks_enabled():
            return True
        hooks = _top_hooks(False)
        return hooks is not None and getattr(hooks[0], "manager", None) is self

    def _telling(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function with hooks for what autograd saves."""
        pack = _Pack(self, _top_hooks(False))
        torch._C._autograd._push_saved_tensors_default_hooks(pack, pack.unpack)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._autograd._pop_saved_tensors_default_hooks()

    def keep(self, group: Group) -> None:
        """Leave a group on the device until offload ends."""
        with self._lock:
            if group in self.kept:
                return
            if not group.users:
                group.changed()
                self._drop(group)
                group.memory, group.ready = self._extra(group)
                group.point(group.memory)
            group.users += 1
            self.kept.append(group)

    def release(self) -> None:
        """Point groups that stayed on the device to host memory again, with what was written into them there."""
        for group in self.kept:
            group.users = 0
            memory = group.memory
            assert memory is not None
            self._follow(group.ready)
            if group.versions() != group.stamp:
                self._write_back(group, memory)
            start = memory.data_ptr()
            for weight in group.weights:
                if start <= bytes_of(weight.parameter).data_ptr() < start + group.nbytes:  # else it was replaced
                    rebind(weight.parameter, weight.host)
            group.memory = None

    def enter(self, group: Group) -> None:
        with self._lock, _PLAINLY():
            self._check_capture()
            if not group.users:
                if group.changed():
                    self._drop(group)
                group.memory, group.ready = self._memory(group)
                self._follow(group.ready)
                try:
                    group.point(group.memory)
                except BaseException:
                    group.rest()
                    raise
                if group.slab is not None and group.memory is group.slab.memory:
                    group.slab.active = True
                else:
                    self._extras.append(group)
            else:
                self._follow(group.ready)
                memory = group.memory
                if memory is not None and memory.is_cuda and (group.slab is None or memory is not group.slab.memory):
                    memory.record_stream(torch.cuda.current_stream(memory.device))
            group.users += 1
            group.inside.add(threading.get_ident())
            try:
                self._remember(group)
                self._prefetch(group)
            except BaseException:
                self.exit(group)
                raise

    def exit(self, group: Group) -> None:
        with self._lock, _PLAINLY():
            group.users -= 1
            group.inside.discard(threading.get_ident())
            slab = group.slab
            if slab is not None and slab.memory is group.memory:
                here = self.backend.here()
                slab.used[here] = self.backend.record(here)
                if torch._C._current_graph_task_id() >= 0:  # a checkpoint recomputes what backward is about to read
                    slab.streams.add(here)
                slab.active = group.users > 0
            if not group.users:
                memory = group.memory
                if group.rest():
                    self._write_back(group, memory)
                if group in self._extras:
                    self._extras.remove(group)
                if not torch.is_grad_enabled():  # else the slab may be needed again first
                    self._prefetch(group)
            if self._capture is not None:  # a graph ends with all of its copies
                for slab in self.slabs:
                    self._follow(slab.ready)

    def saved(self, record: _Saved) -> Tensor:
        """The weights that autograd saved, on the device again."""
        group, slab = record.group, record.group.slab
        task = torch._C._current_graph_task_id()
        with self._lock:
            if (
                slab is not None
                and slab.content == group.index
                and slab.lent == (task, self.backend.here())  # to this pass already
                and group.generation == record.generation
                and not torch.is_grad_enabled()
            ):
                slab.node = _node()
                return record.tensor
            with _PLAINLY():
                return self._fetched(record, task)

    def _fetched(self, record: _Saved, task: int) -> Tensor:
        """What a pass, or a part of it on another stream, needs of a group for the first time."""
        group, slab = record.group, record.group.slab
        self._check_capture()
        if not group.users and not self.closed and group.changed():
            self._drop(group)
        if group.generation != record.generation:
            raise RuntimeError(
                f"weights of the offloaded group {group.name!r} that are needed for a gradient were modified after "
                "forward used them"
            )
        # Gradients of gradients save what they are given outside of any group, and others keep it.
        if slab is None or self.closed or torch.is_grad_enabled() or task < 0:
            return _rebased(record.tensor, self._extra(group)[0])
        if not self._current(slab, group) and self._busy(slab):
            return _rebased(record.tensor, self._extra(group)[0])
        if not any(running.task == task for running in self._running()):
            running = _Backward(task)
            self._backwards.append(weakref.ref(running))
            torch.autograd.Variable._execution_engine.queue_callback(running)
            if self._capture is not None:
                torch.autograd.Variable._execution_engine.queue_callback(self._join)
        if not self._current(slab, group):
            self._load(slab, group)
        self._follow(slab.ready)
        slab.node = _node()
        here = self.backend.here()
        slab.streams.add(here)
        slab.lent = task, here
        self._remember(group)
        self._prefetch(group, slab.node)
        return record.tensor

    # --------------------------------------------------------------------------------------------------- memory

    def _memory(self, group: Group) -> tuple[Tensor, Any]:
        """Device memory that a group lies in or is on its way to."""
        if group.slab is None:
            group.slab = self._assigned()
        slab = group.slab
        if not self._current(slab, group):
            if self.closed or self._busy(slab):
                return self._extra(group)
            self._load(slab, group)
        return slab.memory, slab.ready

    def _assigned(self) -> DeviceSlab:
        """The slab of a group that is entered for the first time: the one that has been left alone for longest. Where
        there are three, the last group avoids that of the first, which comes after it in the next step."""
        last = sum(group.slab is None for group in self.groups) == 1
        self._turns += 1
        chosen = min(
            self.slabs,
            key=lambda slab: (
                self._busy(slab),
                self._last is not None and slab is self._last.slab,
                last and self._first >= 0 and slab is self.slabs[self._first],
                slab.turn,
            ),
        )
        chosen.turn = self._turns
        self._first = self.slabs.index(chosen) if self._first < 0 else self._first
        return chosen

    def _extra(self, group: Group) -> tuple[Tensor, Any]:
        """Memory of its own, for one call."""
        with torch.inference_mode(False):  # threads that are in no such mode may read it
            memory = self.backend.empty(group.nbytes)
        if self.closed:  # a graph that outlived offload
            assert group.host is not None
            return memory.copy_(group.host.bytes), None
        ready = self._copied(group, memory, [self.backend.record()])
        self._follow(ready)
        return memory, ready

    def _load(self, slab: DeviceSlab, group: Group) -> None:
        after = [*slab.used.values(), *(self.backend.record(stream) for stream in slab.streams)]
        if self._captured:  # a copy becomes part of a graph by what it waits for, and replays leave no other events
            after.append(self.backend.record())
        slab.forget()
        slab.ready = self._copied(group, slab.memory[: group.nbytes], after)
        slab.content, slab.task = group.index, torch._C._current_graph_task_id()

    def _copied(self, group: Group, memory: Tensor, after: list[Event]) -> Any:
        assert group.host is not None
        with torch.no_grad():
            return self.arena.load(group.host, memory, after)

    def _current(self, slab: DeviceSlab | None, group: Group) -> bool:
        """Whether a slab holds a group. Graphs that were captured write into slabs whenever they are replayed, so what
        was loaded outside of them counts for no more than one backward pass."""
        if slab is None or slab.content != group.index or self.closed:
            return False
        return not self._replayed() or slab.task == torch._C._current_graph_task_id() >= 0

    def _replayed(self) -> bool:
        return self._captured and self._capture is None

    def _busy(self, slab: DeviceSlab) -> bool:
        """Whether a slab may not be overwritten now."""
        return slab.active or any(running.thread != threading.get_ident() for running in self._running())

    def _running(self) -> list[_Backward]:
        """Backward passes that may be about to use what they were given."""
        found = [(reference, reference()) for reference in self._backwards]
        alive = [(reference, running) for reference, running in found if running is not None and not running.ended]
        self._backwards = [reference for reference, _ in alive]
        return [running for _, running in alive]

    def _drop(self, group: Group) -> None:
        if group.slab is not None and group.slab.content == group.index:
            group.slab.content = -1

    def _write_back(self, group: Group, memory: Tensor | None) -> None:
        """Forward wrote into weights in this memory: their master copy follows."""
        assert group.host is not None and memory is not None
        group.host.bytes.copy_(memory[: group.nbytes])
        group.generation += 1

    def _follow(self, ready: Any) -> None:
        try:
            event = ready.result() if isinstance(ready, concurrent.futures.Future) else ready
        except BaseException:
            for slab in self.slabs:
                if slab.ready is ready:
                    slab.forget()
            raise
        if event is not None:
            self.backend.follow(event)

    def _join(self) -> None:
        for slab in self.slabs:
            self._follow(slab.ready)

    def _check_capture(self) -> None:
        """A graph begins with nothing loaded and waits for no event from before; what follows it, too."""
        capture = self.backend.capture()
        if capture != self._capture:
            for slab in self.slabs:
                slab.forget()
            self._capture, self._captured = capture, True
            self._last, self._before = None, -1

    # ---------------------------------------------------------------------------------------------------- order

    def _remember(self, group: Group) -> None:
        last = self._last
        if group is last:
            return
        if last is not None:
            self._next[self._before, last.index] = group
            self._before = last.index
        self._last = group

    def _prefetch(self, group: Group, node: int | None = None) -> None:
        """Load the groups that came next the last time, as many as there are other slabs, if these are free; also of
        what the node of autograd was given that is about to run."""
        if self.closed or self._replayed():
            return
        before, current, kept = self._before, group, [group.slab] if group.users or node is not None else []
        for _ in self.slabs[1:]:
            following = self._next.get((before, current.index))
            if following is None or following.slab is None or following.slab in kept:
                return  # needed sooner by another group
            slab = following.slab
            if slab.content != following.index and not following.users:
                if self._busy(slab) or (node is not None and slab.node == node):
                    return
                self._load(slab, following)
            kept.append(slab)
            before, current = current.index, following

    # -------------------------------------------------------------------------------------------------- saving

    def on_extra(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter that lies in memory of its own for a call."""
        return any(tensor is weight.parameter for group in self._extras for weight in group.weights)


class _Pack:
    """Hooks for what autograd saves within a group: weights become records, the rest goes to the hooks outside."""

    def __init__(self, manager: Manager, outer: tuple[Any, Any] | None) -> None:
        self.manager, self._outer = manager, outer

    def __call__(self, tensor: Tensor) -> Any:
        manager = self.manager
        if type(tensor) is Tensor or isinstance(tensor, (QTensor, nn.Parameter)):
            plain = tensor if type(tensor) is Tensor else bytes_of(tensor)
            address = plain.data_ptr() if plain.layout is torch.strided else 0  # as that of no elements
            for slab in manager.slabs:
                if slab.start <= address < slab.stop and slab.content >= 0:
                    group = manager.groups[slab.content]
                    # A parameter will point elsewhere, the bytes of a QTensor never do: it gets others.
                    return _Saved(group, tensor if id(tensor) in group.buffers else tensor.detach())
        if manager._extras and manager.on_extra(tensor):
            tensor = tensor.detach()
        if self._outer is not None:
            return self._outer[0](tensor)
        # With hooks, torch compares no versions itself. What is kept is no part of the graph, which holds it: a result
        # that its own node saved would never be freed without a backward.
        version = None if tensor.is_inference() else tensor._version
        return tensor.detach() if tensor.requires_grad else tensor, version

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, _Saved):
            return self.manager.saved(packed)
        if self._outer is not None:
            found: Tensor = self._outer[1](packed)
            return found
        tensor, version = packed
        if version is not None and tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{_about(tensor)} is at version {tensor._version}; expected version {version} instead"
            )
        return tensor


def _check_transforms(group: Group) -> None:
    derivatives = torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp
    if any(level.key() in derivatives for level in torch._C._functorch.get_interpreter_stack() or ()):
        raise RuntimeError(
            f"offloaded group {group.name!r} is called within a derivative of torch.func, which knows no hooks "
            "of saved tensors; use torch.autograd.grad or torch.autograd.functional, or disable offload before"
        )


def _kept_apart(group: Group, result: Any) -> Any:
    """What a module returns, with copies of its weights in place of views: their memory is about to be reused."""
    memory = group.memory
    assert memory is not None
    start, stop = memory.data_ptr(), memory.data_ptr() + group.nbytes

    def copied(tensor: Tensor) -> Tensor:
        if type(tensor) is Tensor or isinstance(tensor, nn.Parameter | QTensor):
            plain = bytes_of(tensor)
            while torch._C._functorch.is_functorch_wrapped_tensor(plain):
                plain = torch._C._functorch.get_unwrapped(plain)
            if plain.layout == torch.strided and start <= plain.data_ptr() < stop and plain.numel():
                return tensor.clone()
        return tensor

    if isinstance(result, Tensor):
        return copied(result)
    return pytree.tree_map_only(Tensor, copied, result)


def _rebased(tensor: Tensor, memory: Tensor) -> Tensor:
    """The same view of other memory."""
    with torch.inference_mode(False), torch.no_grad():
        plain = bytes_of(tensor)
        moved = torch.empty(0, dtype=plain.dtype, device=memory.device).set_(
            memory.untyped_storage(), plain.storage_offset(), plain.shape, plain.stride()
        )
        return QTensor(moved, tensor._layout, tensor.dtype) if isinstance(tensor, QTensor) else moved
