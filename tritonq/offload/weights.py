"""Offload of a model's weights: `enable`, and the handle that ends it."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.memory import parse_size
from tritonq.offload import groups as planning
from tritonq.offload.arena import DiskArena, HostArena
from tritonq.offload.manager import DeviceSlab, Group, Manager
from tritonq.offload.pieces import Piece, movable, move, pieces
from tritonq.streams import Backend, Cuda, Device
from tritonq.streams import backend as backend_of


class Handle:
    """Offload of a model that is in force, until `disable` or the end of a `with` statement.

    Attributes:
        groups: names of the modules that take turns on the device.
        slab_bytes, resident_bytes: device memory for them, and for everything else of the model, as torch rounds it.
        offloaded_bytes: host memory (or bytes of the file) of the groups.
    """

    def __init__(self, manager: Manager, resident: int) -> None:
        self._manager = manager
        self._wrapped: list[tuple[Callable[[], nn.Module | None], Any, Any]] = []
        self._residents: list[
            tuple[Tensor, torch.device, bool]
        ] = []  # with their origin, and whether that was elsewhere
        self.groups = [group.name for group in manager.groups]
        self.slab_bytes = planning.slabs([group.nbytes for group in manager.groups])
        self.resident_bytes = resident
        self.offloaded_bytes = sum(group.nbytes for group in manager.groups)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    def __repr__(self) -> str:
        state = "disabled" if self._manager.closed else f"{self.slab_bytes} bytes of slabs on the device"
        return f"Handle({len(self.groups)} groups of {self.offloaded_bytes} bytes in all, {state})"

    def refresh(self) -> None:
        """Fetch every group anew. Needed after writing in place through `parameter.data` (which torch does not count)
        or another alias; all other changes are seen."""
        manager = self._manager
        with manager._lock:
            for slab in manager.slabs:
                slab.content = -1
            for group in manager.groups:
                group.generation += 1

    @torch.inference_mode(False)
    def disable(self, device: torch.device | str | None = None) -> None:
        """End offload: every parameter and buffer is on the device that it came from, or on `device`, and modules are
        as they were. Parameters keep their identity. A second call does nothing.

        Raises:
            RuntimeError: a module is running. torch.OutOfMemoryError: the device cannot hold the model; modules are as
                they were, and the rest of the weights lies in host memory.
        """
        manager = self._manager
        with manager._lock:
            if manager.closed:
                return
            running = [group.name for group in manager.groups if group.users > (group in manager.kept)]
            if running:
                raise RuntimeError(f"offload cannot be disabled while {running} run; call disable() after forward")
            manager.release()
            for group in manager.groups:
                group.end()
            for reference, wrapper, before in self._wrapped:
                module = reference()
                if module is not None and module.__dict__.get("_compiled_call_impl") is wrapper:
                    del module.__dict__["_compiled_call_impl"]
                    if before is not None:
                        module.__dict__["_compiled_call_impl"] = before
            manager.backend.synchronize()
            manager.closed = True
            manager.slabs.clear()
            for group in manager.groups:
                group.slab, group.on_slab, group.buffers = None, None, frozenset()
            try:
                self._restore(None if device is None else torch.device(device))
            finally:
                self._residents.clear()
                self._wrapped.clear()
                manager.backend.synchronize()
                manager.arena.close()

    def _restore(self, device: torch.device | None) -> None:
        on_disk = isinstance(self._manager.arena, DiskArena)
        for group in self._manager.groups:
            origins = {id(weight.parameter): device or weight.origin for weight in group.weights}
            for piece in pieces(weight.parameter for weight in group.weights):
                origin = origins[id(piece.tensors[0])]
                if on_disk or origin.type != "cpu":
                    move(piece, torch.empty(piece.nbytes, dtype=torch.uint8, device=origin))
        known = {id(tensor): device or origin for tensor, origin, _ in self._residents}
        _transfer(
            [
                tensor
                for tensor, _, moved in self._residents
                if tensor.device != known[id(tensor)] or (moved and device is None)
            ],
            lambda piece: torch.empty(piece.nbytes, dtype=torch.uint8, device=known[id(piece.tensors[0])]),
            lambda tensor: known[id(tensor)],
        )


def _transfer(
    tensors: list[Tensor], allocate: Callable[[Piece], Tensor], device: Callable[[Tensor], torch.device]
) -> None:
    """Move tensors, those that share memory together; and gradients of parameters."""
    plain = [tensor for tensor in tensors if movable(tensor)]
    for piece in pieces(plain):
        move(piece, allocate(piece))
    for tensor in tensors:
        if not movable(tensor):
            tensor.data = tensor.data.to(device(tensor))
        if tensor.grad is not None:
            tensor.grad.data = tensor.grad.data.to(device(tensor))


@torch.inference_mode(False)
def enable(
    model: nn.Module,
    groups: planning.Groups = "block",
    device: Device | None = None,
    budget: int | str | None = None,
    disk: str | os.PathLike[str] | None = None,
) -> Handle:
    """Keep the frozen weights of a model in pinned host memory, and copy them to the device group by group, each while
    the one before computes. Results are those of the model on the device, bit for bit.

    On the device are two slabs of the largest group's size (three, if the budget allows), through which groups take
    turns, and what is *resident*: buffers, trained parameters (`requires_grad`), whatever belongs to no group, and
    weights that several groups share. Between calls, offloaded parameters are tensors of the host. Attach adapters and
    compile blocks before.

    Args:
        model: its floating, quantized (`QTensor`) and other plain parameters may lie anywhere, also on the device.
        groups: "block" (repeated blocks, such as the layers of a transformer), "leaf" (each module with weights), or
            modules or names of them; see `tritonq.offload.groups.find`.
        device: that modules run on; default the current GPU, or the CPU where there is none.
        budget: bytes of device memory for the model, or a text such as "2GB". More groups stay resident as far as they
            fit. None: two slabs and what has to be resident.
        disk: a path (file or folder) for a file that holds the weights in place of host memory; it is removed by
            `disable`. Besides it, two staging buffers of the largest group's size are pinned.

    Returns:
        A handle whose `disable()` puts everything back; also a context manager.

    Raises:
        ValueError: unknown groups, parameters on the meta device or of inference mode, a budget that is too small (with
            what is needed).
        RuntimeError: the model is offloaded already, or there is no such GPU. TypeError: it is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a torch.nn.Module, got {type(model).__name__}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.device.type if isinstance(device, Backend) else torch.device(device).type
    if kind not in ("cuda", "cpu"):
        raise ValueError(f"device is a GPU ('cuda') or the CPU, where modules run, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"torch finds no GPU for device {str(device)!r}; pass device='cpu' to run there")
    if not isinstance(device, Backend) and kind == "cuda":
        device = Cuda(torch.device(device), own=True)
    backend = backend_of(device)
    limit = None if budget is None else parse_size(budget, "budget")
    _check(model)
    chosen, resident = _divided(model, groups)
    made = [Group(i, unit.name, pieces(unit.weights)) for i, unit in enumerate(chosen)]
    kept = [sum(planning.rounded(piece.nbytes) for piece in group.pieces) for group in made]
    needed = sum(planning.rounded(piece.nbytes) for piece in pieces(t for t in resident if movable(t)))
    sizes = [group.nbytes for group in made]
    staying, count = planning.stay(sizes, kept, needed, limit)
    if limit is not None and not staying and needed + planning.slabs(sizes) > limit:
        trained = sum(planning.rounded(p.nbytes) for p in pieces(t for t in resident if t.requires_grad and movable(t)))
        raise ValueError(
            f"a budget of {limit} bytes is too small: {needed} bytes stay on the device, {trained} of them trained "
            f"parameters, and two slabs of the largest group ({max(sizes, default=0)} bytes) take "
            f"{planning.slabs(sizes)}; pass at least {needed + planning.slabs(sizes)}, smaller groups ('leaf'), or "
            "freeze what is not trained (requires_grad_(False))"
        )
    for index in sorted(staying):
        resident += chosen[index].weights
        needed += kept[index]
    turning = [i for i in range(len(made)) if i not in staying]
    offloaded = [made[i] for i in turning]
    _warn_if_trained(offloaded, resident)
    arena = HostArena(backend) if disk is None else DiskArena(backend, disk, [sizes[i] for i in turning])
    manager = Manager(backend, arena, offloaded, [])
    handle = Handle(manager, needed)
    try:
        for index, group in enumerate(offloaded):
            group.index = index
            group.adopt(arena.slab(group.nbytes), chosen[turning[index]].owners)
        arena.finish()
        handle._residents = [(tensor, tensor.device, not backend.holds(tensor)) for tensor in resident]
        _transfer(
            [tensor for tensor, _, elsewhere in handle._residents if elsewhere],
            lambda piece: backend.empty(piece.nbytes),
            lambda tensor: backend.device,
        )
        largest = max((group.nbytes for group in offloaded), default=0)
        manager.slabs += [DeviceSlab(backend.empty(largest)) for _ in offloaded[:count]]
        for slab in manager.slabs:  # memory that whoever had it before may still be using
            slab.used[backend.here()] = backend.record()
        handle.slab_bytes = planning.slabs([group.nbytes for group in offloaded], count)
        watched: list[tuple[Group, nn.Module]] = []
        for index, group in enumerate(offloaded):
            unit = chosen[turning[index]]
            if not any(_compiled(module) for module in unit.module.modules()):  # graphs see who holds parameters
                watched += [(group, owner) for owner in unit.owners]
            _wrap(handle, manager, group, unit)
        if not any(unit.module is model for unit in chosen):
            _replace_call(handle, model, _First(manager, model, watched))
    except BaseException:
        handle.disable()
        raise
    return handle


def _compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def _check(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module.__dict__.get("_compiled_call_impl"), _Call):
            raise RuntimeError(f"{name or 'the model'!r} is offloaded already; call disable() of its handle first")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"parameter {name!r} is on the meta device; load its weights first")
        if parameter.is_inference():
            raise ValueError(f"parameter {name!r} was made in inference mode, where it cannot change places; clone it")
    if _compiled(model):
        raise ValueError("the model is compiled as a whole; compile its blocks (block.compile()) and offload those")


def _divided(model: nn.Module, groups: planning.Groups) -> tuple[list[planning.Unit], list[Tensor]]:
    """Units, and all other tensors of the model. Memory that more than one unit or another tensor uses is resident."""
    chosen = planning.units(model, groups)
    unit_of = {id(weight): index for index, unit in enumerate(chosen) for weight in unit.weights}
    everything: dict[int, Tensor] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                everything[id(tensor)] = tensor
    tensors = list(everything.values())
    for piece in pieces(tensor for tensor in tensors if movable(tensor)):
        if len({unit_of.get(id(tensor), -1) for tensor in piece.tensors}) > 1:
            for tensor in piece.tensors:
                unit_of.pop(id(tensor), None)
    for unit in chosen:
        unit.weights = [weight for weight in unit.weights if id(weight) in unit_of]
    chosen = [unit for unit in chosen if unit.weights]
    return chosen, [tensor for tensor in tensors if id(tensor) not in unit_of]


def _warn_if_trained(offloaded: list[Group], resident: list[Tensor]) -> None:
    trained = sum(tensor.nbytes for tensor in resident if tensor.requires_grad and movable(tensor))
    if trained > sum(group.nbytes for group in offloaded):
        warnings.warn(
            f"{trained} bytes of parameters require gradients and so stay on the device; call requires_grad_(False) on "
            "what is not trained before offload is enabled",
            stacklevel=4,  # above enable and its decorator
        )


class _Call:
    """What `nn.Module.__call__` calls in place of hooks and forward while a module's weights are offloaded.

    That is the attribute `_compiled_call_impl`, in which `nn.Module.compile` keeps what it made: nothing lies further
    out, so graphs of a compiled block don't see it; and `nn.Module.__getstate__` leaves it out of copies and pickles.
    """

    def __init__(self, manager: Manager, group: Group, module: nn.Module, inner: Callable[..., Any] | None) -> None:
        self._manager, self._group, self._inner = manager, group, inner
        self._module = weakref.ref(module)  # which holds this

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = self._inner
        if function is None:
            module = self._module()
            assert module is not None
            function = module._call_impl
        return self._manager.call(self._group, function, args, kwargs)


def _replace_call(handle: Handle, module: nn.Module, wrapper: Callable[..., Any]) -> None:
    before = module.__dict__.get("_compiled_call_impl")
    module.__dict__["_compiled_call_impl"] = wrapper
    handle._wrapped.append((weakref.ref(module), wrapper, before))


def _wrap(handle: Handle, manager: Manager, group: Group, unit: planning.Unit) -> None:
    """Have the module of a unit, and those in it that hold weights, called through the manager: also the latter may be
    called from outside, such as by a checkpoint that recomputes a part of a block."""
    for module in [unit.module] if _compiled(unit.module) else dict.fromkeys([unit.module, *unit.owners]):
        before = module.__dict__.get("_compiled_call_impl")
        _replace_call(handle, module, _Call(manager, group, module, before))


class _Watched(dict[str, Any]):
    """Parameters of a module whose group stays on the device from when somebody else reads one of them in forward."""

    def __init__(self, parameters: dict[str, Any], manager: Manager, group: Group) -> None:
        super().__init__(parameters)
        self._manager, self._group = manager, group

    def __getitem__(self, name: str) -> Any:
        if not self._group.users:
            self._manager.keep(self._group)
        return super().__getitem__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)


class _First:
    """The first call of a model finds out which weights are read by others than the module that holds them, such as a
    parent that passes `child.weight` to a function: those stay resident. Then it is gone."""

    def __init__(self, manager: Manager, model: nn.Module, watched: list[tuple[Group, nn.Module]]) -> None:
        self._manager, self._model = manager, weakref.ref(model)
        self._watched = [(group, weakref.ref(owner)) for group, owner in watched]
        self._running = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        assert model is not None
        if self._running:
            return model._call_impl(*args, **kwargs)
        self._running = True
        before: list[tuple[nn.Module, dict[str, Any]]] = []
        try:
            for group, reference in self._watched:
                owner = reference()
                if owner is not None:
                    before.append((owner, owner._parameters))
                    owner.__dict__["_parameters"] = _Watched(owner._parameters, self._manager, group)
            result = model._call_impl(*args, **kwargs)
            if model.__dict__.get("_compiled_call_impl") is self:
                del model.__dict__["_compiled_call_impl"]
            return result
        finally:
            self._running = False
            for owner, parameters in before:
                now = owner._parameters
                if isinstance(now, _Watched):
                    parameters.clear()
                    parameters.update(dict.items(now))
                    owner.__dict__["_parameters"] = parameters
