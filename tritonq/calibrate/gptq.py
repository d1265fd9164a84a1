"""GPTQ: columns are rounded one after the other, and those that follow make up for the error (Frantar et al. 2022).

For a weight W [N, K] and H = sum x x^T over the inputs of calibration, the error of the outputs is
tr((W - Q) H (W - Q)^T). With H^-1 = U^T U, U upper triangular, columns i = 0, 1, ... give

    q_i = round(w_i),   e_i = (w_i - q_i) / U_ii,   w_j -= e_i U_ij  for j > i

and the error is sum e_i^2. Columns go through in chunks of 128: within one as above, then one matrix product for all
that follow. In act-order the columns with the largest H_ii come first.

Rounding is that of the format under given scales, whatever they are: groups of any size, channels, tensors, blocks of
rows and columns, zero points, two levels, super-groups. Scales are fixed before the first column (`static_groups`), by
the format's rule or the search for the smallest error weighted by H_ii; or, for groups within a row, when their first
column comes, from the weights as they are by then. Files keep their layout either way.

U comes from one Cholesky decomposition: of H with rows and columns reversed, J H J = L L^T, so U = J L^-1 J.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tritonq import ops
from tritonq.calibrate.grid import Grid, choose, divisors, encode
from tritonq.calibrate.statistics import FEW_TOKENS, Hessian, collect, experts_of, shared_inputs
from tritonq.calibrate.task import Layer, Task
from tritonq.reference import Parts

DAMPINGS = 5  # how often damping is multiplied by ten before a matrix counts as hopeless


# --------------------------------------------------------------------------------------------------------- one weight


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """(U [K, K], the damping that it took) with (H + damping * mean(H_ii) I)^-1 = U^T U; H is overwritten.

    U is the identity, and the damping infinite, where ten thousand times as much still leaves H indefinite.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0  # an input that was always 0: its row is 0, too, and its weight is rounded to nearest
    diagonal.masked_fill_(dead, 1.0)
    mean = diagonal[~dead].mean() if bool((~dead).any()) else diagonal.new_ones(())
    added = 0.0
    for attempt in range(DAMPINGS):
        wanted = damping * 10.0**attempt
        diagonal.add_((wanted - added) * mean)
        added = wanted
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not int(failed) and bool(lower.diagonal().isfinite().all()):
            eye = torch.eye(hessian.shape[0], device=hessian.device, dtype=hessian.dtype)
            return torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1), wanted
    return torch.eye(hessian.shape[0], device=hessian.device, dtype=hessian.dtype), math.inf


@torch.no_grad()
def propagate(
    weight: Tensor,
    upper: Tensor,
    grid: Grid,
    order: Tensor | None = None,
    *,
    chunk: int = 128,
    enter: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Round `weight` column by column, in place.

    Args:
        weight: fp32 [B, N, K]: becomes what its codes stand for.
        upper: U [B, K, K], of columns in the order in which they are rounded.
        order: that order, [B, K]; None for 0, 1, ...
        enter: called before the first column of a group is rounded, with its columns as they are by then [B, N, g] and
            their numbers [B, g]: may change the grid. The order then has to keep the columns of a group together.

    Returns:
        sum e_i^2 of each of the B, fp32 [B].
    """
    batch, rows, columns = weight.shape
    size = grid.fmt.group[1] if grid.fmt.group[1] > 0 else columns
    if enter is not None:  # chunks are whole groups
        chunk = max(1, chunk // size) * size
    numbers = torch.arange(columns, device=weight.device).expand(batch, columns) if order is None else order
    index = None if order is None else order.unsqueeze(1).expand(batch, rows, columns)
    work = weight if index is None else weight.gather(2, index)
    lost = torch.zeros(batch, dtype=torch.float32, device=weight.device)
    for start in range(0, columns, max(1, chunk)):
        end = min(start + max(1, chunk), columns)
        block = work[:, :, start:end].permute(2, 0, 1).contiguous()  # [c, B, N]
        own = grid.at(numbers[:, start:end])
        factors = upper[:, start:end, start:end].permute(1, 2, 0).contiguous()  # [c, c, B]
        errors = torch.empty_like(block)
        for i in range(end - start):
            if enter is not None and i % size == 0:
                enter(block[i : i + size].permute(1, 2, 0), numbers[:, start + i : start + min(i + size, end - start)])
                own = grid.at(numbers[:, start:end])
            rounded = own.round(block[i], i)
            torch.div(block[i] - rounded, factors[i, i].unsqueeze(-1), out=errors[i])
            block[i] = rounded
            block[i + 1 :].addcmul_(factors[i, i + 1 :].unsqueeze(-1), errors[i], value=-1)
        work[:, :, start:end] = block.permute(1, 2, 0)
        lost += errors.square().sum((0, 2))
        if end < columns:
            work[:, :, end:].baddbmm_(errors.permute(1, 2, 0), upper[:, start:end, end:], alpha=-1)
    if index is not None:
        weight.scatter_(2, index, work)
    return lost


# ------------------------------------------------------------------------------------------------------------- method


@dataclass
class _Unit:
    """Linear layers with the same inputs and format, or some experts of a layer: solved together."""

    layers: list[Layer]
    experts: range

    @property
    def nbytes(self) -> int:
        return 4 * len(self.experts) * self.layers[0].weight.shape[-1] ** 2

    def halves(self) -> list[_Unit]:
        """Two smaller ones; none of one expert or layer."""
        middle = len(self.experts) // 2
        if middle:
            return [_Unit(self.layers, self.experts[:middle]), _Unit(self.layers, self.experts[middle:])]
        middle = len(self.layers) // 2
        return [_Unit(part, self.experts) for part in (self.layers[:middle], self.layers[middle:])] if middle else []


@dataclass(frozen=True)
class GPTQ:
    """Sets the `result` of every layer that has seen inputs.

    Attributes:
        act_order: round columns with large inputs first.
        static_groups: fix all scales first; None: with act_order. False takes the scales of a group within a row from
            the weights as they are when its first column comes; act_order then ranks whole groups, and columns in each.
            Scales of blocks of rows, super-groups, channels and tensors are always there before.
        weighted: weigh the scale search by H_ii.
        damping: what is added to H_ii, in units of their mean.
        chunk: columns between two matrix products.
        budget: bytes of Hessians held at a time; the block runs several times where all take more. None: a third of
            what is free on a GPU, 4 GiB elsewhere.
    """

    name: ClassVar[str] = "gptq"
    act_order: bool = True
    static_groups: bool | None = None
    weighted: bool = True
    damping: float = 0.01
    chunk: int = 128
    budget: int | None = None

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"damping is a number > 0, got {self.damping}; 0.01 is usual")

    def run(self, task: Task) -> None:
        shared = divisors(task.layers)
        waiting = self._units(task)
        budget = self._budget(task.device)
        while waiting:
            held = [waiting.pop(0)]
            observers = {held[0].layers[0]: Hessian(held[0].layers[0], held[0].experts)}
            while waiting and waiting[0].layers[0] not in observers:
                if sum(unit.nbytes for unit in held) + waiting[0].nbytes > budget:
                    break
                held.append(waiting.pop(0))
                observers[held[-1].layers[0]] = Hessian(held[-1].layers[0], held[-1].experts)
            tokens = collect(task, observers)
            for unit in held:
                hessian = observers.pop(unit.layers[0])
                self._solve(task, unit, hessian, tokens[unit.layers[0]], shared)

    def _budget(self, device: torch.device) -> int:
        if self.budget is not None:
            return self.budget
        return torch.cuda.mem_get_info(device)[0] // 3 if device.type == "cuda" else 4 << 30

    def _units(self, task: Task) -> list[_Unit]:
        units = []
        for members in shared_inputs(task, [layer for layer in task.layers if not layer.is_expert]):
            for fmt in dict.fromkeys(layer.fmt for layer in members):
                units.append(_Unit([layer for layer in members if layer.fmt == fmt], range(1)))
        for layer in task.layers:
            if layer.is_expert:
                each = 4 * layer.weight.shape[-1] ** 2
                step = max(1, self._budget(task.device) // each)
                count = experts_of(layer)
                units += [_Unit([layer], range(e, min(e + step, count))) for e in range(0, count, step)]
        return units

    def _solve(self, task: Task, unit: _Unit, hessian: Hessian, tokens: int, shared: dict[Layer, Tensor]) -> None:
        """Normalize the Hessians of a unit and round its weights, as many at a time as memory takes."""
        first, h = unit.layers[0], hessian.sum
        few = []
        for e, one, count in zip(unit.experts, h, hessian.count, strict=True):
            if count <= FEW_TOKENS * tokens or not bool(one.isfinite().all()):
                few.append(e)
                one.copy_(torch.eye(one.shape[0], device=one.device))  # which leaves rounding to nearest
            else:
                one /= count
        for layer in unit.layers:
            if first.is_expert:
                layer.notes.setdefault("tokens", {}).update(zip(unit.experts, hessian.count, strict=True))
                if few:
                    layer.notes.setdefault("fallback", []).extend(few)
            else:
                layer.notes["tokens"] = tokens
                if few:
                    layer.notes["fallback"] = "saw no finite input"
        if few and not first.is_expert:
            return
        waiting = [unit]
        while waiting:
            part, failure = waiting.pop(0), None
            offset = part.experts.start - unit.experts.start
            try:
                self._round(task, part, h[offset : offset + len(part.experts)], shared)
            except torch.OutOfMemoryError as error:
                failure = str(error)
            if failure is None:
                continue
            halves = part.halves()
            if not halves:
                size = 4 * first.weight.shape[-2] * first.weight.shape[-1]
                raise torch.OutOfMemoryError(
                    f"{first.name}: GPTQ keeps about three copies of the weight in fp32, of {size >> 20} MiB each, and "
                    f"its Hessian: {failure}; pass a smaller budget, or keep less on {first.weight.device}"
                )
            task.events(
                "out of memory", block=task.name, where="gptq", layer=first.name, reason=failure,
                reaction=f"{len(halves[0].experts)} experts and {len(halves[0].layers)} layers at a time",
            )  # fmt: skip
            waiting = [*halves, *waiting]

    def _round(self, task: Task, unit: _Unit, h: Tensor, shared: dict[Layer, Tensor]) -> None:
        """Round the weights of a unit under Hessians [experts, K, K]."""
        first, fmt = unit.layers[0], unit.layers[0].fmt
        diagonal = h.diagonal(dim1=1, dim2=2).clone()
        importance = diagonal if self.weighted else None
        order = torch.argsort(diagonal, dim=1, descending=True, stable=True) if self.act_order else None
        static = self.act_order if self.static_groups is None else self.static_groups
        dynamic = not static and fmt.group[0] == 1 and fmt.group[1] > 0 and not fmt.super_group
        if dynamic and order is not None:
            order = _together(order, diagonal, fmt.group[1])
        chosen = [self._scales(task, layer, unit, importance, shared.get(layer)) for layer in unit.layers]
        own = slice(unit.experts.start, unit.experts.stop)
        upper = torch.empty_like(h)
        dampings = {}
        for i, (e, one) in enumerate(zip(unit.experts, h, strict=True)):
            one = one.clone() if order is None else one[order[i].unsqueeze(1), order[i]]
            upper[i], damping = inverse_factor(one, self.damping)
            if damping != self.damping:
                dampings[e] = damping
        weights = [(w.weight.detach()[own] if w.is_expert else w.weight.detach()[None]).float() for w in unit.layers]
        grid = Grid.cat([Grid.of(p, fmt, (len(w), *w.shape[1:])) for p, w in zip(chosen, weights, strict=True)])
        heights = [w.shape[1] for w in weights]
        work = torch.cat(weights, 1)
        del weights

        def enter(values: Tensor, numbers: Tensor) -> None:
            weigh = None if importance is None else importance.gather(1, numbers)
            at = 0
            group = numbers[:, :1] // fmt.group[1]
            for parts, piece in zip(chosen, values.split(heights, 1), strict=True):
                piece = piece.contiguous() if first.is_expert else piece[0].contiguous()
                found = choose(piece, fmt, task.search, weigh, parts.get("tensor_scale"))
                fresh = Grid.of({**parts, **found}, fmt, (len(values), piece.shape[-2], 1))
                for name in {"scale", "zero_point"} & parts.keys():
                    _put(parts[name].view(len(values), -1, parts[name].shape[-1]), group, found[name])
                rows = slice(at, at := at + piece.shape[-2])
                _put(grid.factor[:, rows], group, fresh.factor)
                if grid.zero is not None and fresh.zero is not None:
                    _put(grid.zero[:, rows], group, fresh.zero)

        lost = propagate(work, upper, grid, order, chunk=self.chunk, enter=enter if dynamic else None)
        values = [piece if first.is_expert else piece[0] for piece in work.split(heights, 1)]
        made = [encode(v.contiguous(), parts, fmt) for v, parts in zip(values, chosen, strict=True)]
        for layer, parts in zip(unit.layers, made, strict=True):
            _keep(layer, parts, unit.experts)
            layer.notes["gptq"] = layer.notes.get("gptq", 0.0) + float(lost.sum()) / sum(heights)
            if dampings:
                layer.notes.setdefault("damping", {}).update(dampings)

    def _scales(
        self, task: Task, layer: Layer, unit: _Unit, importance: Tensor | None, divisor: Tensor | None
    ) -> Parts:
        """Scales of the layer, of the experts of the unit; those that all experts share come from all of them."""
        weight = layer.weight.detach()
        if layer.is_expert and layer.fmt.group[0] == -1 and len(unit.experts) < len(weight):
            return choose(weight, layer.fmt, task.search, None, divisor)
        own = weight[unit.experts.start : unit.experts.stop] if layer.is_expert else weight
        return choose(own, layer.fmt, task.search, importance, divisor)


def _keep(layer: Layer, parts: Parts, experts: range) -> None:
    """The result of some experts of a layer, or of all of it."""
    if len(experts) == experts_of(layer):
        layer.result = parts
        return
    shape = tuple(layer.weight.shape)
    if layer.result is None:
        layer.result = ops.allocate(layer.fmt, shape, layer.weight.device)
    for name, part in parts.items():
        by_expert = len(layer.fmt.storage(shape)[name][0]) == 3
        (layer.result[name][experts.start : experts.stop] if by_expert else layer.result[name]).copy_(part)


def _put(whole: Tensor, group: Tensor, part: Tensor) -> None:
    """whole[b, :, group[b]] = part[b], of any dtype."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[whole.dtype.itemsize]
    index = group.view(-1, 1, 1).expand(-1, whole.shape[1], 1)
    whole.view(integers).scatter_(2, index, part.view(integers).reshape(index.shape))


def _together(order: Tensor, diagonal: Tensor, size: int) -> Tensor:
    """Columns in act-order [B, K], but those of a group of `size` one after the other: groups come in the order of
    their largest H_ii, one that is not full last."""
    full = diagonal.shape[1] // size * size
    largest = diagonal[:, :full].unflatten(1, (-1, size)).amax(2)
    rank = torch.argsort(torch.argsort(largest, dim=1, descending=True, stable=True), dim=1)
    rank = torch.nn.functional.pad(rank.repeat_interleave(size, 1), (0, diagonal.shape[1] - full), value=full)
    return order.gather(1, torch.argsort(rank.gather(1, order), dim=1, stable=True))
