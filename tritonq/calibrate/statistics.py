"""What goes into the layers of a block while its samples run through it.

For the rows x [n, K] that a weight [N, K] multiplies (all leading axes are rows), and for each expert e of fused
weights [E, N, K] alone:

    Hessian   H = sum of x x^T, fp32 [E, K, K]                       GPTQ, AWQ
    Columns   sum of x, |x| and x^2 by column, fp32 [E, K]           AWQ, SmoothQuant, imatrix, bias correction
    Range     smallest, largest, a histogram and some rows           static scales of inputs

A linear layer counts as one expert. Rows are seen where torch multiplies by a weight, see `calls`. Padding does not
count: rows that `Batch.masks` leaves out, and, among the tokens that a router deals out, those that were set to zero
for being padding.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tritonq import ops
from tritonq.calibrate.calls import Calls, eagerly
from tritonq.calibrate.outputs import version
from tritonq.calibrate.task import Batch, Layer, Task

FEW_TOKENS = 0.005  # an expert that sees a smaller share of the tokens is not calibrated


class Observer(Protocol):
    """Takes rows [n, K] of an expert. What may run out of memory comes before the first change."""

    def add(self, rows: Tensor, expert: int) -> None: ...


def experts_of(layer: Layer) -> int:
    return layer.weight.shape[0] if layer.is_expert else 1


class Hessian:
    """Sum of x x^T of some experts of a layer, fp32 [experts, K, K], sum of |x| [experts, K], and rows by expert.

    Args:
        layer: whose inputs; its `input_format` rounds them first where there is one.
        experts: those that count, a range.
    """

    def __init__(self, layer: Layer, experts: range | None = None) -> None:
        self.layer = layer
        self.experts = range(experts_of(layer)) if experts is None else experts
        columns = layer.weight.shape[-1]
        self.sum = torch.zeros(len(self.experts), columns, columns, dtype=torch.float32, device=layer.weight.device)
        self.absolute = torch.zeros(len(self.experts), columns, dtype=torch.float32, device=layer.weight.device)
        self.count = [0] * len(self.experts)

    def add(self, rows: Tensor, expert: int) -> None:
        if expert in self.experts:
            i = expert - self.experts.start
            rows = rounded(rows, self.layer)
            absolute = rows.abs().sum(0, dtype=torch.float32)
            if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16):  # exact products, summed in fp32
                self.sum[i] += torch.mm(rows.T, rows, out_dtype=torch.float32)
            else:
                rows = rows.float()
                self.sum[i].addmm_(rows.T, rows)
            self.absolute[i] += absolute
            self.count[i] += rows.shape[0]


class Columns:
    """Sums of x, |x| and x^2 and the largest |x| by column, fp32 [E, K]; rows by expert."""

    def __init__(self, layer: Layer) -> None:
        shape = (experts_of(layer), layer.weight.shape[-1])
        sums = torch.zeros(4, *shape, dtype=torch.float32, device=layer.weight.device)
        self.sum, self.absolute, self.square, self.largest = sums
        self.count = [0] * shape[0]

    def add(self, rows: Tensor, expert: int) -> None:
        rows = rows.float()
        magnitudes = rows.abs()
        found = rows.sum(0), magnitudes.sum(0), rows.square().sum(0), magnitudes.amax(0)
        self.sum[expert] += found[0]
        self.absolute[expert] += found[1]
        self.square[expert] += found[2]
        torch.maximum(self.largest[expert], found[3], out=self.largest[expert])
        self.count[expert] += rows.shape[0]

    def mean(self, sums: Tensor) -> Tensor:
        """Sums [E, K] over the rows; 0 for experts without any."""
        count = torch.tensor(self.count, dtype=torch.float32, device=sums.device).clamp_(min=1.0)
        return sums / count.unsqueeze(-1)

    def overall(self, sums: Tensor) -> Tensor:
        """Sums [E, K] to the mean of all rows of all experts, [K]."""
        return sums.sum(0) / max(1, sum(self.count))


class Range:
    """Smallest and largest finite input, a histogram, and some rows.

    Bins are `width` wide, from 0 up and from 0 down; the width doubles, and neighbours join, until the largest
    magnitude fits: a count never moves but with all of its bin, and the first width is a power of two.

    Args:
        rows: how many to keep, drawn at random with `seed`, each with the same chance.
    """

    BINS = 4096  # of either sign

    def __init__(self, layer: Layer, rows: int = 0, seed: int = 0) -> None:
        device = layer.weight.device
        self.low = torch.zeros((), dtype=torch.float32, device=device)  # a range of inputs includes 0
        self.high = torch.zeros((), dtype=torch.float32, device=device)
        self.counts = torch.zeros(2, self.BINS, dtype=torch.float64, device=device)
        self.width = 2.0**-126
        self.total = 0
        self.rows = torch.empty(0, layer.weight.shape[-1], dtype=torch.float32, device=device)
        self._most, self._keys = rows, torch.empty(0, dtype=torch.float32)
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, rows: Tensor, expert: int) -> None:
        rows = rows.float()
        rows = rows[rows.isfinite().all(-1)]
        if not rows.numel():
            return
        values = rows.flatten()
        low, high = torch.aminmax(values)
        top, width, counts = max(self.top, -float(low), float(high)), self.width, self.counts
        if not self.top and top > 0:  # nothing but zeros so far, in the first bin
            width = 2.0 ** max(-126, math.frexp(top)[1] - int(math.log2(self.BINS)))
        while top >= width * self.BINS:
            width, counts = (
                2 * width,
                torch.cat([counts.unflatten(1, (-1, 2)).sum(2), torch.zeros_like(counts)[:, ::2]], 1),
            )
        bins = (values.abs() / width).to(torch.int64).clamp_(max=self.BINS - 1)
        bins += (values < 0).to(torch.int64) * self.BINS
        found = torch.bincount(bins, minlength=2 * self.BINS).view(2, -1)
        keys = torch.cat([self._keys, torch.rand(len(rows), generator=self._generator)])
        kept = keys.topk(min(self._most, len(keys))).indices
        sample = torch.cat([self.rows, rows])[kept.to(rows.device)]
        self.counts, self.width = counts + found, width
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.rows, self._keys = sample, keys[kept]
        self.total += values.numel()

    @property
    def top(self) -> float:
        """Largest magnitude."""
        return max(-float(self.low), float(self.high))

    @property
    def centers(self) -> Tensor:
        """The number that each bin stands for, fp32 [2 * BINS], in the order of `counts`."""
        up = (torch.arange(self.BINS, device=self.counts.device) + 0.5) * self.width
        return torch.cat([up, -up])

    def quantile(self, share: float) -> float:
        """The smallest end of a bin that `share` of the magnitudes do not exceed."""
        below = self.counts.sum(0).cumsum(0)
        return (int((below < share * below[-1]).sum()) + 1) * self.width


def rounded(rows: Tensor, layer: Layer) -> Tensor:
    """Rows as the quantized layer will see them."""
    fmt = layer.input_format
    if fmt is None:
        return rows
    given: dict[str, Any] = dict(layer.inputs)
    if fmt.tensor_scale and "tensor_scale" not in given:  # what `QLinear` takes without calibration
        given["tensor_scale"] = torch.ones(1, dtype=torch.float32, device=rows.device)
    return ops.qdq(rows, fmt, **given)


def counting_rows(batch: Batch, rows: int) -> Tensor | None:
    """Which of `rows` rows count, bool [rows]; None where all do, or where they cannot be told apart."""
    for i, mask in enumerate(batch.masks):
        if mask is None:
            continue
        whole = mask.expand(batch.targets[i].shape) if i < len(batch.targets) else mask
        flat = (whole != 0).any(-1).flatten()
        if flat.numel() == rows:
            return flat
    return None


# -------------------------------------------------------------------------------------------------------- collecting


def each_batch(task: Task, use: Callable[[Batch], None], settled: Callable[[], None] = lambda: None) -> None:
    """`use` every batch. Out of memory halves `task.micro_batch`, tells `task.events`, and goes on with the samples of
    the batches of that call; `settled` is called when those of a call are through, however often they were cut.

    Raises:
        torch.OutOfMemoryError: a single sample does not fit, with what was tried.
    """
    first, end = 0, 0
    while first < task.samples:
        size = min(task.micro_batch, task.samples - first)
        failure = None
        try:
            for batch in task.fetch(range(first, first + size), task.device, True):  # masks come with targets
                use(batch)
        except torch.OutOfMemoryError as error:
            failure = str(error)  # not the error itself, whose frames keep tensors
        if failure is None:
            first += size
            if first >= end:
                settled()
            continue
        if size == 1:
            raise torch.OutOfMemoryError(
                f"{task.name}: no memory for one sample on {task.device}: {failure}; take shorter samples (seqlen), or "
                "keep less on this device"
            )
        end = max(end, first + size)
        task.micro_batch = size // 2
        task.events("out of memory", block=task.name, where="statistics", micro_batch=task.micro_batch, reason=failure)


class _Collection:
    """Brings the inputs of layers to their observers, each row once, also where a batch is cut and runs again."""

    def __init__(self, task: Task, observers: Mapping[Layer, Observer]) -> None:
        self.task, self.observers = task, observers
        self.tokens = dict.fromkeys(observers, 0)
        self.done: dict[Any, set[int]] = {}  # samples that a call is through with, since the last call that fitted
        self.calls: collections.Counter[Any] = collections.Counter()
        self.batch: Batch = Batch((), (), {})

    def use(self, batch: Batch) -> None:
        self.batch = batch
        self.calls.clear()
        with contextlib.ExitStack() as stack:
            experts: dict[nn.Module, list[Layer]] = {}
            for layer in self.observers:
                if layer.is_expert:
                    experts.setdefault(layer.module, []).append(layer)
            for module, layers in experts.items():
                hook = functools.partial(self._dealt_out, layers)
                stack.enter_context(_removing(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)))
            stack.enter_context(Calls({layer: layer.weight for layer in self.observers}, self.see))
            self.task.forward(batch)

    def again(self, *call: Any) -> bool:
        """Whether an earlier run of these samples got beyond this call."""
        self.calls[call] += 1
        return set(self.batch.samples) <= self.done.get((*call, self.calls[call]), set())

    def through(self, *call: Any) -> None:
        self.done.setdefault((*call, self.calls[call]), set()).update(self.batch.samples)

    @property
    def masked(self) -> bool:
        return any(mask is not None for mask in self.batch.masks)

    def see(self, layer: Layer, expert: int | range, x: Tensor) -> None:
        if isinstance(expert, range):
            for e, rows in zip(expert, x.expand(len(expert), *x.shape[-2:]), strict=True):
                self.see(layer, e, rows)
            return
        if self.again(layer, expert):
            return
        rows = x.detach().reshape(-1, x.shape[-1])
        if self.masked and layer.is_expert:
            rows = rows[(rows != 0).any(-1)]
        elif self.masked and (mask := counting_rows(self.batch, rows.shape[0])) is not None:
            rows = rows[mask]
        if rows.shape[0]:
            self.observers[layer].add(rows, expert)
        if not layer.is_expert:
            self.tokens[layer] += rows.shape[0]
        self.through(layer, expert)

    def _dealt_out(self, layers: list[Layer], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Sets tokens of padding to zero before a router's choice is carried out: they then add nothing, and can be
        told apart where tokens are gathered by expert."""
        name = None if args else next(iter(kwargs), None)
        x = args[0] if args else kwargs.get(name or "")
        if not isinstance(x, Tensor) or x.ndim < 2:
            return None
        count = x.shape[:-1].numel()
        mask = counting_rows(self.batch, count) if self.masked else None
        if mask is not None:
            x, count = x * mask.view(*x.shape[:-1], 1).to(x.dtype), int(mask.sum())
        if not self.again(module):
            for layer in layers:
                self.tokens[layer] += count
            self.through(module)
        return ((x, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: x})


@contextlib.contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def collect(task: Task, observers: Mapping[Layer, Observer]) -> dict[Layer, int]:
    """Run all samples through the block and show each observer the inputs of its layer.

    Returns:
        How many tokens came to each layer: to fused experts those that the router dealt out, each counted once.

    Raises:
        torch.OutOfMemoryError: a single sample does not fit; all else leaves fewer samples a call.
    """
    collection = _Collection(task, observers)
    with eagerly(task.block):
        each_batch(task, collection.use, collection.done.clear)
    return collection.tokens


@torch.no_grad()
def one_batch(task: Task) -> Batch:
    """The first sample alone: what to look at where structure, not numbers, is asked for."""
    return task.fetch(range(1), task.device, False)[0]


@torch.no_grad()
def shared_inputs(task: Task, layers: Sequence[Layer]) -> list[list[Layer]]:
    """`layers` by what goes into them: those of a list get the same tensor at every call (q, k and v; gate and up) and
    round it alike, so that statistics of the first are those of all. Fused experts are alone."""
    inputs: dict[Layer, list[Any]] = {layer: [] for layer in layers}
    alive: list[Tensor] = []  # so that no memory is given out twice

    def see(layer: Layer, expert: int | range, x: Tensor) -> None:
        alive.append(x)
        inputs[layer].append((x.data_ptr(), x.numel(), x.stride(-1), x.dtype, version(x)))

    def look() -> None:
        with eagerly(task.block), Calls({layer: layer.weight for layer in layers}, see):
            task.forward(one_batch(task))

    reason = None
    try:
        look()
    except torch.OutOfMemoryError as error:
        reason = str(error)  # not the error itself, whose frames keep tensors
    if reason is not None:
        task.events("out of memory", block=task.name, where="structure", reaction="tried again", reason=reason)
        alive.clear()
        inputs.update({layer: [] for layer in layers})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        look()
    sets: dict[Any, list[Layer]] = {}
    for layer, seen in inputs.items():
        alike = seen and not layer.is_expert and layer.weight.shape[-1]
        static = tuple((name, tuple(part.flatten().tolist())) for name, part in sorted(layer.inputs.items()))
        key = (tuple(seen), alike, layer.input_format, static) if alike else id(layer)
        sets.setdefault(key, []).append(layer)
    return list(sets.values())
