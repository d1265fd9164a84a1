"""What an export did, and the error it made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tritonq import ops
from tritonq.formats import Format
from tritonq.reference import Parts

_TILE = 1 << 20  # elements that are compared at a time


@dataclasses.dataclass(frozen=True)
class LayerError:
    """Energy of a weight and of its quantization error, sums over its elements."""

    signal: float
    noise: float

    @property
    def relative(self) -> float:
        """||x - dequantized|| / ||x||; 0 for a weight of zeros."""
        return math.sqrt(self.noise / self.signal) if self.signal else 0.0

    @property
    def sqnr(self) -> float | None:
        """10 log10(signal / noise) in dB; None where nothing was lost."""
        return 10 * math.log10(self.signal / self.noise) if self.signal and self.noise else None

    def __add__(self, other: LayerError) -> LayerError:
        return LayerError(self.signal + other.signal, self.noise + other.noise)


@dataclasses.dataclass
class Report:
    """Result of an export.

    Attributes:
        path: the checkpoint. scheme, format: names of the scheme and of the weight format.
        quantized, dense: number of weights quantized, and of tensors copied.
        bytes_before, bytes_after: of all tensors.
        bits_per_weight: of the quantized weights, scales included.
        layers: name of a weight's module -> its error.
        notes: what a user should know, such as limits of readers.
        seconds: wall time.
        calibration: what calibration did, as in its `report.json`; None without.
    """

    path: str
    scheme: str
    format: str
    quantized: int
    dense: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    layers: dict[str, LayerError]
    notes: tuple[str, ...]
    seconds: float
    calibration: dict[str, Any] | None = None

    @property
    def total(self) -> LayerError:
        return sum(self.layers.values(), LayerError(0.0, 0.0))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it; errors as {"relative_error", "sqnr_db"}."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content["notes"] = list(self.notes)
        content["layers"] = {name: _as_json(error) for name, error in self.layers.items()}
        content["total"] = _as_json(self.total)
        return content


def _as_json(error: LayerError) -> dict[str, float | None]:
    return {"relative_error": error.relative, "sqnr_db": error.sqnr}


def by_kind(layers: Mapping[str, LayerError]) -> dict[str, list[LayerError]]:
    """Errors of layers by the last part of their names (`q_proj`), in order of appearance."""
    kinds: dict[str, list[LayerError]] = {}
    for name, error in layers.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(error)
    return kinds


def measure(x: Tensor, parts: Parts, fmt: Format) -> LayerError:
    """Error of the quantized weight [N, K] against x, as it is when dequantized to x's dtype; rows at a time."""
    rows, columns = x.shape
    height = max(fmt.group[0], 1)
    step = max(height, _TILE // max(1, columns) // height * height)
    signal = noise = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        piece = {"qdata": parts["qdata"][start:stop]}
        for name in ("scale", "zero_point"):
            if name in parts:
                whole = fmt.group[0] == -1
                piece[name] = parts[name] if whole else parts[name][start // height : -(-stop // height)]
        if "tensor_scale" in parts:
            piece["tensor_scale"] = parts["tensor_scale"]
        values = ops.dequantize(piece, fmt, (stop - start, columns), x.dtype).float()
        original = x[start:stop].float()
        signal = signal + original.square().sum().double()
        noise = noise + values.sub_(original).square_().sum().double()
    return LayerError(float(signal), float(noise))
