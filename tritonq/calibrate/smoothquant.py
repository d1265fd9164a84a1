"""SmoothQuant: outliers of inputs move into the weight, where they cost less (Xiao et al. 2022).

    s_j = max|x_j|^a / max|w_j|^(1 - a);      W x = (W * s) (x / s)

over all inputs of calibration and the rows of all layers with these inputs. 1 / s goes where `fold` says it costs
nothing. Only of use where inputs are quantized. The formula knows the extremes alone, not what rounding does
to the rest, so the block is asked pair by pair: where its outputs, weights and inputs quantized, are not closer to the
dense ones with a pair scaled, the pair is undone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tritonq.calibrate.fold import Fold, find_folds
from tritonq.calibrate.guard import all_values, quantized_loss
from tritonq.calibrate.statistics import Columns, Observer, collect, shared_inputs
from tritonq.calibrate.task import Layer, Task
from tritonq.nn.schemes import Scheme


@dataclass(frozen=True)
class SmoothQuant:
    """Scales columns of weights whose inputs are quantized, and what feeds them, in place.

    Attributes:
        strength: a, from 0 (weights get an even range) to 1 (inputs do).
        guard: keep what lowers the loss of the block only.
    """

    name: ClassVar[str] = "smoothquant"
    strength: float = 0.5
    guard: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength is a number from 0 to 1, got {self.strength}; 0.5 is usual")

    def check(self, scheme: Scheme, search: str | bool) -> None:
        """ValueError for schemes that leave inputs alone."""
        if scheme.input_format is None:
            raise ValueError(
                "smoothquant moves outliers of inputs into weights, and this scheme leaves inputs alone; take one that "
                "quantizes inputs, such as W8A8, or awq"
            )

    @torch.no_grad()
    def run(self, task: Task) -> None:
        folds = [fold for fold in find_folds(task) if any(layer.input_format for layer in fold.layers)]
        seen: dict[Layer, Columns] = {}
        observers: dict[Layer, Observer] = {}
        for members in shared_inputs(task, [layer for fold in folds for layer in fold.layers]):
            observers[members[0]] = observer = Columns(members[0])
            seen.update(dict.fromkeys(members, observer))
        collect(task, observers)
        kept, undone = [], []
        weights = all_values(task) if self.guard and folds else {}
        loss = first = quantized_loss(task, weights) if weights else float("inf")
        for fold in folds:
            note: dict[str, Any] = {"producer": fold.producer.name}
            parameters = [*fold.producer.parameters, *fold.weights.values()]
            before = [p.detach().clone() for p in parameters]
            decided = [(layer, layer.result, layer.importance) for layer in fold.touched]
            fold.apply(self.scales(fold, seen))
            if self.guard:
                weights = all_values(task)
                now = quantized_loss(task, weights)
                if now < loss:
                    loss = now
                    kept.append(fold.producer.name)
                else:
                    for parameter, old in zip(parameters, before, strict=True):
                        parameter.detach().copy_(old)
                    for layer, result, importance in decided:
                        layer.result, layer.importance = result, importance
                    undone.append(fold.producer.name)
                    note["undone"] = "the outputs of the block are better without"
            for layer in fold.layers:
                layer.notes["smoothquant"] = note
        if self.guard and folds:
            task.events(
                "smoothquant", block=task.name, loss_unscaled=first, loss_scaled=loss, pairs=kept, undone=undone
            )

    def scales(self, fold: Fold, seen: dict[Layer, Columns]) -> Tensor:
        """s of channels, [channels] or [E, channels]; 1 where the inputs or the weights are all 0."""
        each = [(seen[layer].largest, layer.weight.detach().float().abs().amax(-2)) for layer in fold.layers]
        pairs = [(x, w if w.ndim == 2 else w.unsqueeze(0)) for x, w in each]
        if not fold.by_expert:
            pairs = [(x.amax(0, keepdim=True), w.amax(0, keepdim=True)) for x, w in pairs]
        x, w = (fold.channels(torch.stack(found).amax(0), "amax") for found in zip(*pairs, strict=True))
        s = x.pow(self.strength) / w.pow(1 - self.strength)
        s = torch.where((x > 0) & (w > 0), s, 1.0)
        return s if fold.by_expert else s[0]
