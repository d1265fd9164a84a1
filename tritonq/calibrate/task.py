"""What an algorithm gets of a block: its layers, its inputs some samples at a time, and what it put out before.

    for method in calibration.methods:  method.run(task)      transforms weights, or sets `layer.result`
    layers that nobody decided about are rounded to nearest

A *sample* is one call of the model, as the user gave it; a *batch* is several samples put together for one call of the
block. The loss of outputs y beside what the dense block put out, t, is the mean of (y - t)^2 over all elements that
count: those of padding do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tritonq.formats import Format
from tritonq.reference import Parts


@dataclass(eq=False)
class Layer:
    """A weight of a block that is to be quantized.

    Attributes:
        name: of the linear layer in the model, or of the parameter of fused experts.
        module, key: what holds the weight: `module._parameters[key]`, dense until the block is done.
        fmt: what it is quantized to. input_format: what its inputs are quantized to at run time, None for nothing.
        shared: layers with the same text share their tensor-wide divisor (`nn.select.sharing_key`).
        result: what was decided, as `ops.quantize` returns it; None is left to rounding to nearest.
        importance: of the columns, fp32 [K] or of fused experts [E, K], for the scale search of rounding to nearest.
        inputs: static parts of the inputs by name ("scale", "zero_point", "tensor_scale").
        notes: what the report says about it: "fallback", numbers of tokens by expert, errors, ...
    """

    name: str
    module: nn.Module
    key: str
    fmt: Format
    input_format: Format | None = None
    shared: str | None = None
    result: Parts | None = None
    importance: Tensor | None = None
    inputs: Parts = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def weight(self) -> nn.Parameter:
        """[N, K], of fused experts [E, N, K]."""
        found = self.module._parameters[self.key]
        assert found is not None
        return found

    @property
    def is_expert(self) -> bool:
        return self.weight.ndim == 3


@dataclass
class Batch:
    """Samples put together: arguments of the block on its device, and what the dense block put out for them.

    Attributes:
        samples: their numbers. targets: floating outputs of the dense block, in the order of `tensors`; empty where
            nobody asked for them.
        masks: for each target, which elements count, of a shape that broadcasts to it; None for all.
    """

    samples: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: list[Tensor] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Elements of the targets that count."""
        total = 0
        for target, mask in zip(self.targets, self.masks, strict=True):
            total += target.numel() if mask is None else int(mask.expand(target.shape).sum())
        return total


class Events(Protocol):
    """Where what happened is told: `events("out of memory", block="layers.3", micro_batch=4)`; see `report`."""

    def __call__(self, what: str, **details: Any) -> None: ...


Fetch = Callable[[Sequence[int], torch.device, bool], list[Batch]]


@dataclass
class Task:
    """A block to quantize.

    Attributes:
        name, block: the module, on `device`, with dense weights; what runs it must not change its training mode.
        layers: what is to be quantized in it, experts included.
        samples: how many there are.
        fetch: fetch(samples, device, targets) puts samples together, as few batches as can be: samples of other shapes
            go into batches of their own. Arguments are not to be written to.
        devices: more devices that may take a share; the first is `device`.
        seed: of whatever is random.
        search: the scale search of rounding to nearest, as in `tritonq.quantize`.
        micro_batch: samples in a call of the block that fitted into memory so far; methods halve it where memory runs
            out, and tell `events`.
        elsewhere: ids of parameters that modules outside of the block hold, too; they are not to be scaled.
    """

    name: str
    block: nn.Module
    layers: list[Layer]
    samples: int
    fetch: Fetch
    device: torch.device
    events: Events
    devices: tuple[torch.device, ...] = ()
    seed: int = 0
    search: str | bool = "mse"
    micro_batch: int = 8
    elsewhere: frozenset[int] = frozenset()

    def forward(self, batch: Batch, block: nn.Module | None = None) -> list[Tensor]:
        """Floating outputs of the block, or of a copy of it."""
        return tensors((self.block if block is None else block)(*batch.args, **batch.kwargs))


def tensors(outputs: Any) -> list[Tensor]:
    """Floating tensors among what a block puts out, each once."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not any(leaf is other for other in found):
            found.append(leaf)
    return found


def squared_error(outputs: Sequence[Tensor], batch: Batch) -> Tensor:
    """Sum of (y - t)^2 over what counts, fp32; the mean is this over `batch.count`, summed over batches."""
    total = torch.zeros((), device=outputs[0].device)
    for y, target, mask in zip(outputs, batch.targets, batch.masks, strict=True):
        difference = y.float() - target.float()
        if mask is not None:
            difference = difference * mask
        total = total + difference.square().sum()
    return total


class Method(Protocol):
    """An algorithm. `run` changes weights without changing what the block computes (AWQ, SmoothQuant), or sets
    `result`, `importance` or `inputs` of layers. One with a method `check(scheme, search)` may refuse a scheme there,
    before anything runs."""

    name: str

    def run(self, task: Task) -> None: ...
