"""Whether a change to a block makes its quantized outputs better: asked of the block itself, before it is kept.

    loss = mean of (block(x; W^) - target)^2 over some samples spread over all,     W^ what the codes stand for

Inputs are rounded where they are at run time. Weights are swapped only while the block runs, so that whatever brings
samples and targets sees the dense block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tritonq import ops
from tritonq.calibrate.grid import choose, divisors
from tritonq.calibrate.pipeline import mean_squared_error
from tritonq.calibrate.statistics import rounded
from tritonq.calibrate.task import Layer, Task

SAMPLES = 8  # that decide, spread over all


def values(layer: Layer, search: str | bool, divisor: Tensor | None) -> Tensor:
    """What a weight stands for once it is quantized, in its dtype: by its result, else rounded to nearest."""
    weight, fmt = layer.weight.detach(), layer.fmt
    if layer.result is not None:
        found: Tensor = ops.dequantize(layer.result, fmt, tuple(weight.shape), weight.dtype)
        return found
    if fmt.super_group or not (search or layer.importance is not None):
        return ops.qdq(weight, fmt, tensor_scale=divisor)
    parts = choose(weight, fmt, search or "mse", layer.importance, divisor)
    return ops.qdq(weight, fmt, **parts)  # type: ignore[arg-type]


def all_values(task: Task) -> dict[Layer, Tensor]:
    """`values` of all layers of a task."""
    shared = divisors(task.layers)
    return {layer: values(layer, task.search, shared.get(layer)) for layer in task.layers}


class _Quantized:
    """Calls a block with other weights, and with inputs rounded; afterwards it is what it was."""

    def __init__(self, block: nn.Module, weights: Mapping[Layer, Tensor]) -> None:
        self.block, self.weights = block, weights

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        dense = {layer: layer.weight.data for layer in self.weights}
        hooks = [
            layer.module.register_forward_pre_hook(_rounding(layer))
            for layer in self.weights
            if layer.input_format is not None and not layer.is_expert
        ]
        try:
            for layer, weight in self.weights.items():
                layer.weight.data = weight
            return self.block(*args, **kwargs)
        finally:
            for layer, weight in dense.items():
                layer.weight.data = weight
            for hook in hooks:
                hook.remove()


def _rounding(layer: Layer) -> Any:
    return lambda module, args: (rounded(args[0], layer), *args[1:]) if args else None


@torch.no_grad()
def quantized_loss(task: Task, weights: Mapping[Layer, Tensor]) -> float:
    """The loss of the block with these weights; NaN counts as infinity.

    Raises:
        torch.OutOfMemoryError: a single sample does not fit; all else leaves fewer samples a call.
    """
    wanted = min(SAMPLES, task.samples)
    standing: Any = _Quantized(task.block, weights)
    run = dataclasses.replace(task, block=standing)
    try:
        loss = mean_squared_error(run, [i * task.samples // wanted for i in range(wanted)])
    finally:
        task.micro_batch = run.micro_batch
    return loss if loss == loss else float("inf")
