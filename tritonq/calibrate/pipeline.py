"""Block by block: what a block gets, what its layers become, what it puts out then.

    for each block, in the order in which the model calls them
        targets   what the dense block puts out for what it gets now
        methods   decide what its weights become; what they leave open is rounded to nearest
        outputs   of the quantized block, which replace those of the block before

So a block is tuned on what the quantized blocks before it put out, and its error does not add up unseen. In memory are
one block, its outputs and its targets. What comes from files and goes to files (`checkpoint`) enters and leaves through
`Storage`; a model in memory has nothing to do there.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tritonq import ops
from tritonq.calibrate.cache import ActivationCache
from tritonq.calibrate.data import Call
from tritonq.calibrate.fold import held_elsewhere
from tritonq.calibrate.grid import divisors
from tritonq.calibrate.inputs import use_static
from tritonq.calibrate.replay import Replay
from tritonq.calibrate.report import CalibrationReport
from tritonq.calibrate.task import Batch, Events, Layer, Method, Task, squared_error
from tritonq.formats import Format
from tritonq.nn.linear import QLinear
from tritonq.nn.quantize import Targets, check_finite, quantize_targets, replace_layers
from tritonq.nn.schemes import Scheme
from tritonq.nn.select import sharing_key
from tritonq.progress import progress_bar
from tritonq.reference import Parts
from tritonq.tensor import Layout, QTensor

MEASURED = 16  # samples of which the loss is told before and after
Result = TypeVar("Result")


class Storage:
    """Where blocks come from and go to: here a model in memory, whose blocks are there."""

    def ready(self, block: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Within this a block can be called, dense; its own memory may go afterwards."""
        return contextlib.nullcontext()

    def enter(self, index: int, name: str, block: nn.Module) -> None:
        """Give a block its dense weights for good: it is about to be quantized."""

    def restore(self, index: int, name: str, block: nn.Module, layers: Sequence[Layer]) -> bool:
        """Whether an earlier run has quantized this block; its results are in the layers then, and what it changed
        besides is in the block."""
        return False

    def keep(self, index: int, name: str, block: nn.Module, layers: Sequence[Layer]) -> None:
        """The layers have their results; the block still holds dense weights, as methods have transformed them."""

    def leave(self, index: int, name: str, block: nn.Module, layers: Sequence[Layer]) -> None:
        """The block is quantized, and what it puts out is in the cache; its memory may go."""

    def rest(self, run: Run) -> None:
        """Quantize the targets that are left, which are in no block."""
        if run.targets.linears or run.targets.experts:
            names = [name for name, _ in run.targets.weights]
            run.report.events("rounded without data", reason="in no block that is called", layers=names)
            quantize_targets(
                run.model, run.targets, run.scheme, group_size=run.group_size, search=run.search, device=run.device,
                progress=run.progress,
            )  # fmt: skip


@dataclass
class Run:
    """What is quantized, and with what.

    Attributes:
        found: names and modules of the blocks. targets: what to quantize in them.
        methods: run in this order on every block. devices: where blocks compute; the first holds the block.
        cache: of outputs. report: gets told. search: of rounding to nearest.
    """

    model: nn.Module
    scheme: Scheme
    targets: Targets
    found: list[tuple[str, nn.Module]]
    methods: Sequence[Method]
    calls: Sequence[Call]
    devices: tuple[torch.device, ...]
    cache: ActivationCache
    report: CalibrationReport
    group_size: int | None = None
    search: str | bool = "mse"
    micro_batch: int = 8
    seed: int = 0
    storage: Storage = field(default_factory=Storage)
    progress: bool = True

    @property
    def device(self) -> torch.device:
        return self.devices[0]

    def __call__(self) -> None:
        """Quantize all blocks, then what is outside of them."""
        rest, events = self._outside(), self.report.events
        with _evaluating(self.model), placed(lambda: rest, self.device, events, "what is beside the blocks") as at:
            with self.report.part("capture", self.devices):
                replay = Replay(
                    self.model, self.found, self.calls, at, self.cache, self._ready, self.micro_batch,
                    events=events,
                )  # fmt: skip
            with contextlib.closing(replay), progress_bar(self.progress) as bar:
                task = bar.add_task(f"calibrating {self.scheme.name}", total=len(replay.blocks))
                for index, (name, _) in enumerate(replay.blocks):
                    bar.update(task, description=name)
                    self._quantize(replay, index)
                    bar.advance(task)
        self.storage.rest(self)

    def _outside(self) -> list[nn.Module]:
        """Modules that are in no block."""
        inside = {id(module) for _, block in self.found for module in block.modules()}
        return [module for module in self.model.modules() if id(module) not in inside]

    @contextlib.contextmanager
    def _ready(self, block: nn.Module) -> Iterator[None]:
        """A block can be called, where blocks are computed."""
        with self.storage.ready(block), placed(block.modules, self.device, self.report.events, "a block"):
            yield

    def _quantize(self, replay: Replay, index: int) -> None:
        """One block, whose dense weights nobody holds afterwards."""
        name, block = replay.blocks[index]
        self.storage.enter(index, name, block)
        layers = self.layers(block)
        place = placed(block.modules, self.device, self.report.events, name)
        with self.report.block(name, layers, self.devices), place as device:
            if layers and not self.storage.restore(index, name, block, layers):
                self._decide(replay, index, layers, device)
                self.storage.keep(index, name, block, layers)
            if layers:
                weights = [self._packed(layer, layer.result or {}) for layer in layers]
                install(self.model, layers, weights)  # a layer may sit in other places, too
            replay.advance(index, device)
        self.storage.leave(index, name, block, layers)
        done = {id(layer.module) for layer in layers}
        self.targets.linears = [entry for entry in self.targets.linears if id(entry[1]) not in done]
        self.targets.experts = [entry for entry in self.targets.experts if id(entry[1]) not in done]

    def _decide(self, replay: Replay, index: int, layers: list[Layer], device: torch.device) -> None:
        """Set the results of all layers."""
        name, block = replay.blocks[index]
        samples = [sample for sample in range(len(self.calls)) if replay.calls_block(index, sample)]

        def fetch(numbers: Sequence[int], where: torch.device, targets: bool) -> list[Batch]:
            own = {samples[number]: number for number in numbers}
            found = replay.fetch(index, list(own), where, targets)
            for batch in found:
                batch.samples = tuple(own[sample] for sample in batch.samples)
            return found

        task = Task(
            name, block, layers, len(samples), fetch, device, self.report.events, self.devices, self.seed,
            self.search, min(self.micro_batch, len(samples)), held_elsewhere(self.model, block),
        )  # fmt: skip
        for start in range(0, len(samples), self.micro_batch):  # of the dense block; kept until the next one
            fetch(range(start, min(start + self.micro_batch, len(samples))), device, True)
        measured = sorted({i * len(samples) // MEASURED for i in range(MEASURED)})
        before = self._loss(task, measured, self._nearest(layers, layers))
        for method in self.methods:
            method.run(task)
        left = [layer for layer in layers if layer.result is None]
        for layer, parts in zip(left, self._nearest(left, layers), strict=True):
            layer.result = parts
        after = self._loss(task, measured, [layer.result or {} for layer in layers])
        self.report.events("quantized", block=name, loss_before=before, loss_after=after)
        if not math.isfinite(before):
            self.report.events("outputs are not finite", block=name, advice="run the model in bfloat16 or float32")

    def _nearest(self, layers: Sequence[Layer], all_layers: Sequence[Layer]) -> list[Parts]:
        """Rounding to nearest of the weights as they are, which a method may have scaled."""
        shared = divisors(all_layers)
        return [
            self._with_room(layer, functools.partial(rounded, layer, shared.get(layer), self.search))
            for layer in layers
        ]

    def _packed(self, layer: Layer, parts: Parts) -> nn.Parameter:
        return self._with_room(layer, functools.partial(packed, layer, parts))

    def _with_room(self, layer: Layer, quantize: Callable[[], Result]) -> Result:
        """What a weight is quantized to: where memory runs out, on the host, after what nobody needs is freed."""
        try:
            return quantize()
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
        # Only here do the frames of the failed attempt, and what they held, cease to be.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.report.events("out of memory", where="packing", layer=layer.name, device="cpu", reason=reason)
        weight = layer.weight
        home, here = weight.data, weight.device
        weight.data = home.to("cpu")
        try:
            return to(quantize(), here)
        finally:
            weight.data = home

    def _loss(self, task: Task, samples: Sequence[int], parts: Sequence[Parts]) -> float:
        """Of the block with these weights, over some samples."""
        weights = [self._packed(layer, own) for layer, own in zip(task.layers, parts, strict=True)]
        undo = install(task.block, task.layers, weights)
        try:
            return mean_squared_error(task, samples)
        finally:
            undo()

    def layers(self, block: nn.Module) -> list[Layer]:
        """The layers and experts of a block that are to be quantized."""
        inside = {id(module) for module in block.modules()}
        found, inputs = [], self.scheme.input_format
        weights: list[tuple[str, nn.Module, str, Format | None]] = []
        weights += [(name, module, "weight", inputs) for name, module in self.targets.linears]
        weights += [(name, module, key, None) for name, module, key in self.targets.experts]
        for name, module, key, inputs in weights:
            if id(module) in inside:
                fmt = self.scheme.weight_format(getattr(module, key).dtype, self.group_size)
                shared = sharing_key(name, fmt) if fmt.tensor_scale else None
                found.append(Layer(name, module, key, fmt, inputs, shared))
        return found


def to(value: Any, device: torch.device) -> Any:
    """Parts or a parameter, moved."""
    if isinstance(value, dict):
        return {name: part.to(device) for name, part in value.items()}
    value.data = value.data.to(device)
    return value


def rounded(layer: Layer, divisor: Tensor | None, search: str | bool) -> Parts:
    """Rounding to nearest, with the scale search, and with the importance of columns where there is one."""
    weight, fmt, importance = layer.weight.detach(), layer.fmt, layer.importance
    search = search if importance is None else "mse"
    if fmt.tensor_scale and divisor is None:
        divisor = ops.tensor_scale(weight, fmt)
    if importance is not None and importance.ndim == 2 and fmt.group[0] == -1:
        importance = importance.mean(0)  # experts that share one scale
    if importance is None or importance.ndim == 1:
        return ops.quantize(weight, fmt, tensor_scale=divisor, search=search, importance=importance)
    several = [
        ops.quantize(one, fmt, tensor_scale=divisor, search=search, importance=own)
        for one, own in zip(weight, importance, strict=True)
    ]
    parts = {name: torch.stack([each[name] for each in several]) for name in several[0]}
    return parts if divisor is None else {**parts, "tensor_scale": divisor}


def packed(layer: Layer, parts: Parts) -> nn.Parameter:
    """The weight of these parts."""
    weight = layer.weight
    layout = Layout.of(layer.fmt, tuple(weight.shape))
    q = QTensor(torch.empty(layout.nbytes, dtype=torch.uint8, device=weight.device), layout, weight.dtype)
    own = q.parts()
    for name, part in parts.items():
        own[name].copy_(part)
    check_finite(q, weight.detach(), layer.name)
    return nn.Parameter(q, requires_grad=False)


def install(block: nn.Module, layers: Sequence[Layer], weights: Sequence[nn.Parameter]) -> Callable[[], None]:
    """Put quantized weights in place of dense ones; what is returned puts the dense ones back."""
    new: dict[int, QLinear] = {}
    old: dict[int, nn.Module] = {}
    experts: list[tuple[nn.Module, str, nn.Parameter]] = []
    for layer, weight in zip(layers, weights, strict=True):
        if layer.is_expert:
            experts.append((layer.module, layer.key, layer.weight))
            setattr(layer.module, layer.key, weight)
            continue
        assert isinstance(layer.module, nn.Linear)
        made = QLinear.adopt(layer.module, weight, layer.input_format)
        use_static(made, layer.inputs)
        new[id(layer.module)], old[id(made)] = made, layer.module
    replace_layers(block, new)

    def undo() -> None:
        replace_layers(block, old)  # type: ignore[arg-type]
        for module, key, weight in experts:
            setattr(module, key, weight)

    return undo


@torch.no_grad()
def mean_squared_error(task: Task, samples: Sequence[int]) -> float:
    """The loss of the block as it is, over some samples; with fewer at a time where memory runs out."""
    total, count, start = 0.0, 0, 0
    while start < len(samples):
        rows = samples[start : start + task.micro_batch]
        try:
            found = [
                (float(squared_error(task.forward(batch), batch)), batch.count)
                for batch in task.fetch(rows, task.device, True)
            ]
        except torch.OutOfMemoryError:
            if task.micro_batch == 1:
                raise
            task.micro_batch //= 2
            task.events("out of memory", block=task.name, where="measuring", micro_batch=task.micro_batch)
            continue
        total, count, start = total + sum(e for e, _ in found), count + sum(n for _, n in found), start + len(rows)
    return total / max(1, count)


def _held(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers of just these modules that have values."""
    held = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
    return list({id(tensor): tensor for tensor in held if tensor is not None and not tensor.is_meta}.values())


@contextlib.contextmanager
def placed(
    modules: Callable[[], Iterable[nn.Module]], device: torch.device, events: Events, what: str
) -> Iterator[torch.device]:
    """Within this, parameters and buffers of these modules lie on a device, which is what comes out; where they do not
    fit, they stay, and what comes out is where they are. Afterwards they are where they were, and tensors that came in
    their place are where most of them were."""
    homes = {id(tensor): tensor.device for tensor in _held(modules())}
    home = collections.Counter(homes.values()).most_common(1)[0][0] if homes else device
    here = device
    try:
        try:
            for tensor in _held(modules()):
                _move(tensor, device)
        except torch.OutOfMemoryError as error:
            here = home
            events("block to host", block=what, device=str(home), reason=str(error).splitlines()[0])
            for tensor in _held(modules()):
                _move(tensor, home)
        yield here
    finally:
        for tensor in _held(modules()):
            _move(tensor, homes.get(id(tensor), home))


def _move(tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        tensor.data = tensor.data.to(device)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Neither dropout nor gradients of parameters, as before afterwards, also of layers that came in place of others.
    Autocast keeps no copies of weights, which methods change."""
    training = {name for name, module in model.named_modules(remove_duplicate=False) if module.training}
    # Tensors made in inference mode cannot be told again that they require gradients.
    learned = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad and not p.is_inference()}
    copies = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    for module in model.modules():
        module.training = False
    for name in learned:
        model.get_parameter(name).requires_grad_(False)
    try:
        yield
    finally:
        for name, module in model.named_modules(remove_duplicate=False):
            module.training = name in training
        torch.set_autocast_cache_enabled(copies)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in learned and not isinstance(parameter, QTensor):
                parameter.requires_grad_(True)
