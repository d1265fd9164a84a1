"""Importance matrix: the scale search weighs the error of a column by the mean square of what it multiplies.

    importance_k = mean x_k^2,      a group takes the scale with the smallest sum_k importance_k (w_k - q_k)^2

which is the error of the outputs where inputs are uncorrelated; llama.cpp calls the table `imatrix`. They seldom are,
so the block is asked: where its outputs are not closer to the dense ones with importance than without, it goes without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tritonq.calibrate.guard import all_values, quantized_loss
from tritonq.calibrate.statistics import FEW_TOKENS, Columns, Observer, collect, shared_inputs
from tritonq.calibrate.task import Layer, Task
from tritonq.nn.schemes import Scheme


def importance_of(layer: Layer, means: Tensor) -> Tensor:
    """Means [E, K] as `Layer.importance` has them: [K] of a linear layer."""
    return means.clone() if layer.is_expert else means.reshape(-1).clone()


@dataclass(frozen=True)
class Imatrix:
    """Sets the `importance` of layers, of each fused expert its own; for schemes that search scales.

    Attributes:
        guard: only where the loss of the block gets smaller.
    """

    name: ClassVar[str] = "imatrix"
    guard: bool = True

    def check(self, scheme: Scheme, search: str | bool) -> None:
        """ValueError where no scale is searched for."""
        if not search:
            raise ValueError(
                "imatrix weighs the errors of a scale search, and this scheme takes scales by the rule of its format; "
                "pass search='mse', or another method"
            )

    @torch.no_grad()
    def run(self, task: Task) -> None:
        layers = [layer for layer in task.layers if not layer.fmt.super_group]
        for layer in set(task.layers) - set(layers):
            layer.notes["imatrix"] = f"{layer.fmt.name} has no scale search"
        if not layers or not task.samples:
            return
        before = [layer.importance for layer in layers]
        plain = quantized_loss(task, all_values(task)) if self.guard else float("inf")
        sets = shared_inputs(task, layers)
        seen = {members[0]: Columns(members[0]) for members in sets}
        observers: dict[Layer, Observer] = dict(seen)
        tokens = collect(task, observers)
        for members in sets:
            columns, total = seen[members[0]], tokens[members[0]]
            mean = columns.mean(columns.square)
            few = [e for e, count in enumerate(columns.count) if count <= FEW_TOKENS * total]
            few = sorted({*few, *(~mean.isfinite().all(-1)).nonzero().flatten().tolist()})
            mean[few] = 1.0  # rounded by the error of the weight alone
            for layer in members:
                if not layer.is_expert and few:
                    layer.notes["fallback"] = "saw no finite input"
                    continue
                if layer.is_expert:
                    layer.notes["tokens"] = dict(enumerate(columns.count))
                    if few:
                        layer.notes["fallback"] = few
                layer.importance = importance_of(layer, mean)
        if self.guard:
            self._keep_if_better(task, layers, before, plain)

    def _keep_if_better(self, task: Task, layers: list[Layer], before: list[Tensor | None], plain: float) -> None:
        weighted = quantized_loss(task, all_values(task))
        kept = weighted <= plain
        if not kept:
            for layer, importance in zip(layers, before, strict=True):
                layer.importance = importance
                layer.notes["imatrix"] = "the outputs of the block are better without"
        task.events("imatrix", block=task.name, kept=kept, loss_unweighted=plain, loss_weighted=weighted)
