"""Bias correction: the mean error of a layer's outputs goes into its bias (Nagel et al. 2019).

    b += mean(W x - Q x')        over all inputs x of calibration; x' as the quantized layer sees them

Layers without a bias are left alone. Run it last: a layer that nobody decided about is rounded to nearest here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tritonq import ops
from tritonq.calibrate.grid import choose, divisors
from tritonq.calibrate.statistics import Observer, collect, rounded
from tritonq.calibrate.task import Layer, Task


class _Means:
    """Sums of x and of x as it is quantized, fp32 [K]."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.sums = torch.zeros(2, layer.weight.shape[-1], dtype=torch.float32, device=layer.weight.device)
        self.count = 0

    def add(self, rows: Tensor, expert: int) -> None:
        found = torch.stack([rows.float().sum(0), rounded(rows, self.layer).float().sum(0)])
        self.sums += found
        self.count += rows.shape[0]


@dataclass(frozen=True)
class BiasCorrection:
    """Changes the bias of linear layers that have one, in place; their weights are decided then."""

    name: ClassVar[str] = "bias"

    @torch.no_grad()
    def run(self, task: Task) -> None:
        layers = [one for one in task.layers if isinstance(one.module, nn.Linear) and one.module.bias is not None]
        observers: dict[Layer, Observer] = {layer: _Means(layer) for layer in layers}
        collect(task, observers)
        shared = divisors(task.layers)
        for layer in layers:
            means = observers[layer]
            assert isinstance(means, _Means)
            weight = layer.weight.detach()
            if layer.result is None:
                parts = choose(weight, layer.fmt, task.search, layer.importance, shared.get(layer))
                if layer.fmt.super_group:
                    parts = {}  # a rule that takes none
                layer.result = ops.quantize(weight, layer.fmt, **parts)  # type: ignore[arg-type]
            if not means.count or not bool(means.sums.isfinite().all()):
                layer.notes["bias"] = "saw no finite input"
                continue
            dense, quantized = means.sums / means.count
            q = ops.dequantize(layer.result, layer.fmt, tuple(weight.shape), torch.float32)
            error = weight.float() @ dense - q @ quantized
            layer.module.bias += error.to(layer.module.bias.dtype)
            layer.notes["bias"] = float(error.square().mean().sqrt())
