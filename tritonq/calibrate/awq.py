"""AWQ: columns that large inputs multiply are scaled up before rounding, and those inputs down (Lin et al. 2023).

    s = mean|x|^r, divided by sqrt(max s * min s);      W x = (W * s) (x / s)

r in {0, 1/20, .., 1} is taken so that sum over the consumers of tr(E H E^T), E = W - round(W * s) / s, is smallest: the
squared error of their outputs over all samples, H = sum x x^T, rounded by the format's rule. Of fused experts, only the
diagonal of H counts; where they are a consumer of the norm before them they share s, and between their own two
projections each has its own. 1 / s goes where `fold` says it costs nothing.

Scales of groups are then searched for by the error of the layer's outputs (`clip`). That a layer has less error does
not say that the block has, so the block is asked about every pair: where its outputs, all of it quantized, are not
closer to the dense ones with a pair scaled than without, the pair is undone; and where all that is not better than
plain rounding to nearest, the block gets that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tritonq import ops
from tritonq.calibrate.clip import clipped
from tritonq.calibrate.fold import Fold, find_folds, scale_columns
from tritonq.calibrate.grid import divisors
from tritonq.calibrate.guard import all_values, quantized_loss, values
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
        clip: also search scales by the error of outputs where the scheme searches; results of the layers are set then.
        guard: keep what lowers the loss of the block only.
        rows: of a weight, spread over all, by which ratios are compared, where groups lie within rows.
    """

    name: ClassVar[str] = "awq"
    steps: int = 20
    clip: bool = True
    guard: bool = True
    rows: int = 512

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is a number of ratios >= 1, got {self.steps}; 20 is usual")
        if self.rows < 1:
            raise ValueError(f"rows is a number of rows >= 1, got {self.rows}; 512 is usual")

    @torch.no_grad()
    def run(self, task: Task) -> None:
        if not task.samples:
            return
        seen: Seen = {}
        observers: dict[Layer, Observer] = {}
        for members in shared_inputs(task, task.layers):
            first = members[0]
            observer = Columns(first) if first.is_expert else Hessian(first)
            observers[first] = observer
            seen.update(dict.fromkeys(members, observer))
        collect(task, observers)
        broken = {layer for layer, observer in seen.items() if not bool(squares(observer).isfinite().all())}
        for layer in broken:
            layer.notes["fallback"] = "saw no finite input"
        if broken == set(task.layers):
            return
        folds = [fold for fold in find_folds(task) if not broken.intersection(fold.layers)]
        guard = _Guard(self, task, seen) if self.guard else None
        if guard is not None:
            guard.start()
        for fold in folds:
            best, ratio = self._scales(fold, seen)
            note = {"producer": fold.producer.name, "ratio": ratio.tolist()}
            if not bool((best != 1).any()):
                pass  # as it is
            elif guard is None:
                self._apply(fold, best, seen)
            elif not guard.better(fold, best):
                note = {"producer": fold.producer.name, "ratio": (0 * ratio).tolist()}
            for layer in fold.layers:
                layer.notes["awq"] = note
        if guard is None:
            self.decide(task, task.layers, seen)
        else:
            guard.end()
        folded = {layer for fold in folds for layer in fold.layers}
        for layer in task.layers:
            if layer not in folded:
                layer.notes["awq"] = "nothing before it can be scaled"

    def decide(self, task: Task, layers: Iterable[Layer], seen: Seen) -> None:
        """Set importance and results of layers for the weights they have."""
        if not self.clip or not task.search:
            return
        shared = divisors(task.layers)
        for layer in layers:
            observer = seen[layer]
            if layer.fmt.super_group or not bool(squares(observer).isfinite().all()):
                continue
            layer.importance = importance_of(layer, squares(observer))
            if isinstance(observer, Hessian) and observer.count[0]:
                weight = layer.weight.detach()
                parts = clipped(weight, layer.fmt, observer.sum[0] / observer.count[0], shared.get(layer))
                layer.result = ops.quantize(weight, layer.fmt, **parts)  # type: ignore[arg-type]

    def _apply(self, fold: Fold, s: Tensor, seen: Seen) -> None:
        """Scale; statistics follow."""
        fold.apply(s)
        self._follow(fold, s, seen)

    def _follow(self, fold: Fold, s: Tensor, seen: Seen) -> None:
        columns = fold.columns(s)
        for observer in {id(seen[layer]): seen[layer] for layer in fold.layers}.values():
            _follow(observer, columns)

    def _scales(self, fold: Fold, seen: Seen) -> tuple[Tensor, Tensor]:
        """The best scales, [channels] or [E, channels], and their ratios, [] or [E]."""
        x = self._inputs(fold, seen)
        best = torch.ones_like(x)
        sampled = {layer: self._rows(layer) for layer in fold.layers}
        smallest = self._errors(fold, seen, sampled, best)
        ratio = torch.zeros_like(smallest)
        for step in range(1, self.steps + 1):
            r = step / self.steps
            s = x.clamp(min=1e-4 * float(x.amax()) or 1.0).pow(r)
            s = s / (s.amax(-1, keepdim=True) * s.amin(-1, keepdim=True)).sqrt()
            errors = self._errors(fold, seen, sampled, s)
            better = errors < smallest
            best = torch.where(better.unsqueeze(-1), s, best)
            smallest, ratio = torch.where(better, errors, smallest), ratio.masked_fill(better, r)
        return best, ratio

    def _rows(self, layer: Layer) -> Tensor:
        """Rows of a weight that stand for all of them: errors are sums over rows."""
        weight = layer.weight.detach()
        if layer.fmt.group[0] != 1 or weight.shape[-2] <= self.rows:
            return weight
        numbers = torch.arange(self.rows, device=weight.device) * weight.shape[-2] // self.rows
        return weight.index_select(-2, numbers)

    def _inputs(self, fold: Fold, seen: Seen) -> Tensor:
        """Mean |x| by channel, [channels] or [E, channels]."""
        found = [magnitudes(seen[layer]) for layer in fold.layers]
        if fold.by_expert:
            return fold.channels(found[0])
        counts = [float(sum(seen[layer].count)) for layer in fold.layers]
        pooled = [seen[layer].absolute.sum(0) / max(1.0, n) for layer, n in zip(fold.layers, counts, strict=True)]
        return fold.channels(torch.stack(pooled).mean(0))

    def _errors(self, fold: Fold, seen: Seen, sampled: dict[Layer, Tensor], s: Tensor) -> Tensor:
        """Errors of the consumers' outputs, [] or [E]."""
        columns = fold.columns(s)
        with_s = {layer: _scaled(sampled[layer], columns) for layer in fold.layers}
        shared = divisors(fold.layers, with_s)
        total = columns.new_zeros(s.shape[:-1])
        for layer, weight in with_s.items():
            spread = columns if columns.ndim == 1 else columns.unsqueeze(-2)
            q = ops.qdq(weight, layer.fmt, tensor_scale=shared.get(layer))
            share = layer.weight.shape[-2] / weight.shape[-2]  # of layers that were cut and layers that were not
            e = sampled[layer].float() - q / spread
            total = total + share * _error(e, seen[layer], by_expert=s.ndim == 2)
        return total


class _Guard:
    """Keeps scales that bring the outputs of the quantized block closer to those of the dense one."""

    def __init__(self, method: AWQ, task: Task, seen: Seen) -> None:
        self.method, self.task, self.seen = method, task, seen
        self.kept: list[str] = []
        self.undone: list[str] = []
        self.before: dict[Tensor, Tensor] = {}  # of what was scaled

    def start(self) -> None:
        self.values = all_values(self.task)
        self.nearest = quantized_loss(self.task, self.values)
        decided = [layer.result is not None or layer.importance is not None for layer in self.task.layers]
        self.plain = not any(decided)
        self.method.decide(self.task, self.task.layers, self.seen)
        self.values = all_values(self.task)
        self.first = self.loss = quantized_loss(self.task, self.values)

    def better(self, fold: Fold, s: Tensor) -> bool:
        """Scale a pair; whether that is kept."""
        task = self.task
        sets = {layer.shared for layer in fold.touched if layer.fmt.tensor_scale} - {None}  # whose divisor may change
        touched = [layer for layer in task.layers if layer in fold.touched or layer.shared in sets]
        decided = [(layer, layer.result, layer.importance) for layer in touched]
        parameters = [*fold.producer.parameters, *fold.weights.values()]
        before = [p.detach().clone() for p in parameters]
        self.method._apply(fold, s, self.seen)
        self.method.decide(task, touched, self.seen)
        shared = divisors(task.layers)
        now = self.values | {layer: values(layer, task.search, shared.get(layer)) for layer in touched}
        loss = quantized_loss(task, now)
        if loss < self.loss:
            self.values, self.loss = now, loss
            self.kept.append(fold.producer.name)
            for parameter, old in zip(parameters, before, strict=True):
                self.before.setdefault(parameter, old)
            return True
        for parameter, old in zip(parameters, before, strict=True):
            parameter.detach().copy_(old)
        self.method._follow(fold, 1 / s, self.seen)
        for layer, result, importance in decided:
            layer.result, layer.importance = result, importance
        self.undone.append(fold.producer.name)
        return False

    def end(self) -> None:
        task, took = self.task, "scaled" if self.kept else "unscaled"
        if self.plain and not self.loss < self.nearest:
            for parameter, old in self.before.items():
                parameter.detach().copy_(old)
            for layer in task.layers:
                layer.result = layer.importance = None
                if isinstance(layer.notes.get("awq"), dict):
                    layer.notes["awq"]["ratio"] = 0.0
            took, self.loss = "nearest", self.nearest
            self.undone, self.kept = self.undone + self.kept, []
        task.events(
            "awq", block=task.name, kept=took, loss_nearest=self.nearest, loss_unscaled=self.first,
            loss_scaled=self.loss, pairs=self.kept, undone=self.undone,
        )  # fmt: skip


def _error(e: Tensor, observer: Hessian | Columns, by_expert: bool) -> Tensor:
    """sum e H e^T of the rows of [N, K], or of [E, N, K] with the diagonal of H."""
    if isinstance(observer, Hessian):
        return ((e @ observer.sum[0]) * e).sum()
    found = (e.square() * observer.square.unsqueeze(-2)).sum((-2, -1))
    return found if by_expert else found.sum()


def _scaled(weight: Tensor, columns: Tensor) -> Tensor:
    weight = weight.clone()
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
