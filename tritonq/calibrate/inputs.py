"""Static scales of inputs: found in calibration, stored, and the same for every call.

    minmax       the range of all inputs
    percentile   the smallest magnitude that 99.99 % of them do not exceed
    mse          the range whose QDQ has the smallest squared error, of 65 from the largest magnitude down to 1/16 of it

A format with one scale for a tensor gets `scale` (and `zero_point`) as it computes them of a range; one with a
tensor-wide divisor (NVFP4) gets `tensor_scale`, its group scales stay dynamic. The errors of a single scale are those
of a histogram of all inputs, those of a divisor of 256 rows drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tritonq import ops
from tritonq.calibrate.statistics import Observer, Range, collect, shared_inputs
from tritonq.calibrate.task import Layer, Task
from tritonq.formats import Format
from tritonq.nn.linear import STATIC, QLinear
from tritonq.nn.schemes import Scheme
from tritonq.reference import Parts

OBSERVERS = ("minmax", "percentile", "mse")
CLIPS = tuple(2.0 ** (-i / 16) for i in range(65))


def takes_static(fmt: Format | None) -> bool:
    """Whether inputs in this format have anything that calls can share."""
    return fmt is not None and (fmt.group[0] == -1 or fmt.tensor_scale)


def parts_of_range(low: Tensor, high: Tensor, fmt: Format) -> Parts:
    """What inputs from `low` to `high` (fp32 scalars) are quantized with, as `Format.storage` has it."""
    extremes = torch.stack([low, high]).to(torch.float32)
    if fmt.tensor_scale:
        return {"tensor_scale": ops.tensor_scale(extremes, fmt)}
    return {name: part for name, part in ops.quantize(extremes, fmt).items() if name != "qdata"}


def use_static(layer: QLinear, parts: Parts) -> None:
    """Have a quantized layer use static parts of its inputs."""
    for name, part in parts.items():
        layer.register_buffer(STATIC[name], part.to(layer.weight.device))


@dataclass(frozen=True)
class StaticInputs:
    """Sets `inputs` of the layers whose format of inputs has static parts.

    Attributes:
        observer: "minmax", "percentile" or "mse".
        percentile: share of the inputs that is not clipped, in percent.
    """

    name: ClassVar[str] = "inputs"
    observer: str = "minmax"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            raise ValueError(f"static scales come from {', '.join(OBSERVERS)}, got {self.observer!r}")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile is a number of percent, above 0 and up to 100, got {self.percentile}")

    def check(self, scheme: Scheme, search: str | bool) -> None:
        """ValueError for schemes whose inputs have nothing static."""
        fmt = scheme.input_format
        if not takes_static(fmt):
            what = "leaves inputs alone" if fmt is None else f"gives inputs scales of their own ({fmt.name})"
            raise ValueError(
                f"{scheme.name} {what}; static scales go with one scale for all inputs or a tensor-wide divisor, such "
                "as FP8 and NVFP4 have: take one of those, or inputs='dynamic'"
            )

    @torch.no_grad()
    def run(self, task: Task) -> None:
        layers = [layer for layer in task.layers if not layer.is_expert and takes_static(layer.input_format)]
        sets = shared_inputs(task, layers)
        seen = {members[0]: Range(members[0], rows=256, seed=task.seed) for members in sets}
        observers: dict[Layer, Observer] = dict(seen)
        collect(task, observers)
        for members in sets:
            found = seen[members[0]]
            for layer in members:
                if not found.total:
                    layer.notes["inputs"] = "saw no finite input"  # scales stay dynamic
                    continue
                assert layer.input_format is not None
                top = self._top(found, layer.input_format)
                layer.inputs = parts_of_range(*_clipped(found, top), layer.input_format)
                layer.notes["inputs"] = {"largest": found.top, "kept": top}

    def _top(self, found: Range, fmt: Format) -> float:
        """The largest magnitude that is not clipped."""
        if self.observer == "minmax":
            return found.top
        if self.observer == "percentile":
            return min(found.top, found.quantile(self.percentile / 100))
        errors = [float(_error(found, fmt, found.top * clip)) for clip in CLIPS]
        return found.top * CLIPS[errors.index(min(errors))]


def _clipped(found: Range, top: float) -> tuple[Tensor, Tensor]:
    return found.low.clamp(min=-top), found.high.clamp(max=top)


def _error(found: Range, fmt: Format, top: float) -> Tensor:
    """Squared error of QDQ, fp64, of inputs up to `top`."""
    parts = parts_of_range(*_clipped(found, top), fmt)
    x = found.rows if fmt.tensor_scale else found.centers
    e = ops.qdq(x, fmt, **parts).double() - x.double()  # type: ignore[arg-type]
    return e.square().sum() if fmt.tensor_scale else (e.square() * found.counts.flatten()).sum()
