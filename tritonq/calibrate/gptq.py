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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tritonq import ops, reference
from tritonq.calibrate.statistics import FEW_TOKENS, Hessian, collect, experts_of, shared_inputs
from tritonq.calibrate.task import Layer, Task
from tritonq.codecs import scale as scales
from tritonq.codecs import super_scale
from tritonq.formats import Format
from tritonq.nn.quantize import smallest_divisor
from tritonq.reference import Parts

DAMPINGS = 5  # how often damping is multiplied by ten before a matrix counts as hopeless


# ------------------------------------------------------------------------------------------------------------- scales


def divisors(layers: Sequence[Layer], weights: Mapping[Layer, Tensor] | None = None) -> dict[Layer, Tensor]:
    """Tensor-wide divisors, fp32 [1], of layers whose format has them; those that share one get the smallest. Of
    `weights` in place of those that the layers have."""
    sets: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.fmt.tensor_scale:
            sets.setdefault(layer.shared if layer.shared is not None else f"{id(layer)}", []).append(layer)
    found = {}
    for members in sets.values():
        own = [layer.weight if weights is None else weights[layer] for layer in members]
        smallest = smallest_divisor(own, members[0].fmt)
        found.update({layer: smallest.to(layer.weight.device) for layer in members})
    return found


@torch.no_grad()
def choose(
    weight: Tensor, fmt: Format, search: str | bool, importance: Tensor | None, divisor: Tensor | None
) -> Parts:  # fmt: skip
    """Parts of a weight [..., K] besides the codes.

    Args:
        search: "mse" or False; formats with super-groups have no search.
        importance: of the columns in the search, [K], or [E, K] for a weight [E, N, K]; where the experts share a scale
            its mean counts.
        divisor: tensor-wide, fp32 [1], of formats that have one.
    """
    if not search or fmt.super_group:
        parts = ops.quantize(weight, fmt, tensor_scale=divisor)
        del parts["qdata"]
        return parts
    if importance is not None and importance.ndim == 2 and (weight.ndim == 2 or fmt.group[0] == -1):
        importance = importance.mean(0)
    if importance is None or importance.ndim == 1:
        return ops.searched_scales(weight, fmt, tensor_scale=divisor, importance=importance)
    each = [
        ops.searched_scales(w, fmt, tensor_scale=divisor, importance=own)
        for w, own in zip(weight, importance, strict=True)
    ]
    return {
        name: part if name == "tensor_scale" else torch.stack([parts[name] for parts in each])
        for name, part in each[0].items()
    }


@dataclass
class Grid:
    """What the codes of a weight [B, N, K] stand for, by column group: [B, N, groups], fp32.

    y = factor * code(x / factor, zero), or with a minimum y = factor * code((x + minimum) / factor) - minimum.
    """

    fmt: Format
    factor: Tensor
    zero: Tensor | None
    minimum: Tensor | None

    @classmethod
    def of(cls, parts: Parts, fmt: Format, shape: tuple[int, int, int]) -> Grid:
        """From the parts of a weight of B * N rows or of B experts."""
        zero, minimum = parts.get("zero_point"), None
        if fmt.super_group:
            factor, minimum = super_scale.load(parts, fmt)
        else:
            factor = scales.load(parts["scale"], fmt, parts.get("tensor_scale"))
        rows = fmt.group[0]

        def spread(part: Tensor | None) -> Tensor | None:
            if part is None:
                return None
            if rows == -1:
                return part.float().view(1, 1, 1).expand(*shape[:2], 1)
            part = part.float().view(shape[0], -1, part.shape[-1])
            return part.repeat_interleave(rows, 1)[:, : shape[1]] if rows > 1 else part

        spread_factor = spread(factor)
        assert spread_factor is not None
        return cls(fmt, spread_factor, spread(zero), spread(minimum))

    @classmethod
    def cat(cls, grids: Sequence[Grid]) -> Grid:
        """The rows of one after those of another."""

        def cat(name: str) -> Tensor | None:
            found = [getattr(grid, name) for grid in grids]
            return None if found[0] is None else torch.cat(found, 1)

        factor = cat("factor")
        assert factor is not None
        return cls(grids[0].fmt, factor, cat("zero"), cat("minimum"))

    def at(self, columns: Tensor) -> Grid:
        """That of columns [B, c], each on the first axis: [c, B, N]."""
        size = self.fmt.group[1]
        groups = (columns // size if size > 0 else torch.zeros_like(columns)).unsqueeze(1)

        def pick(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.gather(2, groups.expand(-1, part.shape[1], -1)).permute(2, 0, 1)

        factor = pick(self.factor)
        assert factor is not None
        return Grid(self.fmt, factor.contiguous(), pick(self.zero), pick(self.minimum))

    def round(self, x: Tensor, i: int) -> Tensor:
        """A column [B, N] to what its codes stand for, under entry i of the first axis."""
        minimum = None if self.minimum is None else self.minimum[i]
        zero = self.fmt.zero_code if self.zero is None else self.zero[i]
        quotient = (x if minimum is None else x + minimum) / self.factor[i]
        y: Tensor = self.fmt.element.codec.round_ref(quotient, zero, self.fmt.element) * self.factor[i]
        return y if minimum is None else y - minimum


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
    lost = torch.zeros(batch, device=weight.device)
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


def encode(values: Tensor, parts: Parts, fmt: Format) -> Parts:
    """All parts of values that lie on the grid of `parts`."""
    if fmt.super_group:
        factor, minimum = super_scale.load(parts, fmt)
        return {"qdata": reference.encode(values.clone(), factor, minimum, None, fmt), **parts}
    return ops.quantize(values, fmt, **parts)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- method


@dataclass
class _Unit:
    """Linear layers with the same inputs and format, or some experts of a layer: solved together."""

    layers: list[Layer]
    experts: range

    @property
    def nbytes(self) -> int:
        return 4 * len(self.experts) * self.layers[0].weight.shape[-1] ** 2


@dataclass(frozen=True)
class GPTQ:
    """Sets the `result` of every layer that has seen inputs.

    Attributes:
        act_order: round columns with large inputs first.
        static_groups: fix all scales first; None: with act_order. False takes the scales of a group within a row from
            the weights as they are when its first column comes; act_order then ranks whole groups, and columns in each.
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
        fmt, first = unit.layers[0].fmt, unit.layers[0]
        few = [e for e, count in zip(unit.experts, hessian.count, strict=True) if count <= FEW_TOKENS * tokens]
        for layer in unit.layers:
            if first.is_expert:
                layer.notes.setdefault("tokens", {}).update(zip(unit.experts, hessian.count, strict=True))
            else:
                layer.notes["tokens"] = tokens
        h = hessian.sum
        for e, (one, count) in enumerate(zip(h, hessian.count, strict=True)):
            if unit.experts[e] in few or not bool(one.isfinite().all()):
                few += [] if unit.experts[e] in few else [unit.experts[e]]
                one.copy_(torch.eye(one.shape[0], device=one.device))
            else:
                one /= count
        if few and not first.is_expert:
            for layer in unit.layers:
                layer.notes["fallback"] = "saw no finite input"
            return
        if few:
            first.notes.setdefault("fallback", []).extend(few)
        diagonal = h.diagonal(dim1=1, dim2=2).clone()
        order = torch.argsort(diagonal, dim=1, descending=True, stable=True) if self.act_order else None
        static = self.act_order if self.static_groups is None else self.static_groups
        dynamic = not static and fmt.group[0] == 1 and fmt.group[1] > 0 and not fmt.super_group
        if dynamic and order is not None:
            order = _together(order, diagonal, fmt.group[1])
        importance = diagonal if self.weighted else None
        chosen = [self._scales(task, layer, unit, importance, shared.get(layer)) for layer in unit.layers]
        upper = []
        for e, one in enumerate(h):
            if order is not None:
                one = one[order[e]][:, order[e]]
            found, damping = inverse_factor(one, self.damping)
            upper.append(found)
            if damping != self.damping:
                for layer in unit.layers:
                    layer.notes.setdefault("damping", {})[unit.experts[e]] = damping
        own = slice(unit.experts.start, unit.experts.stop)
        weights = [(w.weight.detach()[own] if w.is_expert else w.weight.detach()[None]).float() for w in unit.layers]
        grid = Grid.cat([Grid.of(p, fmt, tuple(w.shape)) for p, w in zip(chosen, weights, strict=True)])  # type: ignore[arg-type]
        heights = [w.shape[1] for w in weights]
        work = torch.cat(weights, 1) if len(weights) > 1 else weights[0].clone()
        del weights

        def enter(values: Tensor, numbers: Tensor) -> None:
            weigh = None if importance is None else importance.gather(1, numbers)
            at = 0
            group = numbers[:, :1] // fmt.group[1]
            for parts, piece in zip(chosen, values.split(heights, 1), strict=True):
                piece = piece.contiguous() if first.is_expert else piece[0].contiguous()
                found = choose(piece, fmt, task.search, weigh, parts.get("tensor_scale"))
                fresh = Grid.of({**parts, **found}, fmt, (values.shape[0], piece.shape[-2], 1))
                for name in {"scale", "zero_point"} & parts.keys():
                    _put(parts[name].view(len(values), -1, parts[name].shape[-1]), group, found[name])
                rows = slice(at, at := at + piece.shape[-2])
                _put(grid.factor[:, rows], group, fresh.factor)
                if grid.zero is not None and fresh.zero is not None:
                    _put(grid.zero[:, rows], group, fresh.zero)

        lost = propagate(work, torch.stack(upper), grid, order, chunk=self.chunk, enter=enter if dynamic else None)
        for layer, parts, values in zip(unit.layers, chosen, work.split(heights, 1), strict=True):
            values = values.contiguous()
            made = encode(values if layer.is_expert else values[0], parts, fmt)
            layer.notes["gptq"] = layer.notes.get("gptq", 0.0) + float(lost.sum()) / sum(heights)
            if len(unit.experts) == experts_of(layer):
                layer.result = made
                continue
            if layer.result is None:
                layer.result = ops.allocate(fmt, tuple(layer.weight.shape), layer.weight.device)
            for name, part in made.items():
                shape = fmt.storage(tuple(layer.weight.shape))[name][0]
                (layer.result[name][own] if len(shape) == 3 else layer.result[name]).copy_(part)

    def _scales(
        self, task: Task, layer: Layer, unit: _Unit, importance: Tensor | None, divisor: Tensor | None
    ) -> Parts:
        """Scales of the layer, of the experts of the unit; those that all experts share come from all of them."""
        weight = layer.weight.detach()
        if not layer.is_expert or len(unit.experts) == weight.shape[0]:
            return choose(weight, layer.fmt, task.search, importance, divisor)
        if layer.fmt.group[0] == -1:
            return choose(weight, layer.fmt, task.search, None, divisor)
        own = weight[unit.experts.start : unit.experts.stop]
        return choose(own, layer.fmt, task.search, importance, divisor)


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
