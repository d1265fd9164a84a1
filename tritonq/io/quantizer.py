"""Weights of a plan, one at a time: read, check, quantize, measure, lay out."""

from __future__ import annotations

import collections
from typing import Any, Protocol

import torch
from torch import Tensor

from tritonq import ops
from tritonq.io import compressed_tensors, writer
from tritonq.io.plan import Plan, Weight
from tritonq.io.report import LayerError, measure
from tritonq.io.source import Source, natural
from tritonq.nn.schemes import Scheme
from tritonq.reference import Parts


class Decided(Protocol):
    """What calibration decided about weights; `errors` by name of those that it did decide about."""

    errors: dict[str, LayerError]

    def parts(self, weight: Weight) -> Parts | None:
        """Of a weight [N, K], in host memory; None is left to rounding to nearest."""

    def inputs(self, weight: Weight) -> Parts:
        """Static parts of its inputs."""

    def dense(self, name: str) -> Tensor | None:
        """A tensor of the checkpoint that has changed."""


class Quantizer:
    """Makes the output tensors of a plan, one weight at a time, and collects their errors."""

    def __init__(
        self,
        source: Source,
        plan: Plan,
        scheme: Scheme,
        dtype: torch.dtype | None,
        device: torch.device,
        search: str | bool = False,
        decided: Decided | None = None,
    ) -> None:
        self.errors: dict[str, LayerError] = dict(decided.errors) if decided else {}
        self._source, self._plan, self._dtype, self._device = source, plan, dtype, device
        self._inputs, self._search = scheme.input_format, search
        self._shared: dict[str, Parts] | None = None
        self._decided = decided

    def entries(self) -> list[writer.Entry]:
        """What has to be written, in natural order of names."""
        entries = [self._dense(name) for name in self._plan.dense]
        entries += [self._weight(weight) for weight in self._plan.weights]
        return sorted(entries, key=lambda entry: natural(entry.name))

    def notes(self, entries: list[writer.Entry]) -> dict[str, Any]:
        found = {entry.name: self.errors[entry.name] for entry in entries if entry.name in self.errors}
        return {"errors": {name: [error.signal, error.noise] for name, error in found.items()}}

    def restore(self, notes: dict[str, Any]) -> None:
        self.errors.update({name: LayerError(*pair) for name, pair in notes["errors"].items()})

    def _dense(self, name: str) -> writer.Entry:
        info = self._source.tensors[name]
        floating = info.dtype in ops.FLOATS
        stored = self._dtype if floating and self._dtype else info.dtype

        def make() -> dict[str, Tensor]:
            changed = self._decided.dense(name) if self._decided else None
            tensor = self._source.load(name) if changed is None else changed
            if floating and name.rpartition(".")[2] in ("weight", "bias"):
                check_finite(tensor, name, stored)
            return {name: tensor}

        return writer.Entry(name, {name: (info.shape, stored)}, make)

    def _weight(self, weight: Weight) -> writer.Entry:
        static = self.static(weight)
        specs = compressed_tensors.specs(weight.fmt, self._inputs, weight.shape, bool(static))

        def make() -> dict[str, Tensor]:
            parts = self._decided.parts(weight) if self._decided else None
            parts = self._rounded(weight) if parts is None else parts
            tensors = compressed_tensors.encode(parts, weight.fmt, self._inputs, weight.shape, static)
            return {f"{weight.name}.{suffix}": tensor for suffix, tensor in tensors.items()}

        return writer.Entry(weight.name, {f"{weight.name}.{suffix}": spec for suffix, spec in specs.items()}, make)

    def static(self, weight: Weight) -> Parts:
        """Static parts of the inputs of a weight, {} where there are none."""
        return self._decided.inputs(weight) if self._decided else {}

    def _rounded(self, weight: Weight) -> Parts:
        """Rounding to nearest."""
        x = self._load(weight)
        given: dict[str, Any] = {**self._scales().get(weight.key or "", {})}
        parts = ops.quantize(x, weight.fmt, **given, search=False if "scale" in given else self._search)
        self.errors[weight.name] = measure(x, parts, weight.fmt)
        return {name: part.cpu() for name, part in parts.items()}

    def _load(self, weight: Weight) -> Tensor:
        x = self._source.load(weight.source)
        if weight.piece is not None:
            x = x[weight.piece.expert, weight.piece.start : weight.piece.stop]
        name = weight.source if weight.piece is None else f"{weight.source}[{weight.piece.expert}]"
        check_finite(x, name, weight.dtype)
        return x.to(device=self._device, dtype=weight.dtype)

    def _scales(self) -> dict[str, Parts]:
        """Tensor-wide scales of weights that share them, wherever they lie: those of all members as one tensor."""
        if self._shared is not None:
            return self._shared
        members: dict[str, list[Weight]] = collections.defaultdict(list)
        for weight in self._plan.weights:
            if weight.key is not None and weight.name not in (self._decided.errors if self._decided else ()):
                members[weight.key].append(weight)
        self._shared = {}
        for key, weights in members.items():
            fmt = weights[0].fmt
            # A rule looks at the extremes of its group, so the extremes of all members have the scale of all of them.
            extremes = torch.stack([e.double() for weight in weights for e in torch.aminmax(self._load(weight))])
            if fmt.tensor_scale:
                self._shared[key] = {"tensor_scale": ops.tensor_scale(extremes, fmt)}
            else:
                parts = ops.quantize(extremes, fmt)
                self._shared[key] = {name: part for name, part in parts.items() if name != "qdata"}
        return self._shared


def check_finite(x: Tensor, name: str, stored: torch.dtype) -> None:
    """ValueError for NaN or infinity, also where storing x as `stored` would make one."""
    if not x.numel():
        return
    low, high = torch.aminmax(x)  # propagates NaN, and makes no temporary
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        flat = x.reshape(-1)
        bad = sum(int((~torch.isfinite(part)).sum()) for part in flat.split(1 << 22))
        raise ValueError(f"{name} holds {bad} elements that are NaN or infinite; repair or fetch the model again")
    extremes = torch.stack([low, high]).to(stored)
    if not bool(torch.isfinite(extremes).all()):
        raise ValueError(
            f"{name} reaches {float(high)} and {float(low)}, beyond {str(stored)[6:]}; use --dtype bfloat16"
        )
