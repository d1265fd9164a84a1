"""Importance matrix: the scale search weighs the error of a column by the mean square of what it multiplies.

    importance_k = mean x_k^2,      a group takes the scale with the smallest sum_k importance_k (w_k - q_k)^2

which is the error of the outputs where inputs are uncorrelated; llama.cpp calls the table `imatrix`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tritonq.calibrate.statistics import FEW_TOKENS, Columns, Observer, collect, shared_inputs
from tritonq.calibrate.task import Layer, Task
from tritonq.nn.schemes import Scheme


def importance_of(layer: Layer, means: Tensor) -> Tensor:
    """Means [E, K] as `Layer.importance` has them: [K] of a linear layer."""
    return means.clone() if layer.is_expert else means.reshape(-1).clone()


@dataclass(frozen=True)
class Imatrix:
    """Sets the `importance` of layers, of each fused expert its own; for schemes that search scales."""

    name: ClassVar[str] = "imatrix"

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
        sets = shared_inputs(task, layers)
        seen = {members[0]: Columns(members[0]) for members in sets}
        observers: dict[Layer, Observer] = dict(seen)
        tokens = collect(task, observers)
        for members in sets:
            columns, total = seen[members[0]], tokens[members[0]]
            mean = columns.mean(columns.square)
            few = [e for e, count in enumerate(columns.count) if count <= FEW_TOKENS * total]
            mean[few] = 1.0  # rounded by the error of the weight alone
            for layer in members:
                if not layer.is_expert and few:
                    layer.notes["fallback"] = "saw no input"
                    continue
                if layer.is_expert:
                    layer.notes["tokens"] = dict(enumerate(columns.count))
                    if few:
                        layer.notes["fallback"] = few
                layer.importance = importance_of(layer, mean)
