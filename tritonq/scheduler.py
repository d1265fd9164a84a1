"""Operations over tensors of any size, tile by tile: through a device that they do not fit, or that they are not on.

A job is planned as tiles (`tiles`) whose copies and intermediates take no more memory of a device than the budget
(`tritonq.workspace`). Inputs that lie elsewhere are copied into one of a few slots, computed there, and results that
belong elsewhere copied out again; copies in, kernels and copies out of different tiles overlap. Pinned host memory is
copied from and to directly; what is pageable, such as a mapped file, goes through pinned staging buffers that the host
fills while earlier tiles are on their way.

Formats with one scale or divisor for the whole tensor are gone over twice: first for the extremes of the tensor, which
have the same scale as all of it. Several devices share a tensor by taking its tiles in turn, one thread each. Where
memory runs out, the tile is put back and those that follow are half as large.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tritonq import memory, ops, streams
from tritonq.formats import Format, Shape, get_format
from tritonq.progress import progress_bar
from tritonq.reference import Parts
from tritonq.streams import Backend, Device, Event
from tritonq.tiles import Tile, Tiles

Devices = Device | Sequence[Device]
Progress = Callable[[int, int], object]  # gets elements done, and in all
_LARGEST_TILE = 32 << 20  # bytes that are copied for a tile; larger ones only delay the first and the last
_ALIGNMENT = 256
_BLOCKS = get_format("int8_g16")  # only its geometry: whole blocks of 16 in rows


@dataclass(frozen=True)
class Job:
    """What happens to each tile.

    Attributes:
        tiles: of the tensor, those that are to be done.
        inputs, outputs: views of what a tile reads and writes, by name, wherever it lies.
        compute: fills outputs from inputs, all on the device of the backend.
        scratch: bytes that it allocates meanwhile.
    """

    tiles: Tiles
    inputs: Callable[[Tile], Parts]
    outputs: Callable[[Tile], Parts]
    compute: Callable[[Tile, Parts, Parts, Backend], object]
    scratch: Callable[[Tile], int] = lambda tile: 0


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _moved(pieces: Parts, backend: Backend) -> Parts:
    """Those of the pieces that are not where the backend computes."""
    return {name: piece for name, piece in pieces.items() if not backend.holds(piece)}


def _size(pieces: Parts) -> int:
    return sum(_aligned(piece.nbytes) for piece in pieces.values())


def _carved(buffer: Tensor | None, pieces: Parts) -> Parts:
    """Tensors of the same shapes and dtypes as the pieces, one after the other in a buffer."""
    found, start = {}, 0
    for name, piece in pieces.items():
        assert buffer is not None
        found[name] = buffer[start : start + piece.nbytes].view(piece.dtype).view(piece.shape)
        start += _aligned(piece.nbytes)
    return found


@dataclass
class _Slot:
    """Buffers of a tile on its way, and the events after which they can be used again."""

    backend: Backend
    sizes: tuple[int, int]  # bytes that tiles copy in and out, at most
    arrived: Event = None  # inputs, on the device
    computed: Event = None
    drained: Event = None  # outputs, off the device
    from_host: bool = False  # whether the copy that `arrived` ends reads memory of the caller
    landing: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (where to, staging) of outputs

    def __post_init__(self) -> None:
        self.device = [self.backend.empty(size) if size else None for size in self.sizes]
        self.host: list[Tensor | None] = [None, None]
        # What had this memory before may still be in use on the stream it was freed on.
        self.computed = self.backend.submit("compute", lambda: None)

    def _staging(self, side: int) -> Tensor:
        if self.host[side] is None:
            self.host[side] = self.backend.staging(self.sizes[side])
        found = self.host[side]
        assert found is not None
        return found

    def land(self) -> None:
        """Bring outputs of the last tile from staging to where they belong."""
        if self.landing:
            self.backend.wait(self.drained)
            for target, staged in self.landing:
                target.copy_(staged)
            self.landing = []

    def finish(self) -> None:
        """Wait until the last tile needs nothing of the host any more: its inputs read, its outputs there."""
        self.land()
        self.backend.wait(self.drained)
        if self.from_host:
            self.backend.wait(self.arrived)

    def _bring(self, moved: Parts) -> Parts:
        """Inputs on their way to the device."""
        backend, device, copies = self.backend, _carved(self.device[0], moved), []
        direct = {name: backend.copies(piece) for name, piece in moved.items()}
        if not all(direct.values()):
            backend.wait(self.arrived)  # the staging buffer is still being read
            staged = _carved(self._staging(0), moved)
        for name, piece in moved.items():
            copies.append((device[name], piece if direct[name] else staged[name].copy_(piece)))
        if copies:
            self.arrived = backend.submit("in", lambda: _copy(backend, copies), self.computed)
            self.from_host |= any(direct[name] and piece.device.type == "cpu" for name, piece in moved.items())
        return device

    def run(self, tile: Tile, inputs: Parts, outputs: Parts, job: Job) -> None:
        """Start a tile. What runs out of memory here can be started again."""
        backend = self.backend
        self.land()
        away = _moved(outputs, backend)
        inputs = {**inputs, **self._bring(_moved(inputs, backend))}
        results = {**outputs, **_carved(self.device[1], away)}
        events = self.arrived, self.drained
        self.computed = backend.submit("compute", lambda: job.compute(tile, inputs, results, backend), *events)
        if away:
            direct = {name: backend.copies(target) for name, target in away.items()}
            staged = {} if all(direct.values()) else _carved(self._staging(1), away)
            copies = [(away[name] if direct[name] else staged[name], results[name]) for name in away]
            self.drained = backend.submit("out", lambda: _copy(backend, copies), self.computed)
            self.landing = [(away[name], staged[name]) for name in away if not direct[name]]


def _copy(backend: Backend, copies: list[tuple[Tensor, Tensor]]) -> None:
    for target, source in copies:
        backend.copy(target, source)


@contextlib.contextmanager
def _reported(progress: Progress | bool | None, total: int) -> Iterator[Callable[[int], None]]:
    """A function that is told how many elements are done; calls progress(done, total), or moves a bar on a terminal."""
    with contextlib.ExitStack() as stack:
        if progress is True:
            bar = stack.enter_context(progress_bar(True))
            task = bar.add_task("streaming", total=total)
            progress = functools.partial(_move, bar, task)
        report, lock, done = progress or None, threading.Lock(), 0

        def add(elements: int) -> None:
            nonlocal done
            with lock:
                done += elements
                if callable(report):
                    report(done, total)

        yield add


def _limits(job: Job, backend: Backend, most: int) -> tuple[int, int]:
    """Elements of a tile and number of slots, so that all slots and the scratch of one tile fit the budget."""
    depth, room = backend.depth, max(1, memory.budget() * 63 // 64)  # allocators round up
    while (tile := job.tiles.peek(most)) is not None:
        sizes = [_size(_moved(pieces, backend)) for pieces in (job.inputs(tile), job.outputs(tile))]
        scratch = job.scratch(tile)
        excess = max((depth * sum(sizes) + scratch) / room, max(sizes) / _LARGEST_TILE)
        if excess <= 1:
            break
        if not job.tiles.can_be_cut(tile):
            depth = max(1, min(depth, (room - scratch) // max(1, sum(sizes))))
            break
        most = max(1, min(int(tile.size / excess), tile.size - 1))
    return most, depth


def _work(job: Job, backend: Backend, most: int, done: Callable[[int], None]) -> None:
    """Take tiles until there are none left."""
    slots: list[_Slot] = []
    with backend.current():
        try:
            (limit, depth), count = _limits(job, backend, most), 0
            while (tile := job.tiles.take(limit)) is not None:
                try:
                    pieces = job.inputs(tile), job.outputs(tile)
                    sizes = [_size(_moved(side, backend)) for side in pieces]
                    if not slots or any(own < size for own, size in zip(slots[0].sizes, sizes, strict=True)):
                        _finish(slots)
                        slots += [_Slot(backend, (sizes[0], sizes[1])) for _ in range(depth)]
                    slots[count % len(slots)].run(tile, *pieces, job)
                except torch.OutOfMemoryError as error:
                    _finish(slots)
                    if depth > 1 and not job.tiles.can_be_cut(tile):  # it may fit alone
                        depth = 1
                        job.tiles.put_back(tile)
                    else:
                        limit = job.tiles.halved(tile, error, backend.device)
                    continue
                count += 1
                done(tile.size)
            _finish(slots)
        finally:
            backend.join()


def _finish(slots: list[_Slot]) -> None:
    """Land what is on its way and let go of the buffers."""
    for slot in slots:
        slot.finish()
    if slots:
        slots[0].backend.join()  # their memory goes back to the stream of the lane "compute"
    slots.clear()


def _execute(job: Job, backends: list[Backend], done: Callable[[int], None]) -> None:
    total = math.prod(job.tiles.shape)
    if len(backends) == 1:
        return _work(job, backends[0], total, done)
    most, errors = max(1, total // (4 * len(backends))), []
    inference = torch.is_inference_mode_enabled()
    begin = [backend.submit("compute", lambda: None) for backend in backends]
    for backend in backends:
        backend.submit("compute", lambda: None, *begin)  # results may lie on any of them

    def worker(backend: Backend) -> None:
        sharing = sum(other.device == backend.device for other in backends)
        try:
            with torch.inference_mode(inference), torch.no_grad(), memory.workspace(max(1, memory.budget() // sharing)):
                _work(job, backend, most, done)
        except BaseException as error:
            errors.append(error)
            job.tiles.stop()

    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(worker, backend), daemon=True)
        for backend in backends
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _move(bar: Any, task: Any, done: int, total: int) -> None:
    bar.update(task, completed=done)


# ------------------------------------------------------------------------------------------------------- operations


def devices_of(device: Devices) -> list[Backend]:
    """The backends of one device or of several."""
    several = [device] if isinstance(device, str | torch.device | Backend) else list(device)
    if not several:
        raise ValueError("device is a device or a sequence of devices, got an empty one; leave it out, or name some")
    return [streams.backend(one) for one in several]


def source(x: Any) -> Any:
    """A tensor as it is; a slice of a safetensors file (`safe_open(...).get_slice(name)`) as the tensor that the file
    is mapped to, of which only what is looked at is read."""
    if isinstance(x, Tensor):
        return x
    return x[:] if hasattr(x, "get_shape") and hasattr(x, "get_dtype") else x


def placed(
    x: Tensor, device: Devices | None, output_device: torch.device | str | None, out: Tensor | None
) -> tuple[list[Backend], torch.device] | None:
    """Where to compute and where to leave the result; None where both are where x is."""
    if out is not None and not isinstance(out, Tensor):
        raise TypeError(f"out is a tensor that receives the result, got {type(out).__name__}")
    if device is None and output_device is None and (out is None or out.device == x.device):
        return None
    backends = devices_of(x.device if device is None else device)
    target = backends[0].device if output_device is None else streams.backend(output_device).device
    if out is not None:
        if output_device is not None and out.device != target:
            raise ValueError(f"out is on {out.device} and output_device says {target}; leave out output_device")
        target = out.device
    if len(backends) == 1 and target == x.device and type(backends[0]) in (Backend, streams.Cuda):
        return None if backends[0].holds(x) else (backends, target)
    return backends, target


def allocated(make: Callable[[], Any]) -> Any:
    """A result, made where it is to be left."""
    try:
        return make()
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"no memory for the result: {error}; leave it elsewhere with output_device='cpu', or pass out"
        ) from error


def result(out: Tensor | None, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Dense result of an operation: `out`, checked, or a new tensor."""
    if out is not None:
        return ops._checked_values(out, shape, dtype, device)
    y: Tensor = allocated(lambda: memory.empty(shape, dtype, device))
    return y


def _extremes(x: Tensor, finite: bool) -> Tensor:
    """Smallest and largest element [2]; of the finite ones if `finite`, 0 for those that are not."""
    if finite and x.device.type == "cpu":  # nobody waits for a device to learn whether a second look is needed
        found = torch.stack(torch.aminmax(x))
        if found.isfinite().all():
            return found
    return torch.stack(torch.aminmax(torch.nan_to_num(x, 0.0, 0.0, 0.0) if finite else x))


def _extremes_of_all(
    x: Tensor, fmt: Format, backends: list[Backend], finite: bool, done: Callable[[int], None]
) -> Tensor:
    """Extremes of the tiles of x, which have the scale that x has: rules look at nothing else of a tensor. The host
    looks itself at what it would have to copy for a device to look at: it reads faster than it copies."""
    target, found = backends[0].device, list[Tensor]()
    if x.device.type == "cpu" and not all(backend.copies(x) for backend in backends):
        backends = [Backend(x.device)]

    def compute(tile: Tile, inputs: Parts, outputs: Parts, backend: Backend) -> None:
        found.append(_extremes(inputs["x"], finite))

    tiles = Tiles(tuple(x.shape), x.stride(), fmt)
    job = Job(
        tiles, lambda tile: {"x": tile.of_strided(x)}, lambda tile: {}, compute,
        lambda tile: tile.size * x.dtype.itemsize * finite,
    )  # fmt: skip
    _execute(job, backends, done)
    return torch.cat([extremes.to(target) for extremes in found])


@dataclass
class _Encoding:
    """Arguments of quantize and QDQ, and what is found out about the whole tensor before its tiles are encoded."""

    x: Tensor
    fmt: Format
    given: Parts
    search: bool = False
    weights: Tensor | None = None
    seed: int | None = None
    kept: int = 0  # bytes of x that were brought to the device

    @property
    def room(self) -> int:
        """What is left of the budget."""
        return max(memory.budget() - self.kept, memory.budget() // 4)

    @property
    def passes(self) -> int:
        """How often the tensor is gone over."""
        known = "tensor_scale" if self.fmt.tensor_scale else "scale"
        return 2 if (self.fmt.tensor_scale or self.fmt.group[0] == -1) and known not in self.given else 1

    @property
    def searches_whole(self) -> bool:
        """Whether the one scale of the tensor is searched for, which takes more passes than it may stream."""
        return self.search and self.fmt.group[0] == -1

    def look(self, backends: list[Backend], done: Callable[[int], None]) -> None:
        """Find scales that the whole tensor shares."""
        if self.passes == 1:
            return
        if self.searches_whole:
            backends = backends[:1]
        self._keep(backends)
        x, fmt, known = self.x, self.fmt, self.given.get("tensor_scale")
        whole = fmt.group[0] == -1 and "scale" not in self.given
        with backends[0].current():
            if len(backends) == 1 and backends[0].holds(x):  # kernels find them in one launch
                if fmt.tensor_scale and known is None:
                    known = ops._tensor_scale(x, fmt)
                parts = ops._allocate_scales(fmt, x, ops._SCALES) if whole else {}
                if known is not None:
                    parts["tensor_scale"] = known.to(x.device)
                if whole:
                    weights = None if self.weights is None else self.weights.to(x.device)
                    ops._choose_scales(x, fmt, parts, self.search, weights)
                done(x.numel())
            else:
                with memory.workspace(self.room):
                    extremes = _extremes_of_all(x, fmt, backends, fmt.tensor_scale, done)
                if fmt.tensor_scale and known is None:
                    known = ops._tensor_scale(extremes, fmt)
                parts = ops._quantize(extremes, fmt, None, None, known) if whole else {}
                parts.pop("qdata", None)
                if known is not None:
                    parts["tensor_scale"] = known
        self.given.update(parts)
        self.search = self.search and not whole

    def _keep(self, backends: list[Backend]) -> None:
        """Bring a tensor that is gone over several times to the one device, where the budget leaves room for it."""
        x, room, backend = self.x, memory.budget(), backends[0]
        fits = len(backends) == 1 and 4 * x.nbytes <= 3 * room
        if backend.holds(x) or not (fits or self.searches_whole):
            return
        try:
            kept = backend.empty(x.nbytes).view(x.dtype).view(x.shape)
        except torch.OutOfMemoryError as error:
            if not self.searches_whole:
                return
            raise torch.OutOfMemoryError(
                f"{self.fmt.name}: a search for the one scale of a tensor goes over it many times, and its {x.nbytes} "
                f"bytes do not fit {backend.device}: {error}. Search on the CPU, or pass a format with groups"
            ) from error

        def compute(tile: Tile, inputs: Parts, outputs: Parts, backend: Backend) -> None:
            outputs["kept"].copy_(inputs["x"])

        tiles = Tiles(tuple(x.shape), x.stride(), self.fmt)
        job = Job(
            tiles, lambda tile: {"x": tile.of_strided(x)}, lambda tile: {"kept": tile.of_values(kept)}, compute
        )  # fmt: skip
        self.kept = x.nbytes
        with memory.workspace(self.room):
            _execute(job, backends, lambda elements: None)
        self.x = kept

    def run(
        self, backends: list[Backend], progress: Progress | bool | None, outputs: Callable[[Tile], Parts],
        compute: Callable[[Tile, Parts, Parts, Backend], None], scratch: Callable[[Tile], int] = lambda tile: 0,
    ) -> None:  # fmt: skip
        """Look at the whole tensor where that is needed, then encode its tiles."""
        with _reported(progress, self.passes * self.x.numel()) as done:
            self.look(backends, done)
            job = Job(Tiles(tuple(self.x.shape), self.x.stride(), self.fmt), self.inputs, outputs, compute, scratch)
            with memory.workspace(self.room):
                _execute(job, backends, done)

    def inputs(self, tile: Tile) -> Parts:
        found = {name: tile.of_part(name, part) for name, part in self.given.items()}
        if self.weights is not None:
            found["weights"] = self.weights[tile.columns]
        return {**found, "x": tile.of_strided(self.x)}

    def shared(self, name: str) -> bool:
        """Whether a part is that of the whole tensor."""
        return name == "tensor_scale" or (self.fmt.group[0] == -1 and name != "qdata")

    def quantize(self, tile: Tile, inputs: Parts, outputs: Parts, backend: Backend) -> None:
        known = {name: inputs[name] for name in self.given}
        for name, part in known.items():
            if name in outputs:
                outputs[name].copy_(part)
        parts = {**known, **outputs}
        ops._run(
            inputs["x"], self.fmt, parts, "scale" in known, "tensor_scale" in known, None, search=self.search,
            weights=inputs.get("weights"), seed=self.seed, first=tile.first,
        )  # fmt: skip

    def qdq(self, tile: Tile, inputs: Parts, outputs: Parts, backend: Backend) -> None:
        x, names = inputs["x"], ("scale", "zero_point", "tensor_scale")
        parts = {name: inputs[name] for name in self.given}
        if self.search:
            parts = {**ops._allocate_scales(self.fmt, x, ops._SCALES), **parts}
            ops._choose_scales(x, self.fmt, parts, True, inputs.get("weights"))
        given = (parts.get(name) for name in names)
        ops._qdq(x, self.fmt, *given, seed=self.seed, first=tile.first, out=outputs["y"], tile=True)

    def scratch(self, tile: Tile) -> int:
        """Bytes of scales that QDQ keeps for a while."""
        return ops._scale_bytes(self.fmt, tile.shape, ops._SCALES)


def _encoding(
    x: Tensor, fmt: Format, given: dict[str, Tensor | None], rounding: str, generator: torch.Generator | None,
    search: str | bool | None, importance: Tensor | None,
) -> _Encoding:  # fmt: skip
    ops.check_input(x, fmt)
    importance = importance.to(x.device) if isinstance(importance, Tensor) else importance
    searched = ops.check_search(search, importance, x, fmt, given["scale"] is not None)
    parts = ops._checked_given(x, fmt, **given, anywhere=True)
    seed = ops._value(ops._seed(rounding, generator, x))
    return _Encoding(x.detach(), fmt, parts, searched, ops._weights(importance, fmt), seed)


@torch.no_grad()
def quantize(
    x: Tensor,
    fmt: Format | str,
    device: Devices,
    out: Parts,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
    search: str | bool | None = None,
    importance: Tensor | None = None,
    progress: Progress | bool | None = None,
) -> Parts:
    """`ops.quantize` of a tensor that lies anywhere, computed on `device` and left in `out`, contiguous parts that lie
    anywhere; given parts may lie anywhere, too. Other arguments and errors as those of `tritonq.quantize`."""
    fmt = get_format(fmt)
    for name, part in out.items():
        if not part.is_contiguous():
            raise ValueError(
                f"out[{name!r}] has to be contiguous, got strides {part.stride()}; pass a tensor of its own"
            )
    given = {"scale": scale, "zero_point": zero_point, "tensor_scale": tensor_scale}
    encoding = _encoding(x, fmt, given, rounding, generator, search, importance)
    backends = devices_of(device)
    if x.numel() == 0:
        with backends[0].current():
            parts = ops._quantize(encoding.x, fmt, *[encoding.given.get(name) for name in given])
        for name, part in parts.items():
            out[name].copy_(part)
        return out
    own = {name: part for name, part in out.items() if not encoding.shared(name)}
    encoding.run(
        backends, progress, lambda tile: {name: tile.of_part(name, part) for name, part in own.items()},
        encoding.quantize,
    )  # fmt: skip
    for name in out.keys() - own.keys():
        out[name].copy_(encoding.given[name])
    return out


@torch.no_grad()
def qdq(
    x: Tensor,
    fmt: Format | str,
    device: Devices,
    out: Tensor,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
    search: str | bool | None = None,
    importance: Tensor | None = None,
    progress: Progress | bool | None = None,
) -> Tensor:
    """`ops.qdq` of a tensor that lies anywhere, computed on `device` and left in contiguous `out`, which lies
    anywhere."""
    fmt = get_format(fmt)
    given = {"scale": scale, "zero_point": zero_point, "tensor_scale": tensor_scale}
    encoding = _encoding(x, fmt, given, rounding, generator, search, importance)
    backends = devices_of(device)
    if x.numel():
        encoding.run(backends, progress, lambda tile: {"y": tile.of_values(out)}, encoding.qdq, encoding.scratch)
    return out


@torch.no_grad()
def dequantize(
    parts: Parts, fmt: Format | str, device: Devices, out: Tensor, *, progress: Progress | bool | None = None
) -> Tensor:
    """`ops.dequantize` of contiguous parts that lie anywhere, computed on `device` and left in contiguous `out`."""
    fmt = get_format(fmt)

    def compute(tile: Tile, inputs: Parts, outputs: Parts, backend: Backend) -> None:
        ops._dequantize(inputs, fmt, tile.shape, out.dtype, outputs["y"])

    def inputs(tile: Tile) -> Parts:
        return {name: tile.of_part(name, part) for name, part in parts.items()}

    if out.numel():
        with _reported(progress, out.numel()) as done:
            tiles = Tiles(tuple(out.shape), out.stride(), fmt)
            job = Job(tiles, inputs, lambda tile: {"y": tile.of_values(out)}, compute)
            _execute(job, devices_of(device), done)
    return out


@torch.no_grad()
def tensor_scale(x: Tensor, fmt: Format | str, device: Devices) -> Tensor:
    """`ops.tensor_scale` of a tensor that lies anywhere, computed and left on `device`."""
    fmt = get_format(fmt)
    encoding, backends = _Encoding(x.detach(), fmt, {}), devices_of(device)
    if not fmt.tensor_scale or not x.numel() or (len(backends) == 1 and x.device == backends[0].device):
        return ops.tensor_scale(x, fmt).to(backends[0].device)
    encoding.look(backends, lambda elements: None)
    return encoding.given["tensor_scale"]


@torch.no_grad()
def hadamard(
    x: Tensor, signs: int, inverse: bool, device: Devices, out: Tensor, progress: Progress | bool | None = None
) -> Tensor:
    """`ops.hadamard` of a tensor that lies anywhere, computed on `device` and left in contiguous `out`. Bit i of
    `signs` is set where sign i is -1."""

    def compute(tile: Tile, inputs: Parts, outputs: Parts, backend: Backend) -> None:
        ops._hadamard(inputs["x"], signs, inverse, outputs["y"])

    if x.numel():
        with _reported(progress, x.numel()) as done:
            tiles = Tiles(tuple(x.shape), x.stride(), _BLOCKS)
            job = Job(
                tiles, lambda tile: {"x": tile.of_strided(x)}, lambda tile: {"y": tile.of_values(out)}, compute
            )  # fmt: skip
            _execute(job, devices_of(device), done)
    return out
