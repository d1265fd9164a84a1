"""A block that computes with other weights than its own, on one device or several, and the gradients of those.

    with Trial(task) as trial:
        leaf = trial.leaves[i]                     what layer i computes with; write values into it
        trial.run(order, gradients=True)           sum of (y - t)^2 / 2; adds its gradients to leaf.grad

The block keeps its own parameters: leaves take their place while it runs, and only then. Everything else in it has no
gradient meanwhile. Inputs of layers with an input format are rounded, straight through.

Gradients of leaves are added up in the dtype of the weight: each call's gradient is rounded to it by the matrix product
that makes it, so a wider sum would keep the errors of its terms, for twice the memory. The order is that of the calls,
whichever device each ran on, so devices that compute alike give the bits of one.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils import deterministic as uninitialized

from tritonq.autograd import qdq
from tritonq.calibrate.leaves import forget, gradient, leaf_of
from tritonq.calibrate.task import Batch, Layer, Task
from tritonq.formats import Format
from tritonq.reference import Parts


class HalfSquaredError(torch.autograd.Function):
    """sum of (y - t)^2 / 2 over what counts, fp32 []. Keeps the difference, in the dtype of y, which is its gradient:
    without a division by the number of elements no gradient in fp16 vanishes, and sign descent needs no scale."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        difference = torch.sub(y, target).to(y.dtype)
        if mask is not None:
            difference.mul_(mask)
        ctx.save_for_backward(difference)
        return torch.linalg.vector_norm(difference, dtype=torch.float32).square() / 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return difference.mul_(grads[0].to(difference.dtype)), None, None  # in place: nobody goes backward twice


def half_squared_error(outputs: Sequence[Tensor], batch: Batch) -> Tensor:
    """Half of `task.squared_error`, differentiable."""
    total = None
    for y, target, mask in zip(outputs, batch.targets, batch.masks, strict=True):
        one: Tensor = HalfSquaredError.apply(y, target, mask)
        total = one if total is None else total + one
    if total is None:
        raise ValueError("the block puts out no floating-point tensor, so nothing says how good its weights are")
    return total


def counted(batch: Batch) -> Tensor:
    """`batch.count` as fp64 [] on the device, which nobody waits for."""
    device = batch.targets[0].device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for target, mask in zip(batch.targets, batch.masks, strict=True):
        total += target.numel() if mask is None else mask.expand(target.shape).sum()
    return total


# ------------------------------------------------------------------------------------------------------------ weights


class InputRounding:
    """Forward pre-hooks that round what layers of one replica get. Layers that get the same tensor share the result."""

    def __init__(self) -> None:
        self.last: tuple[Any, ...] | None = None
        self.known: list[Parts] = []

    def hook(self, fmt: Format, given: Parts) -> Any:
        """Of a layer whose inputs have these static parts."""
        parts = next((one for one in self.known if _equal(one, given)), given)
        self.known.append(parts)

        def rounded(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return self.rounded(args[0], fmt, parts), *args[1:]

        return rounded

    def rounded(self, x: Tensor, fmt: Format, parts: Parts) -> Tensor:
        key = x._version, fmt, id(parts), torch.is_grad_enabled()
        if self.last is not None and self.last[0]() is x and self.last[1] == key:
            found: Tensor = self.last[2]
            return found
        y = qdq(x, fmt, **parts)  # type: ignore[arg-type]  # parts of a Format are tensors
        self.last = weakref.ref(x), key, y
        return y


def _equal(one: Parts, other: Parts) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ----------------------------------------------------------------------------------------------------------- replicas


@dataclass(eq=False)
class Replica:
    """The block on one device: modules and keys of its layers, and the leaves that take the place of their weights."""

    device: torch.device
    block: nn.Module
    places: list[tuple[nn.Module, str]]
    leaves: list[Tensor]
    inputs: InputRounding = field(default_factory=InputRounding)
    compiled: Any = None

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The block computes with the leaves."""
        before = [module._parameters[key] for module, key in self.places]
        for (module, key), leaf in zip(self.places, self.leaves, strict=True):
            module._parameters[key] = leaf  # type: ignore[assignment]  # a leaf needs no nn.Parameter around it
        try:
            yield
        finally:
            for (module, key), own in zip(self.places, before, strict=True):
                module._parameters[key] = own
            self.inputs.last = None


def _replica(task: Task, device: torch.device, of: Replica) -> Replica:
    """A copy of the block elsewhere. Its tensors are put there one by one: no second copy of a weight comes to be, and
    none at all of those that leaves take the place of."""
    leaves = []
    memo: dict[int, Any] = {}
    for layer, leaf in zip(task.layers, of.leaves, strict=True):
        plain = leaf.detach().as_subclass(Tensor)
        values = plain if device == of.device else torch.empty_like(plain, device=device)
        leaves.append(leaf_of(values.detach(), type(leaf) is not Tensor))
        memo[id(layer.weight)] = layer.weight
    for tensor in (*task.block.parameters(), *task.block.buffers()):
        if id(tensor) not in memo:
            moved = tensor.detach().to(device)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
    block = copy.deepcopy(task.block, memo)
    twin = dict(zip(task.block.modules(), block.modules(), strict=True))
    return Replica(device, block, [(twin[layer.module], layer.key) for layer in task.layers], leaves)


class Ahead:
    """Batches of one device; what comes next is fetched on a stream of its own while the device computes."""

    def __init__(self, task: Task, device: torch.device, enabled: bool = True) -> None:
        self.task, self.device = task, device
        self.stream: torch.cuda.Stream | None = None
        if enabled and device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))
        self.next: tuple[tuple[int, ...], list[Batch]] | None = None

    def take(self, samples: tuple[int, ...], following: tuple[int, ...] | None) -> list[Batch]:
        if self.stream is None:
            return self.task.fetch(samples, self.device, True)
        if self.next is None or self.next[0] != samples:
            self._fetch(samples)
        assert self.next is not None
        batches, self.next = self.next[1], None
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for tensor in pytree.tree_leaves([[b.args, b.kwargs, b.targets, b.masks] for b in batches]):
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                tensor.record_stream(current)
        if following is not None:
            self._fetch(following)
        return batches

    def _fetch(self, samples: tuple[int, ...]) -> None:
        with torch.cuda.stream(self.stream):
            self.next = samples, self.task.fetch(samples, self.device, True)


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Kernels that give the same bits in every run (backward of attention, index_add), where torch has them."""
    if not enabled:
        yield
        return
    before = torch.get_deterministic_debug_mode()
    filled = uninitialized.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        try:
            torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import the compiler
            uninitialized.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            yield
        finally:
            torch.set_deterministic_debug_mode(before)
            uninitialized.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


Call = tuple[Replica, Batch]


class Trial:
    """See above. A call takes `micro_batch` samples of the task, and `most` at most.

    Attributes:
        leaves: one for each layer of the task, of the shape and dtype of its weight, on the first device.
        replicas: of the block, the first of them the block itself.
    """

    def __init__(self, task: Task, most: int | None = None, compile: bool = False) -> None:
        self.task, self.most, self.compile = task, most, compile
        self.replicas: list[Replica] = []
        self._undo = contextlib.ExitStack()
        self.ahead: dict[int, Ahead] = {}

    @property
    def leaves(self) -> list[Tensor]:
        return self.replicas[0].leaves

    def __enter__(self) -> Trial:
        task = self.task
        with contextlib.ExitStack() as undo:
            undo.enter_context(torch.inference_mode(False))
            undo.enter_context(torch.enable_grad())
            for parameter in task.block.parameters():
                if parameter.requires_grad:
                    undo.callback(parameter.requires_grad_, True)
                    parameter.requires_grad_(False)
            places = [(layer.module, layer.key) for layer in task.layers]
            leaves = [leaf_of(torch.empty_like(layer.weight.detach()), not self.compile) for layer in task.layers]
            first = Replica(task.device, task.block, places, leaves)
            self.replicas = [first, *(_replica(task, device, first) for device in task.devices[1:])]
            undo.callback(self.replicas.clear)
            for replica in self.replicas:
                for layer, (module, _) in zip(task.layers, replica.places, strict=True):
                    if layer.input_format is not None and not layer.is_expert:  # experts' stay as they are
                        parts = _input_parts(layer, replica.device)
                        hook = replica.inputs.hook(layer.input_format, parts)
                        undo.callback(module.register_forward_pre_hook(hook).remove)
                if self.compile:
                    replica.compiled = torch.compile(replica.block)
            self.look_ahead(True)
            undo.callback(self.ahead.clear)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def look_ahead(self, enabled: bool) -> None:
        """Whether the next batch is fetched while one computes."""
        self.ahead = {i: Ahead(self.task, r.device, enabled) for i, r in enumerate(self.replicas)}

    def forget(self) -> None:
        """Drop gradients and what was fetched."""
        for replica in self.replicas:
            for leaf in replica.leaves:
                forget(leaf)
            replica.inputs.last = None
        for ahead in self.ahead.values():
            ahead.next = None

    def publish(self) -> None:
        """Give replicas the values of the leaves."""
        with torch.no_grad():
            for replica in self.replicas[1:]:
                for leaf, other in zip(self.leaves, replica.leaves, strict=True):
                    if other.data_ptr() != leaf.data_ptr():
                        other.copy_(leaf)

    def run(
        self, samples: Sequence[int], gradients: bool, following: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(sum of (y - t)^2, number of elements) over `samples`, fp32 and fp64 [] on the first device, `size`
        samples at a time; with `gradients`, those of half the sum are added to the leaves'. `following` come next."""
        chunks = self._chunks(samples)
        after = self._chunks(following or ())
        device = self.replicas[0].device
        total, count = torch.zeros((), device=device), torch.zeros((), dtype=torch.float64, device=device)
        group: list[Call] = []
        for position, chunk in enumerate(chunks):
            own = position % len(self.replicas)  # a chunk's place in its run says which replica takes it
            replica, later = self.replicas[own], [*chunks[own :: len(self.replicas)], *after[own : own + 1]]
            upcoming = next(iter(later[position // len(self.replicas) + 1 :]), None)
            for batch in self.ahead[own].take(chunk, upcoming):
                if group and (own == 0 or any(replica is other for other, _ in group)):
                    total, count = self._together(group, gradients, total, count)
                    group = []
                group.append((replica, batch))
                del batch  # or it would live on beside the next one, and the one after that
                if own == len(self.replicas) - 1:  # nobody is left to wait for
                    total, count = self._together(group, gradients, total, count)
                    group = []
        if group:
            total, count = self._together(group, gradients, total, count)
        return total, count

    @property
    def size(self) -> int:
        """Samples in a call."""
        return self.task.micro_batch if self.most is None else min(self.task.micro_batch, self.most)

    def _chunks(self, samples: Sequence[int]) -> list[tuple[int, ...]]:
        size = self.size
        return [tuple(samples[i : i + size]) for i in range(0, len(samples), size)]

    def _together(self, group: list[Call], gradients: bool, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Calls on different devices; that of the first, whose leaves gather all gradients, comes first."""
        with contextlib.ExitStack() as stack:
            for replica, _ in group:
                stack.enter_context(replica.swapped())  # backward of a checkpointed block runs forward again
            stack.enter_context(torch.set_grad_enabled(gradients))
            errors = [half_squared_error(self._forward(replica, batch), batch) for replica, batch in group]
            if gradients:
                torch.autograd.backward(errors)
        for (replica, batch), error in zip(group, errors, strict=True):
            if gradients and replica is not self.replicas[0]:
                self._collect(replica)
            total = total + 2 * error.detach().to(total.device)
            count = count + counted(batch).to(count.device)
        return total, count

    def _forward(self, replica: Replica, batch: Batch) -> list[Tensor]:
        return self.task.forward(batch, replica.block if replica.compiled is None else replica.compiled)

    def _collect(self, replica: Replica) -> None:
        """Add a replica's gradients to those of the first."""
        for leaf, other in zip(self.leaves, replica.leaves, strict=True):
            if other.grad is not None:
                moved = other.grad.to(leaf.device)
                own = gradient(leaf)
                leaf.grad = moved if own is None else own.add_(moved)
                other.grad = None


def _input_parts(layer: Layer, device: torch.device) -> Parts:
    """What a `QLinear` gives to `qdq` with its inputs."""
    parts = {name: part.to(device) for name, part in layer.inputs.items()}
    if layer.input_format is not None and layer.input_format.tensor_scale and "tensor_scale" not in parts:
        parts["tensor_scale"] = torch.ones(1, dtype=torch.float32, device=device)
    return parts


class Tokens:
    """How many tokens went to each expert, by the identity of a task's module of experts."""

    def __init__(self) -> None:
        self.counts: dict[int, list[Tensor]] = {}
        self.rows: dict[int, int] = {}

    def clear(self) -> None:
        self.counts.clear()
        self.rows.clear()

    def see(self, module: int, experts: int, routed: Tensor) -> None:
        """`routed`: int [tokens, experts of a token]; a number past the last expert stands for none."""
        routed = routed.detach().reshape(routed.shape[0], -1)
        seen = torch.zeros(experts + 1, dtype=torch.int64, device=routed.device)
        flat = routed.reshape(-1).to(torch.int64).clamp(0, experts)
        self.counts.setdefault(module, []).append(seen.index_add_(0, flat, torch.ones_like(flat))[:experts])
        self.rows[module] = self.rows.get(module, 0) + routed.shape[0]

    def of(self, module: int) -> tuple[list[int], int]:
        """Tokens by expert, and of all."""
        counts = [one.cpu() for one in self.counts[module]]
        return torch.stack(counts).sum(0).tolist(), self.rows[module]


@contextlib.contextmanager
def counted_tokens(trial: Trial, modules: dict[int, int]) -> Iterator[Tokens]:
    """Count while the trial runs; `modules` are those of experts, by their identity, and how many experts they hold.
    Which expert a token goes to is the first integer tensor that the module is called with."""
    found = Tokens()

    def hook(key: int) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for given in (*args, *kwargs.values()):
                if isinstance(given, Tensor) and not given.is_floating_point() and given.ndim:
                    found.see(key, modules[key], given)
                    return

        return see

    with contextlib.ExitStack() as undo:
        for replica in trial.replicas:
            seen = set()
            for layer, (module, _) in zip(trial.task.layers, replica.places, strict=True):
                key = id(layer.module)
                if key in modules and key not in seen:
                    seen.add(key)
                    undo.callback(module.register_forward_pre_hook(hook(key), with_kwargs=True).remove)
        yield found
