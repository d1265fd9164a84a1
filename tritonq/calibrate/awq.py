"""AWQ: columns that large inputs multiply are scaled up before rounding, and those inputs down (Lin et al. 2023).

    s = mean|x|^r, divided by sqrt(max s * min s);      W x = (W * s) (x / s)

r in {0, 1/20, .., 1} is taken so that sum over the consumers of tr(E H E^T), E = W - round(W * s) / s, is smallest: the
squared error of their outputs over all samples, H = sum x x^T. Of fused experts, only the diagonal of H counts; where
they are a consumer of the norm before them they share s, and between their own two projections each has its own.
Rounding is that of the scheme, scale search included, and 1 / s goes where `fold` says it costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tritonq import ops
from tritonq.calibrate.fold import Fold, find_folds, scale_columns
from tritonq.calibrate.grid import choose, divisors
from tritonq.calibrate.imatrix import importance_of
from tritonq.calibrate.statistics import Columns, Hessian, Observer, collect, shared_inputs
from tritonq.calibrate.task import Layer, Task

Seen = dict[Layer, Hessian | Columns]


def squares(observer: Hessian | Columns) -> Tensor:
    """Mean x^2 by column, fp32 [E, K]; of experts without tokens those of all."""
    sums = observer.sum.diagonal(dim1=1, dim2=2) if isinstance(observer, Hessian) else observer.square
    return _means(sums, observer)


def magnitudes(observer: Hessian | Columns) -> Tensor:
    """Mean |x| by column, fp32 [E, K]; of experts without tokens those of all."""
    return _means(observer.absolute, observer)


def _means(sums: Tensor, observer: Hessian | Columns) -> Tensor:
    count = torch.tensor(observer.count, dtype=torch.float32, device=sums.device).unsqueeze(-1)
    overall = sums.sum(0) / count.sum().clamp(min=1)
    return torch.where(count > 0, sums / count.clamp(min=1), overall)


@dataclass(frozen=True)
class AWQ:
    """Scales columns of weights, and what feeds them, in place.

    Attributes:
        steps: ratios tried besides 0, which changes nothing.
        clip: also search scales by the error weighted by mean x^2 where the scheme searches (the clipping of AWQ).
    """

    name: ClassVar[str] = "awq"
    steps: int = 20
    clip: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is a number of ratios >= 1, got {self.steps}; 20 is usual")

    @torch.no_grad()
    def run(self, task: Task) -> None:
        folds = find_folds(task)
        seen: Seen = {}
        observers: dict[Layer, Observer] = {}
        for members in shared_inputs(task, task.layers):
            first = members[0]
            observer = Columns(first) if first.is_expert else Hessian(first)
            observers[first] = observer
            seen.update(dict.fromkeys(members, observer))
        collect(task, observers)
        for fold in folds:
            self._scale(task, fold, seen)
        if self.clip and task.search:
            for layer in task.layers:
                if not layer.fmt.super_group:
                    layer.importance = importance_of(layer, squares(seen[layer]))
        folded = {layer for fold in folds for layer in fold.layers}
        for layer in task.layers:
            if layer not in folded:
                layer.notes["awq"] = "nothing before it can be scaled"

    def _scale(self, task: Task, fold: Fold, seen: Seen) -> None:
        """Choose a fold's scales and apply them; statistics follow."""
        x = self._inputs(fold, seen)
        best = torch.ones_like(x)
        errors = self._errors(task, fold, seen, best)
        smallest, ratio = errors, torch.zeros_like(errors)
        for step in range(1, self.steps + 1):
            r = step / self.steps
            s = x.clamp(min=1e-4 * float(x.amax()) or 1.0).pow(r)
            s = s / (s.amax(-1, keepdim=True) * s.amin(-1, keepdim=True)).sqrt()
            errors = self._errors(task, fold, seen, s)
            better = errors < smallest
            best = torch.where(better.unsqueeze(-1), s, best)
            smallest, ratio = torch.where(better, errors, smallest), ratio.masked_fill(better, r)
        fold.apply(best)
        columns = fold.columns(best)
        for layer in fold.layers:
            layer.notes["awq"] = {"producer": fold.producer.name, "ratio": ratio.tolist()}
        for observer in {id(seen[layer]): seen[layer] for layer in fold.layers}.values():
            _follow(observer, columns)

    def _inputs(self, fold: Fold, seen: Seen) -> Tensor:
        """Mean |x| by channel, [channels] or [E, channels]."""
        found = [magnitudes(seen[layer]) for layer in fold.layers]
        if fold.by_expert:
            return fold.channels(found[0])
        counts = [float(sum(seen[layer].count)) for layer in fold.layers]
        pooled = [seen[layer].absolute.sum(0) / max(1.0, n) for layer, n in zip(fold.layers, counts, strict=True)]
        return fold.channels(torch.stack(pooled).mean(0))

    def _errors(self, task: Task, fold: Fold, seen: Seen, s: Tensor) -> Tensor:
        """Errors of the consumers' outputs, [] or [E]."""
        columns = fold.columns(s)
        with_s = {layer: _scaled(layer, columns) for layer in fold.layers}
        shared = divisors(fold.layers, with_s)
        total = columns.new_zeros(s.shape[:-1])
        for layer, weight in with_s.items():
            spread = columns if columns.ndim == 1 else columns.unsqueeze(-2)
            importance = squares(seen[layer]) / columns.square() if self.clip else None
            parts = choose(weight, layer.fmt, task.search, importance, shared.get(layer))
            if layer.fmt.super_group:  # their scales are the rule's, and are not taken as given
                q = ops.qdq(weight, layer.fmt)
            else:
                q = ops.qdq(weight, layer.fmt, **parts)  # type: ignore[arg-type]
            e = layer.weight.detach().float() - q / spread
            total = total + _error(e, seen[layer], by_expert=s.ndim == 2)
        return total


def _error(e: Tensor, observer: Hessian | Columns, by_expert: bool) -> Tensor:
    """sum e H e^T of the rows of [N, K], or of [E, N, K] with the diagonal of H."""
    if isinstance(observer, Hessian):
        return ((e @ observer.sum[0]) * e).sum()
    found = (e.square() * observer.square.unsqueeze(-2)).sum((-2, -1))
    return found if by_expert else found.sum()


def _scaled(layer: Layer, columns: Tensor) -> Tensor:
    weight = layer.weight.detach().clone()
    scale_columns(weight, columns)
    return weight.float()


def _follow(observer: Hessian | Columns, columns: Tensor) -> None:
    """Statistics of x to those of x / s."""
    observer.absolute /= columns
    if isinstance(observer, Hessian):
        observer.sum /= columns
        observer.sum /= columns.unsqueeze(-1)
    else:
        observer.square /= columns.square()
