"""Where columns of weights can be scaled for free: what they multiply is put out by something that can be divided.

    consumer W [N, K], x = producer's output:   (W * s) (x / s) = W x,     s [K] > 0

Pairs are found by what happens, not by names. A producer is the affine weight of a norm (its own, or 1 + weight as
Gemma has it), a linear layer, half of the rows of one (gate and up in one weight), or those of fused experts. Its
channels are multiplied by powers of two; whatever multiplies a weight by inputs that scaled exactly so is a consumer,
is divided, and the block runs again, which shows those behind a router, until there are no more. It is a pair if the
block then puts out what it did before: nothing else reads the producer, and `held_elsewhere` says so of the model
outside of the block. Weights are left as they were, bit for bit.

Heads that share keys and values repeat the channels of v: which column comes from which channel is read off the bits of
the channel's number, one run of the block a bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tritonq.calibrate.calls import Calls, eagerly
from tritonq.calibrate.statistics import one_batch
from tritonq.calibrate.task import Batch, Layer, Task

Inputs = dict[str, dict[int, list[Tensor]]]  # weight: expert: what it multiplied, call by call


@dataclass(eq=False)
class Producer:
    """The first parameter is a vector [N], a weight [N, K] or that of fused experts [E, N, K], others are biases [N] or
    [E, N]; `rows` of N are output channels, `channels` many. `plus_one` where 1 + p is what multiplies."""

    name: str
    parameters: list[nn.Parameter]
    rows: slice
    channels: int
    plus_one: bool = False

    def views(self) -> list[Tensor]:
        """[.., channels] or [.., channels, 1 .. K], that share memory."""
        experts = self.parameters[0].ndim == 3
        return [p.detach()[:, self.rows] if experts else p.detach()[self.rows] for p in self.parameters]

    def multiply(self, factor: Tensor) -> None:
        """By [channels], or [E, channels] for fused experts."""
        for own in self.views():
            by = factor if own.ndim == factor.ndim else factor.unsqueeze(-1)
            value = own.float()
            own.copy_((value + 1) * by - 1 if self.plus_one else value * by)


@dataclass(eq=False)
class Fold:
    """A producer and all that reads it.

    Attributes:
        layers: consumers that are to be quantized. weights: all consumers, [N, K] or [E, N, K].
        source: channel of each column, [K]; None where they are the same.
        by_expert: every expert has a scale of its own, [E, channels].
        touched: layers whose weights change when the pair is scaled: the consumers, and the producer where it is one.
    """

    producer: Producer
    weights: dict[str, nn.Parameter]
    layers: list[Layer] = field(default_factory=list)
    source: Tensor | None = None
    by_expert: bool = False
    touched: list[Layer] = field(default_factory=list)

    def columns(self, s: Tensor) -> Tensor:
        """Scales of channels to those of columns."""
        return s if self.source is None else s[..., self.source]

    def channels(self, columns: Tensor, reduce: str = "mean") -> Tensor:
        """Means ("amax": the largest) of columns [.., K] by channel."""
        if self.source is None:
            return columns
        found = columns.new_zeros(*columns.shape[:-1], self.producer.channels)
        return found.scatter_reduce_(-1, self.source.expand(columns.shape), columns, reduce, include_self=False)

    @torch.no_grad()
    def apply(self, s: Tensor) -> None:
        """Multiply columns by s, [channels] or [E, channels], and divide what is put out. What was decided about the
        weights before is void."""
        for layer in self.touched:
            layer.result = layer.importance = None
        self.producer.multiply(1 / s)
        for weight in self.weights.values():
            scale_columns(weight.detach(), self.columns(s))


def scale_columns(weight: Tensor, s: Tensor) -> None:
    weight.copy_(weight.float() * (s if s.ndim == 1 else s.unsqueeze(-2)))


def held_elsewhere(model: nn.Module, block: nn.Module) -> frozenset[int]:
    """Ids of the parameters of a block that are reached from the model without the block, too: tied ones, and those of
    modules that sit in several places. What code reads from elsewhere without a module that holds it is not found."""
    inside = {id(p) for p in block.parameters()}
    reached: set[int] = set()
    seen, left = {id(block)}, [model] if model is not block else []
    while left:
        module = left.pop()
        if id(module) not in seen:
            seen.add(id(module))
            reached.update(id(p) for p in module._parameters.values() if p is not None)
            left += [child for child in module._modules.values() if child is not None]
    return frozenset(inside & reached)


@contextlib.contextmanager
def unchanged(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Parameters have the bits of before afterwards."""
    before = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        for p, old in zip(parameters, before, strict=True):
            p.detach().copy_(old)


def _close(found: Tensor, expected: Tensor, tolerance: float) -> Tensor:
    """Which columns differ by no more than a share of their norm, bool [K]."""
    columns = expected.shape[-1] if expected.ndim else 1
    found, expected = found.reshape(-1, columns), expected.reshape(-1, columns)
    result: Tensor = (found - expected).norm(dim=0) <= tolerance * expected.norm(dim=0)
    return result


def _near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return found.shape == expected.shape and bool(_close(found, expected, tolerance).all())


class _Probe:
    def __init__(self, task: Task) -> None:
        self.task, self.batch = task, one_batch(task)
        self.weights = {n: p for n, p in task.block.named_parameters() if p.ndim in (2, 3) and p.is_floating_point()}
        self.inputs, self.outputs = self.run(self.batch)

    def run(self, batch: Batch) -> tuple[Inputs, list[Tensor]]:
        found: Inputs = {}

        def see(name: str, expert: int | range, x: Tensor) -> None:
            experts = [expert] if isinstance(expert, int) else list(expert)
            for i, e in enumerate(experts):
                own = x if isinstance(expert, int) else x[i if x.shape[0] > 1 else 0]
                found.setdefault(name, {}).setdefault(e, []).append(own.reshape(-1, own.shape[-1]).float().clone())

        with eagerly(self.task.block), Calls(self.weights, see):
            outputs = self.task.forward(batch)
        return found, [y.float().clone() for y in outputs]

    def tolerance(self, producer: Producer) -> float:
        """Relative error of what products of powers of two, exact by themselves, may come to on their way: sums in any
        order, rounded to the dtype, and those of (1 + p) * s - 1."""
        return (8 if producer.plus_one else 4) * max(torch.finfo(p.dtype).eps for p in producer.parameters)

    def same(self, outputs: list[Tensor], tolerance: float) -> bool:
        """Whether every column of the outputs is as before."""
        return all(_near(y, old, tolerance) for y, old in zip(outputs, self.outputs, strict=True))

    def scaled(self, name: str, now: Inputs, factor: Tensor, tolerance: float) -> bool:
        """Whether all inputs of a weight are those of before times factor [K] or [E, K], of which some are not 1."""
        before, after = self.inputs.get(name, {}), now.get(name, {})
        if not before or before.keys() != after.keys():
            return False
        changed = False
        for expert, olds in before.items():
            own = factor if factor.ndim == 1 else factor[expert]
            if len(olds) != len(after[expert]) or olds[0].shape[-1] != own.shape[-1]:
                return False
            for old, new in zip(olds, after[expert], strict=True):
                if old.shape != new.shape:
                    return False
                if not _near(new, old * own, tolerance):
                    return False
                changed = changed or not torch.equal(old, new)
        return changed

    def consumers(self, producer: Producer, source: Tensor | None, by_expert: bool) -> Fold | None:
        """Who reads the producer; None where anybody else does, or nobody."""
        generator = torch.Generator().manual_seed(self.task.seed)
        shape = (len(producer.views()[0]), producer.channels) if by_expert else (producer.channels,)
        power = 2 * torch.randint(-1, 2, shape, generator=generator).to(producer.parameters[0].device)
        power[..., 0] = 2  # whatever the draw, some change
        fold = Fold(producer, {}, [], source, by_expert)
        s = torch.exp2(power.float())
        factor = fold.columns(1 / s)
        tolerance = self.tolerance(producer)
        columns = factor.shape[-1]
        with contextlib.ExitStack() as stack:
            stack.enter_context(unchanged(producer.parameters))
            producer.multiply(1 / s)
            while True:
                now, outputs = self.run(self.batch)
                found = [
                    name for name, weight in self.weights.items()
                    if weight.shape[-1] == columns and name not in fold.weights
                    and (not by_expert or weight.ndim == 3) and self.scaled(name, now, factor, tolerance)
                ]  # fmt: skip
                if not found:
                    break
                for name in found:
                    fold.weights[name] = weight = self.weights[name]
                    stack.enter_context(unchanged([weight]))
                    scale_columns(weight.detach(), fold.columns(s))
            if not fold.weights or not self.same(outputs, tolerance):
                return None
        fold.layers = [one for one in self.task.layers if any(one.weight is w for w in fold.weights.values())]
        changed = [*fold.weights.values(), *producer.parameters]
        if any(id(p) in self.task.elsewhere for p in changed):
            return None
        fold.touched = [one for one in self.task.layers if any(one.weight is w for w in changed)]
        return fold if fold.layers else None

    def source(self, producer: Producer, columns: int) -> Tensor | None:
        """The channel that each of `columns` inputs of some weight comes from; None where that cannot be told."""
        candidates = {name for name, weight in self.weights.items() if weight.shape[-1] == columns and weight.ndim == 2}
        numbers = torch.arange(producer.channels, device=producer.parameters[0].device)
        found = {name: torch.zeros(columns, dtype=torch.int64, device=numbers.device) for name in candidates}
        for bit in range((producer.channels - 1).bit_length()):
            with unchanged(producer.parameters):
                producer.multiply(1.0 + ((numbers >> bit) & 1))
                now, _ = self.run(self.batch)
            for name in list(found):
                old, new = self.inputs.get(name, {}).get(0, []), now.get(name, {}).get(0, [])
                if len(old) != 1 or len(new) != 1 or old[0].shape != new[0].shape:
                    del found[name]
                    continue
                twice = _close(new[0], 2 * old[0], self.tolerance(producer))
                once = _close(new[0], old[0], self.tolerance(producer))
                if not bool((twice ^ once).all()):
                    del found[name]
                else:
                    found[name] += twice.to(torch.int64) << bit
        moved = [index for index in found.values() if bool((index != 0).any()) and int(index.max()) < producer.channels]
        return moved[0] if moved else None


def _norms(block: nn.Module) -> Iterator[Producer]:
    for name, module in block.named_modules():
        weight = module._parameters.get("weight")
        if "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1:
            bias = module._parameters.get("bias")
            own = [weight] if bias is None else [weight, bias]
            yield Producer(name, own, slice(None), len(weight))
            if bias is None:
                yield Producer(name, own, slice(None), len(weight), plus_one=True)


def _weights(block: nn.Module) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """Linear layers and fused experts, with their biases."""
    for name, module in block.named_modules():
        for key, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3 or (weight.ndim == 2 and key == "weight" and isinstance(module, nn.Linear)):
                bias = module._parameters.get("bias" if weight.ndim == 2 else f"{key}_bias")
                yield f"{name}.{key}".removesuffix(".weight"), [weight] if bias is None else [weight, bias]


@torch.no_grad()
def find_folds(task: Task) -> list[Fold]:
    """All pairs in the block that scale columns of layers that are to be quantized, each layer once."""
    probe = _Probe(task)
    wanted = {layer.weight.shape[-1] for layer in task.layers}
    by_expert = {layer.weight.shape[-1] for layer in task.layers if layer.is_expert}
    folds: list[Fold] = []
    taken: set[int] = set()

    def keep(fold: Fold | None) -> bool:
        if fold is None or any(id(layer) in taken for layer in fold.layers):
            return False
        folds.append(fold)
        taken.update(id(layer) for layer in fold.layers)
        return True

    settled = set()
    for producer in _norms(task.block):
        if (
            producer.channels in wanted
            and producer.name not in settled
            and keep(probe.consumers(producer, None, False))
        ):
            settled.add(producer.name)
    for name, parameters in _weights(task.block):
        experts = parameters[0].ndim == 3
        rows, columns = parameters[0].shape[-2], by_expert if experts else wanted
        halves = [slice(0, rows)] if rows in columns else []
        if rows % 2 == 0 and rows // 2 in columns:
            halves += [slice(rows // 2, rows), slice(0, rows // 2)]
        for part in halves:
            if keep(probe.consumers(Producer(name, parameters, part, part.stop - part.start), None, experts)):
                break
        else:
            if not experts:
                repeated = sorted(k for k in wanted if k > rows and k % rows == 0)
                for k in repeated:
                    producer = Producer(name, parameters, slice(0, rows), rows)
                    source = probe.source(producer, k)
                    if source is not None and keep(probe.consumers(producer, source, False)):
                        break
    return folds
